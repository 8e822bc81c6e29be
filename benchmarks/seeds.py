"""The tables of the systems that tenpak grew out of, rerun: every codec and claim, with all bytes counted.

    python benchmarks/run.py seeds            or: make bench-seeds [MODELS="FOLDER …"]

Each row is a claim of one of those systems, a recipe that does what it describes, and what that costs here: ratio to
FP32 (whole weight files, embeddings and all), perplexity, KL, seconds. Where a system says nothing about embeddings
they are INT8. The verdict is a rule, not an opinion: a claim is *confirmed* where on every model the ratio reaches nine
tenths of the claimed one and perplexity grows by at most twice what was claimed plus half a per cent; *refuted* where
on none; it *depends* otherwise. Claims are of models a thousand times larger, on another text: small models lose more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import RESULTS
from findings import key
from quality import WINDOW, cases, compressed, limited, wanted

TOKENS = 32_768
SLACK_RATIO, SLACK_LOSS, SLACK_POINT = 0.9, 2.0, 0.005


@dataclass(frozen=True)
class Row:
    """A claim.

    Attributes:
        system: where it comes from: A, PIXEL; B, the SVD and INT8 compressor; C, the first Tenpak.
        name: what it calls the method.
        options: of `tenpak compress`.
        ratio: claimed, to FP32; None where nothing was claimed.
        loss: claimed relative increase of perplexity, or None.
        why: what explains the figures, in a sentence.
    """

    system: str
    name: str
    options: tuple[str, ...]
    ratio: float | None
    loss: float | None
    why: str

    @property
    def key(self) -> str:
        """Under what its figures are kept."""
        return key(self.name, self.options)


def _recipe(recipe: str, *more: str) -> tuple[str, ...]:
    return ("--recipe", recipe, *more)


def _only(pattern: str, recipe: str) -> tuple[str, ...]:
    return ("--recipe", "dense", "--set", f"{pattern}={recipe}")


ROWS = (
    Row(
        "A",
        "patterns alone",
        _recipe("pattern4"),
        1.0,
        0.77,
        "One fixed pattern and a scale for 16 weights cannot follow them; with ratio 8 instead of 1 nothing is left.",
    ),
    Row(
        "A",
        "SVD alone",
        _recipe("plain-lowrank:bpw=6"),
        4.0,
        25.0,
        "Weights have nearly full rank: what a truncation drops is most of what the model says.",
    ),
    Row(
        "A",
        "calibrated SVD",
        _recipe("act-lowrank:bpw=5"),
        5.0,
        2500.0,
        "Weighing columns helps and does not make the rank lower; at equal bytes INT4 loses far less.",
    ),
    Row(
        "A",
        "… in the metric of the output",
        _recipe("lowrank:bpw=5"),
        None,
        None,
        "Whitening is the best that low rank can do, and low rank is still the wrong tool for a whole model.",
    ),
    Row(
        "A",
        "GPTQ-style, 4 bits",
        _recipe("gptq-int4:row"),
        7.87,
        0.38,
        "Loses a fraction of what was claimed; INT8 embeddings keep the ratio of small models down.",
    ),
    Row(
        "B",
        "SVD + INT8, K only",
        _only("*k_proj*", "plain-lowrank64:int8"),
        None,
        None,
        "True and of little use: keys are a few per cent of a model, so is what can be saved.",
    ),
    Row(
        "B",
        "… K, whitened",
        _only("*k_proj*", "lowrank64:int8"),
        None,
        None,
        "A fraction of plain truncation's KL for the same bytes.",
    ),
    Row(
        "B",
        "… MLP down",
        _only("*down_proj*", "plain-lowrank64:int8"),
        None,
        None,
        "MLPs break, as was said: their spectrum is flat.",
    ),
    Row(
        "B",
        "… attention out",
        _only("*o_proj*", "plain-lowrank64:int8"),
        None,
        None,
        "So does the attention's output.",
    ),
    Row(
        "C",
        "INT4 g8",
        _recipe("int4:g8"),
        4.0,
        0.0173,
        "As was said: groups of 8 cost four bits of scales for every weight's four.",
    ),
    Row(
        "C",
        "INT4 g16",
        _recipe("int4:g16"),
        5.33,
        0.0104,
        "Holds for the larger of the two models at most: losses of rounding shrink with size.",
    ),
    Row(
        "C",
        "INT4 g32",
        _recipe("int4:g32"),
        6.4,
        0.0255,
        "As was said, and the fairest of these trades without data.",
    ),
    Row(
        "C",
        "int4_opt",
        _recipe("int4:g16:search"),
        5.33,
        0.0,
        "Searching the scales helps; it does not make rounding free.",
    ),
    Row(
        "C",
        "int4_residual",
        _recipe("int4:g16+int2:g16"),
        3.2,
        0.0025,
        "Near lossless because it is large: six bits and two sets of scales make ten.",
    ),
    Row(
        "C",
        "int4_calibrated",
        _recipe("awq-int4:g16"),
        4.27,
        0.0036,
        "Scaling channels by activations works without more bytes.",
    ),
    Row(
        "C",
        "INT3 g32",
        _recipe("int3:g32"),
        8.0,
        0.21,
        "As bad as was said on the smaller model; embeddings and scales keep the ratio below eight.",
    ),
    Row(
        "C",
        "INT3 g32, with feedback",
        _recipe("gptq-int3:g32"),
        None,
        None,
        "The same bytes, a fraction of the loss: three bits were never the problem, rounding them blindly was.",
    ),
    Row(
        "C",
        "NF4, learned",
        _recipe("nf4:g64:learned"),
        6.0,
        0.14,
        "As was said; INT4 with feedback is better at the same bytes.",
    ),
    Row(
        "C",
        "NF3, learned",
        _recipe("nf3:g64:learned"),
        9.0,
        0.54,
        "Between bad and useless, by the model.",
    ),
    Row(
        "C",
        "spin, g128",
        _recipe("spin-int4:g128"),
        7.1,
        0.2,
        "Rotations spread outliers, of which small models have none.",
    ),
    Row(
        "C",
        "awq-10x, g128",
        _recipe("awq-int4:g128"),
        7.1,
        0.2,
        "Better than was said, and a ratio of seven, not ten.",
    ),
    Row(
        "C",
        "PQ",
        _recipe("vq8x256"),
        31.6,
        56.48,
        "One bit a weight without data loses everything, and codebooks of a small model are not free.",
    ),
    Row(
        "C",
        "PQ with residual",
        _recipe("vq8x256+int4:g32"),
        4.5,
        0.09,
        "Holds: the codebook takes what is large, INT4 the rest, at seven bits.",
    ),
    Row(
        "C",
        "PocketLLM v1",
        _recipe("vq8x256+int4:g32"),
        5.32,
        0.0139,
        "The loss holds; on the smaller model codebooks keep the ratio below what was said.",
    ),
    Row(
        "C",
        "PocketLLM v2",
        _recipe("vq4x256+int4:g16~3"),
        4.0,
        0.0023,
        "Eight bits in all, so it is near lossless.",
    ),
    Row(
        "C",
        "TenPak-X",
        _recipe("mag-lowrank32+vq4x256:magnitude+int4:g32"),
        4.36,
        0.0003,
        "Three stages are nine bits: INT8 of the same size is nearer to the original.",
    ),
    Row(
        "C",
        "… the same bytes, statistics and feedback",
        _recipe("lowrank32+gptq-vq4x256+gptq-int4:g32"),
        None,
        None,
        "What data and feedback are worth to the same recipe.",
    ),
    Row(
        "C",
        "… with statistics and feedback",
        _recipe("lowrank8+gptq-vq4x256+gptq-int2:g32:search"),
        None,
        None,
        "With statistics the stages can be far smaller.",
    ),
    Row(
        "C",
        "TenPak-X v2",
        _recipe("mag-lowrank64+vq4x256:magnitude"),
        5.64,
        0.072,
        "Without the residual, low rank and a codebook are not enough.",
    ),
    Row(
        "C",
        "… v2, the same bytes, statistics and feedback",
        _recipe("lowrank64+gptq-vq4x256"),
        None,
        None,
        "What data and feedback are worth to this one.",
    ),
    Row(
        "C",
        "… v2, a quarter of the residual",
        _recipe("mag-lowrank64+vq4x256:magnitude+sparse25%-int8:row"),
        None,
        None,
        "The largest quarter of what is left costs 2.9 bits a weight; two bits for all of it lose less.",
    ),
    Row(
        "C",
        "… v2, a twentieth of the residual",
        _recipe("mag-lowrank64+vq4x256:magnitude+sparse5%-int8:row"),
        None,
        None,
        "What two stages leave looks like noise, and its largest twentieth is no large part of it.",
    ),
    Row(
        "C",
        "… v2, the twentieth that inputs choose",
        _recipe("mag-lowrank64+vq4x256:magnitude+sparse5%-wanda-int8:row"),
        None,
        None,
        "Weighing what is left by its inputs does what five times as many values chosen by size do.",
    ),
    Row(
        "C",
        "AQLM",
        _recipe("aq2x8x256"),
        None,
        None,
        "Two additive books of this size; a good part of the file is codebooks, which a large model would not notice.",
    ),
    Row(
        "C",
        "… codebooks alone, calibrated",
        _recipe("gptq-vq4x256"),
        None,
        None,
        "Vectors with feedback: two bits and a codebook, and better than three bits rounded to nearest.",
    ),
    Row(
        "C",
        "CALDERA",
        _recipe("lowrank8:int4+gptq-int2:g128:search~5"),
        None,
        None,
        "Low rank pays for itself next to two bits, and only there.",
    ),
    Row(
        "C",
        "2:4 + INT4",
        _recipe("sparse24-int4:g32"),
        14.0,
        None,
        "Half of the weights of a model this small cannot be spared.",
    ),
    Row(
        "C",
        "2:4 + INT4, with feedback",
        _recipe("sparse24-gptq-int4:g32"),
        None,
        None,
        "Compensation saves what can be saved; vectors of all weights are smaller and better.",
    ),
    Row(
        "C",
        "GPTQ",
        _recipe("gptq-int4:g128"),
        None,
        None,
        "The reference point of the field, at about seven times.",
    ),
    Row(
        "",
        "tenpak",
        ("--target", "10x", "--tune", "0"),
        10.0,
        0.01,
        "Ten times, everything counted: entropy-coded trellis quantization with full feedback.",
    ),
)


# Measured on the smallest model as well.
SCALING = (
    "INT4 g32",
    "INT3 g32",
    "INT3 g32, with feedback",
    "GPTQ",
    "TenPak-X",
    "… codebooks alone, calibrated",
    "tenpak",
)


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each model."""
    rows = [row for row in ROWS if wanted(row.name)]
    models: dict[str, Any] = {}
    for case, paths in chosen().items():
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = list(pool.map(lambda row, paths=paths: measure(row, *paths), rows))
        models[case] = {row.key: figures for row, figures in zip(rows, found, strict=True)}
    known = with_others(models) if limited() else models
    result = {"window": WINDOW, "calibration_tokens": TOKENS, "models": models, "claims": claims(known)}
    yield result
    if not limited():
        yield {**result, "scaling": scaling(models)}


