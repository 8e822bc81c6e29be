"""Where the flagship codec's bytes go, and what its contexts and the precision of its steps are worth.

    python benchmarks/run.py anatomy

*Where*: an artifact ten times smaller than FP32, tuned. What levels take is counted by their tables, the rest by
length. *Contexts*: the same levels written with fewer of them; what a table for each quantizer saves is the difference
of two entropies, for no stream can be written without. *Steps*: to coarser powers of two than a quarter, read off
at the base's bytes on a line through the logarithms of several points. Needs the shared models and texts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from frontier import FEW_TOKENS, MODEL, STEP
from quality import TOKENS, WINDOW, shared
from torch import Tensor

import tenpak
from tenpak.artifact.reader import Artifact
from tenpak.codecs import trellis
from tenpak.codecs.trellis_fit import histogram, lengths, shaped
from tenpak.codecs.trellis_stream import Coded, read, write

TARGET = "10x"
AROUND = (0.93, 0.965, 1, 1.035, 1.07)  # of the base's step
POWERS = {"quarter powers of two (the base)": 1, "half powers": 2, "whole powers": 4}


def run() -> dict[str, Any]:
    """Everything, on one model."""
    with tempfile.TemporaryDirectory(prefix="tenpak-anatomy-") as folder:
        out = Path(folder) / "artifact"
        tenpak.compress(shared() / "models" / MODEL, out, budget=TARGET, **reading(TOKENS))
        artifact = tenpak.open_artifact(out)
        coded = streams(artifact)
        found = {"where": where(artifact, coded), "contexts": contexts([c for c, _ in coded])}
        print(found, file=sys.stderr)
        return {"model": MODEL, "target": TARGET, "window": WINDOW, "calibration_tokens": TOKENS, **found} | {
            "steps": {"calibration_tokens": FEW_TOKENS, **steps(Path(folder))}
        }


def reading(tokens: int) -> dict[str, Any]:
    """The text to calibrate on."""
    text = shared() / "data" / "tinystories_train.txt"
    return {"calibration": text, "calibration_tokens": tokens, "calibration_window": WINDOW}


def streams(artifact: Artifact) -> list[tuple[Coded, int]]:
    """Every matrix as integers, and the bytes that it takes."""
    found = []
    for name in artifact.manifest.weights:
        for payload in artifact.payloads(name):
            stream, codec = payload.tensors["stream"], payload.codec
            coded = read(stream, payload.shape, codec["step"], codec["states"])
            found.append((replace(coded, levels=coded.levels.int()), len(stream)))
    return found


def where(artifact: Artifact, coded: list[tuple[Coded, int]]) -> dict[str, float]:
    """Bytes by what they are for; together those of the weight files."""
    manifest = artifact.manifest
    files = sum(path.stat().st_size for path in artifact.folder.glob("*.safetensors"))
    levels = sum(float((histogram(c) * lengths(c.shape)).sum()) / 8 for c, _ in coded)
    untuned = [write(replace(c, row_delta=c.row_delta[:0], column_delta=c.column_delta[:0])) for c, _ in coded]
    tuned = sum(size for _, size in coded) - sum(map(len, untuned))
    vectors = sum(torch.Size(d.shape).numel() * (2 if d.dtype == "BF16" else 4) for d in manifest.dense.values())
    payloads = sum(size for _, size in coded)
    return {
        "levels": levels,
        "steps, classes, shapes of tables": payloads - tuned - levels,
        "fine parts of scales, from tuning": tuned,
        "norms, BF16": vectors,
        "names and places of tensors (safetensors header)": files - payloads - vectors,
        "together": files,
    }


def contexts(coded: list[Coded]) -> dict[str, float]:
    """Bytes of all streams by what a level's table depends on."""

    def constant(classes: Tensor) -> Tensor:
        """The class of the mean variance."""
        mean = (2.0 ** (classes.double() / 2)).mean()
        return torch.full_like(classes, round(float(2 * mean.log2())))

    def size(change: Callable[[Coded], dict[str, Tensor]]) -> float:
        return float(sum(len(write(shaped(replace(c, **change(c))))) for c in coded))

    full = size(lambda _: {})
    return {
        "row, column and quantizer (the base)": full,
        "row and quantizer": size(lambda c: {"column_class": constant(c.column_class)}),
        "column and quantizer": size(lambda c: {"row_class": constant(c.row_class)}),
        "quantizer": size(lambda c: {"row_class": constant(c.row_class), "column_class": constant(c.column_class)}),
        "row and column": full + sum(blind(c) for c in coded) / 8,
    }


def blind(coded: Coded) -> float:
    """Bits that levels take beyond their entropy by class and quantizer where the quantizer is not known.

    Levels are 2k, or 2k less a half's sign where the quantizer is the odd one: what one table would have to tell apart.
    """
    counts = histogram(coded)  # [class, quantizer, |k|]
    # |level|: even ones of the first quantizer; zero and odd ones of the second.
    sizes = counts.shape[2]
    levels = torch.zeros(len(counts), 2 * sizes, dtype=torch.float64)
    levels[:, 0::2] += counts[:, 0]
    levels[:, 0] += counts[:, 1, 0]
    levels[:, 1:-1:2] += counts[:, 1, 1:]
    return entropy(levels) - entropy(counts.flatten(0, 1))


def entropy(counts: Tensor) -> float:
    """Bits of all that is counted, a distribution per row."""
    shares = counts / counts.sum(1, keepdim=True).clamp(1)
    return -float((counts * shares.clamp(1e-300).log2()).sum())


def steps(folder: Path) -> dict[str, Any]:
    """KL by how finely steps are told; row and column classes as always."""
    exact = trellis._power
    found = {}
    for name, unit in POWERS.items():

        def coarse(importance: Tensor, unit: int = unit) -> Tensor:
            return (torch.round(exact(importance) / unit) * unit).to(torch.int32)

        with patch.object(trellis, "_power", coarse):
            found[name] = [measured(folder, STEP * factor) for factor in AROUND]
    at = next(iter(found.values()))[len(AROUND) // 2]["bytes"]
    return {"bytes": at, "rows": {name: {"points": rows, "kl": fit(rows, at)} for name, rows in found.items()}}


def fit(points: list[dict[str, Any]], at: int) -> float:
    """KL at so many bytes, on the line of least squares through its logarithm: one rounding differs from another."""
    sizes, losses = ([point[key] for point in points] for key in ("bytes", "kl"))
    _, start = np.polyfit([size - at for size in sizes], np.log(losses), 1)
    return float(np.exp(start))


def measured(folder: Path, step: float) -> dict[str, Any]:
    """An artifact at a step."""
    recipe, out = f"trellis:{step:.6g}", folder / "steps"
    options = {"recipe": recipe, "overrides": (f"*={recipe}",), "overwrite": True, **reading(FEW_TOKENS)}
    tenpak.compress(shared() / "models" / MODEL, out, **options)
    text = shared() / "data" / "tinystories_eval.txt"
    found = tenpak.evaluate(out, against=shared() / "models" / MODEL, text=text, window=WINDOW).to_json()
    return {key: found[key] for key in ("bytes", "bpw", "kl", "kl_se", "ppl_increase", "ppl_increase_se")}
