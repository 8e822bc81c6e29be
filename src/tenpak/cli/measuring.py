"""Verbs that run models: an artifact measured against its original, and text from either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tenpak.cli.application import app, quiet
from tenpak.cli.console import err, out, print_json, print_result, print_table, progress_bar
from tenpak.cli.options import Artifact, Device, Dtype, Json, Remote
from tenpak.cli.progress import Update

__all__ = ["diagnose", "evaluate", "generate"]


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

    quiet()
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
            progress=update,
        ).to_json()
        if memory:
            result["memory"] = _memory(artifact, against, dtype, update)
    print_result(result, as_json, quality_rows(result), str(artifact))


def _memory(artifact: Path, against: str, dtype: str, update: Update) -> dict[str, Any]:
    from tenpak.evaluation.memory import measure_memory

    runs: dict[str, tuple[str | Path, str]] = {
        "original": (against, "original"),
        "runtime memory": (artifact, "memory"),
        "runtime speed": (artifact, "speed"),
    }
    found = {}
    for number, (name, (folder, runtime)) in enumerate(runs.items()):
        update("measuring memory", number, len(runs))
        found[name] = measure_memory(folder, runtime=runtime, dtype=dtype).to_json()
    update("measuring memory", len(runs), len(runs))
    return found


@app.command()
def diagnose(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="the original: model folder or Hugging Face id")],
    artifact: Artifact,
    text: Annotated[str | None, typer.Option(help="file, folder or dataset id; default: the model's own text")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="read at most this many of its tokens")] = 4096,
    window: Annotated[int | None, typer.Option(min=1, help="tokens per window; default: 256, or the context")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="to be continued; default: two pieces of the text")
    ] = None,
    measure: Annotated[int, typer.Option(min=0, help="tensors whose cost is measured, each by a pass; 0: none")] = 8,
    report: Annotated[Path | None, typer.Option("-o", "--out", help="file to write the JSON to")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Say where the error of ARTIFACT comes from: blocks, tensors, decoding, text, and what to do about it."""
    from tenpak.evaluation.diagnostics import diagnose as run

    quiet()
    if report is not None and not report.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {report.parent} to write {report.name} in")
    with progress_bar("items") as update:
        found = run(
            original,
            artifact,
            text=text,
            tokens=tokens,
            window=window,
            prompts=prompts or (),
            measure=measure,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=update,
        ).to_json()
    if report is not None:
        report.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        _show_diagnosis(found)
    if report is not None:
        err.print(f"written to {report}", soft_wrap=True, markup=False)


def _show_diagnosis(found: dict[str, Any]) -> None:
    from tenpak.report.diagnosis_rows import generation_rows, layer_rows, step_rows, summary_rows, weight_rows

    print_result(found, False, summary_rows(found), found["artifact"])
    out.print()
    print_table(*layer_rows(found), "blocks, in order of depth")
    out.print()
    header, rows = weight_rows(found)
    print_table(header, rows, "tensors: what they cost and what they are like")
    if len(rows) < len(found["weights"]):
        out.print(f"… and {len(found['weights']) - len(rows)} more; --json has all")
    out.print()
    print_table(*step_rows(found), f"the next token after {found['step']['prompt']!r}")
    out.print()
    print_table(*generation_rows(found), "text")
    out.print("\nverdict", style="italic")
    for sentence in found["verdict"]:
        out.print(f"- {sentence}", soft_wrap=True)


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

    quiet()
    with progress_bar("tokens") as update:
        continuation = run(
            model,
            prompt,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=update,
        )
    if as_json:
        out.print_json(json.dumps({"prompt": prompt, "continuation": continuation}))
    else:
        out.print(prompt + continuation, soft_wrap=True, markup=False)