def with_others(models: dict[str, Any]) -> dict[str, Any]:
    """What was measured now, with what else is on record."""
    on_record = json.loads((RESULTS / "seeds.json").read_text())["models"]
    return {**on_record, **{case: {**on_record.get(case, {}), **rows} for case, rows in models.items()}}


def scaling(models: dict[str, Any]) -> dict[str, Any]:
    """The same recipes on models of rising size: name → recipe → figures."""
    found = {case: {row.name: rows[row.key] for row in ROWS if row.name in SCALING} for case, rows in models.items()}
    smallest = next((case for case in cases() if case.startswith("stories260k")), None)
    if smallest is None or "MODELS" in os.environ:
        return found
    rows = {row.name: measure(row, *cases()[smallest]) for row in ROWS if row.name in SCALING}
    return {smallest: rows, **found}


def chosen() -> dict[str, tuple[Path, Path, Path]]:
    """The cases: models of the MODELS variable on the texts of stories, otherwise the two larger ones at hand."""
    known = cases()
    given = os.environ.get("MODELS", "").split()
    texts = next((paths[1:] for case, paths in known.items() if case.endswith("stories")), None)
    if given and texts is None:
        sys.exit("seeds: MODELS are measured on the shared texts, which are not there")
    if given and texts is not None:
        return {Path(folder).name: (Path(folder), *texts) for folder in given}
    return {case: paths for case, paths in known.items() if case.startswith(("babyllama", "tinystories-3.7m, stories"))}


