"""What each part of calibration is worth: KL of one recipe on a real model, one thing changed at a time.

    python benchmarks/run.py ablation

Each row is a `tenpak compress` and a `tenpak evaluate` in processes of their own. The text that is measured on is never
the one that is read. Needs the shared models and texts.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from quality import WINDOW, compressed, shared, tenpak
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BITS = 3
TOKENS = 65_536

# Row → recipe, options of compress; "" is the base that the others are compared with.
NEAREST = f"int{BITS}:g32"
GPTQ = f"gptq-int{BITS}:g32"
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "round to nearest": (NEAREST, ()),
    "gptq, propagation original (the default)": (GPTQ, ()),
    "propagation own": (GPTQ, ("--propagation", "own")),
    "propagation none": (GPTQ, ("--propagation", "none")),
    "order by activation": (f"{GPTQ}:actorder", ()),
    "damping 0.001": (f"{GPTQ}:damp=0.001", ()),
    "damping 0.1": (f"{GPTQ}:damp=0.1", ()),
    "2 sweeps of coordinate descent": (f"{GPTQ}:sweeps=2", ()),
    "search for scales": (f"{GPTQ}:search", ()),
    "search and 2 sweeps": (f"{GPTQ}:search:sweeps=2", ()),
    "AWQ scaling, nearest": (f"awq-{NEAREST}", ()),
    "AWQ scaling, exponent 0.5, nearest": (f"awq-{NEAREST}:exp=0.5", ()),
    "AWQ scaling, gptq": (f"awq-{GPTQ}", ()),
    "rotation, nearest": (f"spin-{NEAREST}", ()),
    "rotation, gptq": (f"spin-{GPTQ}", ()),
    "2,048 tokens": (GPTQ, ("--calibration-tokens", "2048")),
    "8,192 tokens": (GPTQ, ("--calibration-tokens", "8192")),
    "32,768 tokens": (GPTQ, ("--calibration-tokens", "32768")),
    "131,072 tokens": (GPTQ, ("--calibration-tokens", "131072")),
    "262,144 tokens": (GPTQ, ("--calibration-tokens", "262144")),
    "learned levels, curvature measured": (f"gptq-nf{BITS}:g32:learned", ("--statistics", "full")),
    "learned levels, curvature guessed": (f"gptq-nf{BITS}:g32:learned", ("--statistics", "fast")),
    "propagation none, diagonal of the Hessian only": (GPTQ, ("--statistics", "diagonal")),
    "text of another domain": (GPTQ, ("--calibration", "wikitext2_valid.raw.txt")),
}

MODELS = {"babyllama-tok105-0.94m": tuple(ROWS)}


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each model."""
    results: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        model, texts = shared() / "models" / name, shared() / "data"
        with tempfile.TemporaryDirectory(prefix="tenpak-ablation-") as folder:
            seconds = collect(model, texts / "tinystories_train.txt", Path(folder))
            with ThreadPoolExecutor(2) as pool:
                rows = [pool.submit(measure, row, *ROWS[row], model, Path(folder)) for row in MODELS[name]]
                found = {row: future.result() for row, future in zip(MODELS[name], rows, strict=True)}
        results[name] = {"rows": found, "calibrate_seconds": seconds}
        yield {"window": WINDOW, "tokens": TOKENS, "models": results}


def collect(model: Path, text: Path, folder: Path) -> dict[str, float]:
    """Statistics by both methods, and a copy of which only the Hessian's diagonal is left; seconds of each method."""
    read = ("--calibration", text, "--calibration-tokens", TOKENS, "--calibration-window", WINDOW)
    seconds = {}
    for method, flags in (("full", ()), ("fast", ("--fast",))):
        times = []
        for _ in range(3):
            found = tenpak("calibrate", model, "-o", folder / method, *map(str, read), *flags, "--overwrite")
            times.append(found["seconds"])
        seconds[method] = sorted(times)[1]
    keep_diagonal(folder)
    return seconds


def keep_diagonal(folder: Path) -> None:
    """Copy the statistics in ``full`` to ``diagonal``, with only the diagonals of Hessians left."""
    shutil.copytree(folder / "full", folder / "diagonal")
    for path in (folder / "diagonal").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {
            name: torch.diag(value.diagonal()) if name.endswith(".hessian") else value
            for name, value in load_file(path).items()
        }
        save_file(tensors, path, metadata)


def measure(row: str, recipe: str, options: tuple[str, ...], model: Path, folder: Path) -> dict[str, Any]:
    """KL of a row."""
    given = dict(zip(options[::2], options[1::2], strict=True))
    texts = shared() / "data"
    calibration: Path | None = texts / given.pop("--calibration", "tinystories_train.txt")
    tokens = int(given.pop("--calibration-tokens", TOKENS))
    if "--statistics" in given:
        if given["--statistics"] == "diagonal":
            calibration = None  # with a text its blocks would be followed
        given["--statistics"] = str(folder / given["--statistics"])
    command = ("--recipe", recipe, *(word for item in given.items() for word in item))
    _, found = compressed(model, command, calibration, texts / "tinystories_eval.txt", tokens)
    print(f"{model.name}: {row}: KL {found['kl']:.5f}", file=sys.stderr)
    keys = ("kl", "kl_se", "ppl_increase", "ppl_increase_se", "bpw", "bytes")
    return {"recipe": recipe, **json.loads(json.dumps({key: found[key] for key in keys}))}
