"""The tables of docs/codecs.md: recipes of each family of codecs, beside what they should be compared with.

Whole artifacts: the recipe for the matrices of the blocks, embeddings in INT8, every byte counted; the model and texts
are those of ``quality``, with half as much calibration. A recipe that stands in several tables is measured once. What
``entropycoded/1`` saves needs no evaluation: nothing is lost.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quality import WINDOW, cases, compressed, tenpak

TOKENS = 32_768
SMALL, LARGER = "babyllama-tok105-0.94m, stories", "tinystories-3.7m, stories"

_SUM = "mag-lowrank64+vq4x256:magnitude"
# Table → recipes.
ROWS = {
    "lowrank": (
        "plain-lowrank:bpw=4:int4",
        "lowrank:bpw=4:fp16",
        "lowrank:bpw=4",
        "lowrank:bpw=4:norm",
        "lowrank:bpw=4:int4",
        "gptq-int2:g64:search",
        "plain-lowrank4+gptq-int2:g128:search",
        "lowrank4+gptq-int2:g128:search",
        "lowrank4+gptq-int2:g128:search~10",
        "lowrank8:int4+gptq-int2:g128:search~10",
        "gptq-int2:g32:search",
        "lowrank8+gptq-int2:g128:search",
        "lowrank8+gptq-int2:g128:search~3",
        "lowrank8+gptq-int2:g128:search~10",
        "gptq-int3:g128:search",
        "gptq-int3:g32:search",
    ),
    "sparsehalf": (
        "sparse24-int4:g32",
        "sparse24-wanda-int4:g32",
        "sparse24-gptq-int4:g32",
        "gptq-int2:g32",
        "gptq-int3:g128",
    ),
    "sparse": (
        _SUM,
        f"{_SUM}+sparse5%-int8:row",
        f"{_SUM}+sparse5%-wanda-int8:row",
        f"{_SUM}+sparse25%-int4:g32",
        f"{_SUM}+sparse25%-wanda-int4:g32",
        f"{_SUM}+int2:g128:search",
        f"{_SUM}+int2:g64:search",
        f"{_SUM}+sparse25%-int8:row",
    ),
    "pattern": (
        "pattern4x0",
        "pattern4x0:terms=4",
        "pattern4x224:terms=2",
        "pattern2x248",
        "int3:g32",
        "pattern4x0+int3:g32",
        "int4:g32",
    ),
    "shared": (
        "gptq-vq8x4096:shared",
        "gptq-vq8x256",
        "gptq-vq8x256:row",
        "gptq-vq8x256:shared",
        "gptq-vq4x256",
        "gptq-vq4x256:shared",
        "gptq-vq4x1024:shared",
    ),
}
# Of both models: codebooks weigh less in the larger one.
BOTH = {
    "vector": (
        "vq4x256",
        "gptq-vq4x256",
        "gptq-vq2x16:row",
        "gptq-int2:g128",
        "gptq-int2:g32",
        "gptq-int2:g32:search:sweeps=2",
        "gptq-vq2x64:row",
        "gptq-int3:g128",
        "gptq-int3:g128:search:sweeps=2",
        "gptq-vq2x256:row",
        "gptq-int4:g128",
    ),
    "additive": (
        "aq2x4x16",
        "gptq-vq4x256",
        "aq2x8x256",
        "aq2x4x64",
        "gptq-vq2x64:row",
        "aq4x8x64",
    ),
}
TABLES = {**ROWS, **BOTH}
CODED = ("int2:g32", "int3:g32", "int4:g32", "int4:g128:sym", "nf4:g64", "int8:row", "bf16", "gptq-int4:g32")


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each model."""
    found: dict[str, dict[str, Any]] = {}
    coded: dict[str, dict[str, Any]] = {}
    here = cases()
    for case, tables in ((SMALL, TABLES), (LARGER, BOTH)):
        if case not in here:
            sys.exit(f"families: {case} needs the shared models and texts")
        recipes = list(dict.fromkeys(recipe for rows in tables.values() for recipe in rows))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            rows = pool.map(lambda recipe, paths=here[case]: measure(recipe, *paths), recipes)
            found[case] = dict(zip(recipes, rows, strict=True))
            saved = pool.map(lambda recipe, paths=here[case]: savings(recipe, *paths[:2]), CODED)
            coded[case] = dict(zip(CODED, saved, strict=True))
        yield {
            "window": WINDOW,
            "calibration_tokens": TOKENS,
            "tables": TABLES,
            "models": found,
            "coded": coded,
        }


def measure(recipe: str, model: Path, calibration: Path, text: Path) -> dict[str, Any]:
    """A recipe on a model: compressed and evaluated, each in a process of its own."""
    _, found = compressed(model, ("--recipe", recipe), calibration, text, TOKENS)
    print(f"{model.name}: {recipe}: {found['bpw']:.3f} bpw, KL {found['kl']:.5f}", file=sys.stderr)
    return {name: found[name] for name in ("bytes", "bpw", "kl", "kl_se", "ppl_increase", "ppl_increase_se")}


def savings(recipe: str, model: Path, calibration: Path) -> dict[str, float]:
    """Bits per weight, plain and entropy-coded: of all matrices, of those of the blocks where text is read."""
    blocks = recipe.startswith("gptq-")
    read = ("--calibration", calibration, "--calibration-tokens", str(TOKENS), "--calibration-window", str(WINDOW))
    bits = {}
    for prefix in ("", "ec-"):
        more = read if blocks else ("--set", f"*={prefix}{recipe}")
        with tempfile.TemporaryDirectory(prefix="tenpak-benchmark-") as folder:
            out = Path(folder) / "artifact"
            tenpak("compress", model, "-o", out, "--recipe", prefix + recipe, *more, "--evaluation", "none")
            weights = tenpak("inspect", out)["weights"]
        counted = [entry for name, entry in weights.items() if not blocks or ".layers." in name]
        bits[prefix] = sum(w["bits"] for w in counted) / sum(math.prod(w["shape"]) for w in counted)
    print(f"{model.name}: {recipe}: {bits['']:.3f} bits, coded {bits['ec-']:.3f}", file=sys.stderr)
    return {"bits": bits[""], "coded": bits["ec-"]}
