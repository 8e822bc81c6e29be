"""The options of the command line that several verbs share, or that would make one long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tenpak.cli.completion import complete_override, complete_policy, complete_recipe

__all__ = [
    "AllowOverlap", "Artifact", "Bpw", "CandidateList", "Device", "Dtype", "Evaluation", "Json", "MaxBytes", "MaxKl",
    "MaxPpl", "MinDim", "Model", "Out", "Overrides", "PolicyName", "Propagation", "Rank", "Recipe", "Remote",
    "Revision", "StatisticsOf", "Strict", "Target", "Text", "Tokens", "Tune", "Window", "WorkFolder",
]  # fmt: skip


def _known_device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise typer.BadParameter(f"torch cannot use {name!r} here: {str(error).splitlines()[0]}") from error
    return name


Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder or Hugging Face id")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="folder that `tenpak compress` wrote")]
Text = Annotated[
    str | None, typer.Option("--calibration", help="text to calibrate on; default: the model's own, or sampled from it")
]
Tokens = Annotated[int, typer.Option("--calibration-tokens", min=2, help="read at most this many of its tokens")]
Window = Annotated[
    int | None, typer.Option("--calibration-window", min=1, help="tokens per window; default: the model's context")
]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of the hub repository")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="let transformers run the model's own code")]
Dtype = Annotated[str, typer.Option(help="dtype that models compute in: float32, bfloat16, float16 or auto")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …", callback=lambda name: _known_device(name))]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="folder to write")]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="codec of the matrices, default int4:g32; see `tenpak recipes`",
        autocompletion=complete_recipe,
    ),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="codecs by part and position: k-proj, q-v, qkv, out-proj, attention or mlp (each also NAME-whitened), "
        "mixed, buckets, buckets-fisher",
        autocompletion=complete_policy,
    ),
]
Rank = Annotated[int | None, typer.Option(help="of a policy's low rank, default 128; twice that in boundary blocks")]
MinDim = Annotated[int | None, typer.Option(help="leave smaller matrices alone in a policy's low rank, default 1024")]
Target = Annotated[str | None, typer.Option(help="not a recipe: how much smaller than FP32, e.g. 10x")]
Bpw = Annotated[float | None, typer.Option(help="… or bits per weight over everything, e.g. 3.2")]
MaxBytes = Annotated[str | None, typer.Option(help="… or size of the weight files, e.g. 25MB")]
MaxKl = Annotated[float | None, typer.Option(help="… or KL divergence in nats per token, e.g. 0.01")]
MaxPpl = Annotated[str | None, typer.Option(help="… or increase of perplexity, e.g. 1%")]
CandidateList = Annotated[
    list[str] | None,
    typer.Option(
        "--candidates",
        metavar="LIST",
        help="what each tensor may get: RECIPE,RECIPE… or PATTERN=RECIPE,…; `default`: one bit to eight, fixed-rate",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="exit code 1 if the written artifact misses its budget")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATTERN=RECIPE",
        help="another codec for matching tensors",
        autocompletion=complete_override,
    ),
]
StatisticsOf = Annotated[Path | None, typer.Option(help="folder that `tenpak calibrate` wrote for this model")]
Propagation = Annotated[
    Literal["original", "own", "none"],
    typer.Option(metavar="HOW", help="correct later blocks towards the original, own outputs, or none"),
]
Tune = Annotated[
    int | None,
    typer.Option(metavar="STEPS", min=0, help="distil scales and norms; default 240 with a budget, 0 with a recipe"),
]
WorkFolder = Annotated[Path | None, typer.Option(help="folder for finished tensors; default: beside -o")]
Evaluation = Annotated[str | None, typer.Option(help="text to measure on: file, folder, dataset id, or none")]
AllowOverlap = Annotated[bool, typer.Option("--allow-overlap", help="measure on a text that was in part calibrated on")]
