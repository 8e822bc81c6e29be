"""What policies cost on a small model, beside what else their bytes buy; and what suits MLPs, which low rank breaks.

    python benchmarks/run.py policies

Low rank is measured a part at a time with everything else dense, each beside INT4 of the same matrices; tables of whole
models beside the default recipe; codecs of the MLPs alone at about the same bytes. All in one process, from the files
that were written: there are many rows, and starting would be most of each. Needs the shared models and texts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality import WINDOW, shared

import tenpak
from tenpak.policies import Policy

TOKENS = 32_768  # of the text to calibrate on
CHARACTERS = 30_000  # of the text to measure on
MODEL = "babyllama-tok105-0.94m"
# Its keys are 64 × 128: a quarter of what rank there is, and half in boundary blocks.
RANK, MIN_DIM = 16, 64

ROUNDED = {"K": ("k_proj",), "Q and V": ("q_proj", "v_proj"), "O": ("o_proj",), "MLP": ("mlp.*",)}
PARTS = {"k-proj": "K", "q-v": "Q and V", "out-proj": "O", "mlp": "MLP"}

INT8 = {"id": "uniform/1", "bits": 8, "group": None, "symmetric": True}
INT4 = {"id": "uniform/1", "bits": 4, "group": 32}
ON_MLP = {
    "low rank, plain, factors INT8": {"id": "lowrank/1", "bpw": 3.2, "kind": "plain", "factor": INT8},
    "low rank, whitened, factors INT8": {"id": "lowrank/1", "bpw": 3.2, "factor": INT8},
    "2:4 of INT4, SparseGPT": {"id": "sparse24/1", "values": INT4, "importance": "sparsegpt"},
    "vectors of 2, 64 entries, feedback": {
        "id": "vector/1", "dimension": 2, "entries": 64, "scaled": True, "weighting": "calibrated",
    },
    "`trellis:0.00065`": "trellis:0.00065",
    "`int3:g128`": "int3:g128",
    "`gptq-int3:g128`": "gptq-int3:g128",
}  # fmt: skip
Row = dict[str, Any]
"""Arguments of ``tenpak.compress``."""


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each table."""
    model, texts = shared() / "models" / MODEL, shared() / "data"
    result: dict[str, Any] = {"model": MODEL, "window": WINDOW, "calibration_tokens": TOKENS, "rank": RANK}
    with tempfile.TemporaryDirectory(prefix="tenpak-policies-") as folder:
        known, text = Path(folder) / "statistics", Path(folder) / "evaluation.txt"
        text.write_text((texts / "tinystories_eval.txt").read_text()[:CHARACTERS])
        read = model, texts / "tinystories_train.txt", text
        tenpak.calibrate(model, known, calibration=read[1], tokens=TOKENS, window=WINDOW)
        for name, rows in (("parts", parts()), ("whole", whole(known)), ("mlp", mlp())):
            result[name] = {}
            for row, options in rows.items():
                found = result[name][row] = measure(options, *read)
                print(f"{name}: {row}: {found['bytes']:,} bytes, KL {found['kl']:.5f}", file=sys.stderr)
                yield result


def parts() -> dict[str, Row]:
    """Low rank of one part at a time, and INT4 of the same matrices."""
    rows: dict[str, Row] = {}
    for policy, part in PARTS.items():
        rows |= {f"`{name}`": {"policy": Policy(name, RANK, MIN_DIM)} for name in (policy, f"{policy}-whitened")}
        overrides = tuple(f"{pattern}=int4:g32" for pattern in ROUNDED[part])
        rows[f"{part} in `int4:g32`"] = {"recipe": "dense", "overrides": overrides}
    return rows


def whole(known: Path) -> dict[str, Row]:
    """Policies for whole models, rounded to nearest and with feedback."""
    rows: dict[str, Row] = {}
    for recipe in ("int4:g32", "gptq-int4:g32"):
        rows[f"`{recipe}`"] = {"recipe": recipe}
        for name in ("mixed", "buckets", "buckets-fisher"):
            more = {"statistics": known} if name == "buckets-fisher" else {}
            rows[f"`{name}` of `{recipe}`"] = {"recipe": recipe, "policy": name, **more}
    return rows


def mlp() -> dict[str, Row]:
    """Codecs of the MLPs at about 3.2 bits per weight, the rest dense."""
    recipes = {row: codec if isinstance(codec, str) else json.dumps(codec) for row, codec in ON_MLP.items()}
    return {row: {"recipe": "dense", "overrides": (f"mlp.*={recipe}",)} for row, recipe in recipes.items()}


def measure(options: Row, model: Path, calibration: Path, text: Path) -> dict[str, Any]:
    """Compress, and evaluate what was written."""
    with tempfile.TemporaryDirectory(prefix="tenpak-policy-") as folder:
        out = Path(folder) / "artifact"
        read = {"calibration": calibration, "calibration_tokens": TOKENS, "calibration_window": WINDOW}
        report = tenpak.compress(model, out, **options, **read)
        found = tenpak.evaluate(out, against=str(model), text=text, window=WINDOW).to_json()
    return {"recipe": report.recipe, "seconds": report.seconds, "codecs": dict(report.codecs), **found}
