"""Verbs that run models: an artifact measured against its original, and text from either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tenpak.cli.application import app, quiet
from tenpak.cli.console import out, print_result, progress_bar
from tenpak.cli.options import Artifact, Device, Dtype, Json, Remote

__all__ = ["evaluate", "generate"]


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
            progress=lambda done, total: update("evaluating", done, total),
        ).to_json()
    if memory:
        result["memory"] = _memory(artifact, against, dtype)
    print_result(result, as_json, quality_rows(result), str(artifact))


def _memory(artifact: Path, against: str, dtype: str) -> dict[str, Any]:
    from tenpak.evaluation.memory import measure_memory

    found = {
        "original": measure_memory(against, runtime="original", dtype=dtype),
        "runtime memory": measure_memory(artifact, runtime="memory", dtype=dtype),
        "runtime speed": measure_memory(artifact, runtime="speed", dtype=dtype),
    }
    return {name: memory.to_json() for name, memory in found.items()}


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
