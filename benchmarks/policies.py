"""What policies cost on a small model, beside what else their bytes buy; and what suits MLPs, which low rank breaks.

    python benchmarks/run.py policies

Low rank is measured a part at a time with everything else dense, each beside INT4 of the same matrices; tables of whole
models beside the default recipe; codecs of the MLPs alone at about the same bytes. Needs the shared models and texts.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from budgets import measure
from quality import TOKENS, WINDOW, shared, tenpak

MODEL = "babyllama-tok105-0.94m"
# Its keys are 64 × 128: a quarter of what rank there is, and half in boundary blocks.
RANK, MIN_DIM = 16, 64

DENSE = ("--recipe", "dense")
ROUNDED = {"K": ("k_proj",), "Q and V": ("q_proj", "v_proj"), "O": ("o_proj",), "MLP": ("mlp.*",)}
PARTS = {"k-proj": "K", "q-v": "Q and V", "out-proj": "O", "mlp": "MLP"}

INT8 = {"id": "uniform/1", "bits": 8, "group": None, "symmetric": True}
INT4 = {"id": "uniform/1", "bits": 4, "group": 32}
ON_MLP = {
    "low rank, plain, factors INT8": {"id": "lowrank/1", "bpw": 3.2, "kind": "plain", "factor": INT8},
    "low rank, whitened, factors INT8": {"id": "lowrank/1", "bpw": 3.2, "factor": INT8},
    "2:4 of INT4, magnitude": {"id": "sparse24/1", "values": INT4},
    "2:4 of INT4, SparseGPT": {"id": "sparse24/1", "values": INT4, "importance": "sparsegpt"},
    "vectors of 2, 64 entries, k-means": {"id": "vector/1", "dimension": 2, "entries": 64, "scaled": True},
    "vectors of 2, 64 entries, feedback": {
        "id": "vector/1", "dimension": 2, "entries": 64, "scaled": True, "weighting": "calibrated",
    },
    "`int3:g128`": "int3:g128",
    "`gptq-int3:g128`": "gptq-int3:g128",
    "`gptq-int3:g128:search:sweeps=2`": "gptq-int3:g128:search:sweeps=2",
}  # fmt: skip
OTHERS_DENSE = ("--set", "self_attn.*=dense", "--set", "embed_tokens=dense")


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each table."""
    model, texts = shared() / "models" / MODEL, shared() / "data"
    read = model, texts / "tinystories_train.txt", texts / "tinystories_eval.txt"
    result: dict[str, Any] = {"model": MODEL, "window": WINDOW, "calibration_tokens": TOKENS, "rank": RANK}
    with tempfile.TemporaryDirectory(prefix="tenpak-policies-") as folder:
        known = Path(folder) / "statistics"
        options = ("--calibration", read[1], "--calibration-tokens", str(TOKENS), "--calibration-window", str(WINDOW))
        tenpak("calibrate", model, "-o", known, *options)
        for name, rows in (("parts", parts()), ("whole", whole(known)), ("mlp", mlp())):
            # One command at a time per core, one thread each.
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                found = list(pool.map(lambda options: measure(options, *read), rows.values()))
            result[name] = dict(zip(rows, found, strict=True))
            if name != "parts":
                result[name] |= _by_budget(name, result[name], read)
            yield result


def parts() -> dict[str, tuple[str, ...]]:
    """Low rank of one part at a time, and INT4 of the same matrices."""
    low = ("--rank", str(RANK), "--min-dim", str(MIN_DIM))
    rows = {}
    for policy, part in PARTS.items():
        rows |= {f"`{name}`": ("--policy", name, *low) for name in (policy, f"{policy}-whitened")}
        rows[f"{part} in `int4:g32`"] = (*DENSE, *(w for p in ROUNDED[part] for w in ("--set", f"{p}=int4:g32")))
    return rows


def whole(known: Path) -> dict[str, tuple[str, ...]]:
    """Policies for whole models, rounded to nearest and with feedback."""
    rows = {}
    for recipe in ("int4:g32", "gptq-int4:g32"):
        rows[f"`{recipe}`"] = ("--recipe", recipe)
        for name in ("mixed", "buckets", "buckets-fisher"):
            row = ("--recipe", recipe, "--policy", name)
            rows[f"`{name}` of `{recipe}`"] = (*row, "--statistics", str(known)) if name == "buckets-fisher" else row
    return rows


def mlp() -> dict[str, tuple[str, ...]]:
    """Codecs of the MLPs at about 3.2 bits per weight, the rest dense."""
    recipes = {row: codec if isinstance(codec, str) else json.dumps(codec) for row, codec in ON_MLP.items()}
    return {row: (*DENSE, "--set", f"mlp.*={recipe}") for row, recipe in recipes.items()}


def _by_budget(name: str, rows: dict[str, Any], read: tuple[Path, Path, Path]) -> dict[str, Any]:
    """The flagship codec at the bytes of a row, without tuning."""
    rival = {"whole": "`mixed` of `gptq-int4:g32`", "mlp": "2:4 of INT4, SparseGPT"}[name]
    budget = ("--max-bytes", f"{rows[rival]['bytes']}B", "--tune", "0")
    return {f"budget, at the bytes of {rival}": measure((*budget, *(OTHERS_DENSE if name == "mlp" else ())), *read)}
