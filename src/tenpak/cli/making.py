"""Verbs that make something: statistics, artifacts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tenpak.cli.application import app, quiet
from tenpak.cli.console import err, explain_dense, note, print_result, progress_bar
from tenpak.cli.options import (
    AllowOverlap,
    Bpw,
    CandidateList,
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
    Strict,
    Target,
    Text,
    Tokens,
    Tune,
    Window,
    WorkFolder,
)

__all__ = ["calibrate", "compress", "make_artifact", "merge"]


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
    candidates: CandidateList = None,
    overrides: Overrides = None,
    calibration: Text = None,
    calibration_tokens: Tokens = 131_072,
    window: Window = None,
    statistics: StatisticsOf = None,
    propagation: Propagation = "original",
    tune: Tune = None,
    work: WorkFolder = None,
    evaluation: Evaluation = None,
    allow_overlap: AllowOverlap = False,
    strict: Strict = False,
    seed: Annotated[int, typer.Option(help="for codecs that draw random numbers")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the artifact at -o")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only predict bytes, memory, disk and time")] = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL into an artifact and, given a text, measure what that cost."""
    from tenpak.allocation.budget import one_budget
    from tenpak.policies import policy_of

    quiet()
    options: dict[str, Any] = {
        "recipe": recipe,
        "policy": policy_of(policy, rank, min_dim),
        "budget": one_budget(target=target, bpw=bpw, bytes=max_bytes, kl=max_kl, ppl=max_ppl_increase),
        "candidates": tuple(candidates or ()),
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
        _show_prediction(model, options, as_json)
        return
    if out is None:
        raise typer.BadParameter("give -o OUT, the folder to write (or --dry-run)")
    options |= {"calibration_window": window, "work": work, "allow_overlap": allow_overlap}
    options |= {"seed": seed, "overwrite": overwrite}
    make_artifact(model, out, evaluation, options, strict=strict, as_json=as_json)


def make_artifact(
    model: str, out: Path, evaluation: str | None, options: dict[str, Any], *, strict: bool, as_json: bool
) -> None:
    """Run the pipeline with these options of ``compress`` and print its report.

    Raises:
        typer.Exit: the artifact misses its budget, and ``strict`` asks for exit code 1 then.
    """
    from tenpak.pipeline import compress as run

    text = _text_to_measure_on(model, options["revision"], evaluation)
    with progress_bar("weights") as update:
        report = run(model, out, evaluation=text, progress=update, **options)
    _show_report(report.to_json(), as_json, unmeasured=text is None and evaluation is None, strict=strict)


def _show_prediction(model: str, options: dict[str, Any], as_json: bool) -> None:
    from tenpak.errors import BudgetError
    from tenpak.prediction import predict
    from tenpak.report.rows import prediction_rows

    if options.pop("candidates"):
        raise BudgetError(
            "a dry run reads no weights and cannot choose among candidates",
            hint="`tenpak profile`, then `tenpak allocate`, say what each would take and cost",
        )
    prediction = predict(model, **options)
    print_result(prediction.to_json(), as_json, prediction_rows(prediction.to_json()), "would write")


def _show_report(report: dict[str, Any], as_json: bool, *, unmeasured: bool, strict: bool) -> None:
    from tenpak.report.rows import report_rows

    print_result(report, as_json, report_rows(report), report["artifact"])
    if report["reused"]:
        note(f"went on from an earlier run: {report['reused']} finished tensors were not encoded again")
    if not as_json:
        explain_dense(report["dense"])
    if unmeasured:
        note("quality not measured; give --evaluation TEXT, or run `tenpak evaluate`")
    promise = (report["search"] or {}).get("promise", {"kept": True})
    if not promise["kept"]:
        err.print(f"warning: the budget is missed: {promise['reached']:g} where {promise['limit']:g} was asked for")
        if strict:
            raise typer.Exit(1)


def _text_to_measure_on(model: str, revision: str | None, given: str | None) -> str | None:
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

    quiet()
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
            progress=update,
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
    from tenpak.calibration.merging import merge as run
    from tenpak.calibration.statistics import StatisticsFolder
    from tenpak.report.rows import statistics_json, statistics_rows

    with progress_bar("blocks") as update:
        run(statistics, out_folder, overwrite=overwrite, progress=update)
    content = statistics_json(StatisticsFolder(out_folder))
    print_result(content, as_json, statistics_rows(content), str(out_folder))