def measure(row: Row, model: Path, calibration: Path, text: Path) -> dict[str, Any]:
    """A row on a model: compressed and evaluated, each in a process of its own."""
    report, found = compressed(model, row.options, calibration, text, TOKENS)
    print(f"{model.name}: {row.key}: {found['ratio_fp32']:.2f}x, KL {found['kl']:.5f}", file=sys.stderr)
    names = ("bytes", "bpw", "ratio_fp32", "kl", "kl_se", "ppl_increase", "ppl_increase_se")
    return {**{name: found[name] for name in names}, "seconds": report["seconds"]}


def claims(models: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row with its verdict."""
    return [
        {
            "system": row.system,
            "name": row.name,
            "options": list(row.options),
            "ratio": row.ratio,
            "loss": row.loss,
            "why": row.why,
            "verdict": verdict(row, [found[row.key] for found in models.values()]),
        }
        for row in ROWS
    ]


def verdict(row: Row, found: list[dict[str, Any]]) -> str:
    """What the rule of this page says of a claim."""
    if row.ratio is None and row.loss is None:
        return "no claim"

    def holds(measured: dict[str, Any]) -> bool:
        large = row.ratio is None or measured["ratio_fp32"] >= SLACK_RATIO * row.ratio
        return large and (row.loss is None or measured["ppl_increase"] <= SLACK_LOSS * row.loss + SLACK_POINT)

    held = [holds(measured) for measured in found]
    return "confirmed" if all(held) else "depends" if any(held) else "refuted"
