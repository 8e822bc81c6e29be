"""The command line: thin verbs over the library. Results on stdout, progress and messages on stderr.

Exit codes: 0 done; 1 a TenpakError, told in one line with a hint; 2 wrong usage; 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.table import Table

from tenpak.console import err, explain_dense, out, print_json, print_result, print_tensors, progress_bar
from tenpak.errors import ArtifactError, CheckpointError, TenpakError
from tenpak.options import (
    Artifact,
    Bpw,
    Device,
    Dtype,
    Evaluation,
    Json,
    MaxBytes,
    MaxKl,
    MaxPpl,
    MinDim,
    Model,
    Out,
    Overrides,
    PolicyName,
    Propagation,
    Rank,
    Recipe,
    Remote,
    Revision,
    StatisticsOf,
    Target,
    Text,
    Tokens,
    Tune,
    Window,
    WorkFolder,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="tenpak",
    help="Make decoder-only language models about ten times smaller, and prove it on the file it wrote.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def compress(
    model: Model,
    out: Out = None,
    recipe: Recipe = None,
    policy: PolicyName = None,
    rank: Rank = None,
    min_dim: MinDim = None,
    target: Target = None,
    bpw: Bpw = None,
    max_bytes: MaxBytes = None,
    max_kl: MaxKl = None,
    max_ppl_increase: MaxPpl = None,
    overrides: Overrides = None,
    calibration: Text = None,
    calibration_tokens: Tokens = 131_072,
    window: Window = None,
    statistics: StatisticsOf = None,
    propagation: Propagation = "original",
    tune: Tune = None,
    work: WorkFolder = None,
    evaluation: Evaluation = None,
    seed: Annotated[int, typer.Option(help="for codecs that draw random numbers")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the artifact at -o")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only predict bytes, memory, disk and time")] = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL into an artifact and, given a text, measure what that cost."""
    from tenpak.allocation.budget import one_budget
    from tenpak.pipeline import compress as run
    from tenpak.policies import policy_of
    from tenpak.prediction import predict
    from tenpak.report.rows import prediction_rows

    _quiet()
    budget = one_budget(target=target, bpw=bpw, bytes=max_bytes, kl=max_kl, ppl=max_ppl_increase)
    options: dict[str, Any] = {
        "recipe": recipe,
        "policy": policy_of(policy, rank, min_dim),
        "budget": budget,
        "overrides": tuple(overrides or ()),
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "statistics": statistics,
        "propagation": propagation,
        "tuning": tune,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        prediction = predict(model, **options)
        print_result(prediction.to_json(), as_json, prediction_rows(prediction.to_json()), "would write")
        return
    if out is None:
        raise typer.BadParameter("give -o OUT, the folder to write (or --dry-run)")
    text = _evaluation_text(model, revision, evaluation)
    options |= {"calibration_window": window, "work": work}
    with progress_bar("weights") as update:
        report = run(model, out, evaluation=text, seed=seed, overwrite=overwrite, progress=update, **options)
    _show_report(report.to_json(), as_json, unmeasured=text is None and evaluation is None)


def _show_report(report: dict[str, Any], as_json: bool, *, unmeasured: bool) -> None:
    from tenpak.report.rows import report_rows

    print_result(report, as_json, report_rows(report), report["artifact"])
    if report["reused"]:
        err.print(f"[dim]went on from an earlier run: {report['reused']} finished tensors were not encoded again[/dim]")
    if not as_json:
        explain_dense(report["dense"])
    if unmeasured:
        err.print("[dim]quality not measured; give --evaluation TEXT, or run `tenpak evaluate`[/dim]")


def _evaluation_text(model: str, revision: str | None, given: str | None) -> str | None:
    """The text that was given; where none was, the one that the model's folder may hold; none where that was said."""
    from tenpak.checkpoint.source import locate
    from tenpak.evaluation.evaluate import DEFAULT_TEXT

    if given is not None:
        return None if given == "none" else given
    default = locate(model, revision=revision) / DEFAULT_TEXT
    return str(default) if default.is_file() else None


@app.command()
def calibrate(
    model: Model,
    out_folder: Annotated[Path, typer.Option("-o", "--out", help="folder to write")],
    calibration: Text = None,
    tokens: Tokens = 131_072,
    window: Window = None,
    fast: Annotated[bool, typer.Option("--fast", help="forward only; guess the curvature from names")] = False,
    seed: Annotated[int, typer.Option(help="of the labels drawn for the curvature")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the statistics at -o")] = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Collect the statistics of MODEL on a text, for `tenpak compress --statistics`."""
    from tenpak.calibrating import calibrate as run
    from tenpak.report.rows import statistics_json, statistics_rows

    _quiet()
    started = time.perf_counter()
    with progress_bar("tokens") as update:
        found = run(
            model,
            out_folder,
            calibration=calibration,
            tokens=tokens,
            window=window,
            fast=fast,
            seed=seed,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: update("calibrating", done, total),
        )
    content = {**statistics_json(found), "seconds": time.perf_counter() - started}
    print_result(content, as_json, statistics_rows(content), str(out_folder))


@app.command()
def merge(
    statistics: Annotated[list[Path], typer.Argument(metavar="STATISTICS...", help="folders of `tenpak calibrate`")],
    out_folder: Annotated[Path, typer.Option("-o", "--out", help="folder to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the statistics at -o")] = False,
    as_json: Json = False,
) -> None:
    """Merge statistics of several texts, or of shards of one."""
    from tenpak.calibration.statistics import StatisticsFolder
    from tenpak.calibration.statistics import merge as run
    from tenpak.report.rows import statistics_json, statistics_rows

    run(statistics, out_folder, overwrite=overwrite)
    content = statistics_json(StatisticsFolder(out_folder))
    print_result(content, as_json, statistics_rows(content), str(out_folder))


@app.command()
def inspect(artifact: Artifact, as_json: Json = False) -> None:
    """Say what an artifact holds: sizes, codecs, what is dense and why, measured quality; or what statistics hold."""
    from tenpak.calibration.statistics import FILE_NAME, StatisticsFolder
    from tenpak.report.rows import statistics_json, statistics_rows

    if (artifact / FILE_NAME).is_file():
        content = statistics_json(StatisticsFolder(artifact))
        print_result(content, as_json, statistics_rows(content), str(artifact))
        return
    _inspect_artifact(artifact, as_json)


def _inspect_artifact(artifact: Path, as_json: bool) -> None:
    from tenpak.artifact.reader import open_artifact
    from tenpak.report.report import measured
    from tenpak.report.rows import report_rows

    report = measured(artifact).to_json()
    manifest = open_artifact(artifact).manifest
    weights = {name: {"shape": list(e.shape), "codec": e.codec, "bits": e.bits} for name, e in manifest.weights.items()}
    print_result({**report, "weights": weights, "tied": manifest.tied}, as_json, report_rows(report), str(artifact))
    if as_json:
        return
    print_tensors(manifest.weights)
    explain_dense(report["dense"])


@app.command()
def verify(artifact: Artifact, as_json: Json = False) -> None:
    """Check every byte of an artifact against the hashes in its manifest; exit code 1 if any differs."""
    from tenpak.artifact.verify import verify as run

    result = run(artifact)
    if as_json:
        out.print_json(json.dumps({"ok": result.ok, "tensors": result.tensors, "problems": list(result.problems)}))
    elif result.ok:
        out.print(f"intact: {result.tensors} tensors, {result.bytes:,} bytes of weight files")
    for problem in result.problems:
        err.print(f"error: {problem}", soft_wrap=True, markup=False)
    if not result.ok:
        err.print("hint: obtain the artifact again, or compress the model again", soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def evaluate(
    artifact: Artifact,
    against: Annotated[str, typer.Option(help="the original: model folder or Hugging Face id")],
    text: Annotated[str | None, typer.Option(help="file, folder or dataset id; default: the model's own text")] = None,
    window: Annotated[int | None, typer.Option(help="tokens per window; default: the model's context")] = None,
    stride: Annotated[int | None, typer.Option(help="default: min(512, window / 2)")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    memory: Annotated[bool, typer.Option("--memory", help="also measure resident memory, in fresh processes")] = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Measure ARTIFACT against its original: perplexity, KL divergence, top-1 agreement, sizes, speed."""
    from tenpak.evaluation.evaluate import evaluate as run
    from tenpak.report.rows import quality_rows

    _quiet()
    with progress_bar("tokens") as update:
        result = run(
            artifact,
            against=against,
            text=text,
            window=window,
            stride=stride,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: update("evaluating", done, total),
        ).to_json()
    if memory:
        result["memory"] = _memory(artifact, against, dtype)
    print_result(result, as_json, quality_rows(result), str(artifact))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="folder or Hugging Face id")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to continue")],
    tokens: Annotated[int, typer.Option(min=1, help="at most this many new tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a model or an artifact."""
    from tenpak.evaluation.generation import generate as run

    _quiet()
    continuation = run(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        out.print_json(json.dumps({"prompt": prompt, "continuation": continuation}))
    else:
        out.print(prompt + continuation, soft_wrap=True, markup=False)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the presets and how recipes are written."""
    from tenpak.recipes import GRAMMAR, PRESETS

    if as_json:
        listed = {
            name: {"recipe": preset.recipe, "description": preset.description} for name, preset in PRESETS.items()
        }
        print_json(listed)
        return
    table = Table("preset", "recipe", "", box=None, header_style="dim")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.recipe, preset.description)
    out.print(table)
    out.print("\nA recipe is also written by hand:\n")
    out.print(GRAMMAR, soft_wrap=True, markup=False, highlight=False)


class _Interrupted(BaseException):
    """Ctrl-C, or a request to terminate; typer would turn a KeyboardInterrupt into a silent exit."""


def main() -> None:
    """Run the command line; turns errors into one line, a hint and an exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # so that a terminated run also cleans up
        signal.signal(number, _interrupt)
    warnings.showwarning = _warn
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (TenpakError, OSError) as error:
        if debug:
            raise
        _fail(str(error), getattr(error, "hint", None) or _hint(error))
        sys.exit(1)
    except _Interrupted as error:
        _fail("interrupted", "no half-written output is left; run the same command again to go on")
        sys.exit(128 + error.args[0])


def _fail(message: str, hint: str) -> None:
    err.print(f"error: {message}", soft_wrap=True, markup=False)
    err.print(f"hint: {hint}", soft_wrap=True, markup=False)


def _hint(error: Exception) -> str:
    """What to do about an error that does not say it itself."""
    if isinstance(error, CheckpointError):
        return "config.json and weights must be those of one sound model: obtain it again"
    if isinstance(error, ArtifactError):
        return "obtain the artifact again, or compress the model again"
    return "`--debug` shows where it happened"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Interrupted(signum)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    err.print(f"warning: {message}", soft_wrap=True, markup=False)


def _quiet() -> None:
    """Keep transformers' own bars and notes out of the way; what matters comes as an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _memory(artifact: Path, against: str, dtype: str) -> dict[str, Any]:
    from tenpak.evaluation.memory import measure_memory

    found = {
        "original": measure_memory(against, runtime="original", dtype=dtype),
        "runtime memory": measure_memory(artifact, runtime="memory", dtype=dtype),
        "runtime speed": measure_memory(artifact, runtime="speed", dtype=dtype),
    }
    return {name: memory.to_json() for name, memory in found.items()}
