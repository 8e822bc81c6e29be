"""Presets on the models at hand: bytes, ratio, perplexity, KL, measured on the artifact in a fresh process.

The bundled model is measured with every preset on its own evaluation text; where the shared models and texts are there
too, they are measured with a few. Windows of 256 tokens, which is what these models were trained on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from environment import ROOT

from tenpak.recipes import PRESETS

WINDOW = 256
TOKENS = 65_536  # of the calibration text
BUNDLED = "tinystories-3.7m, own text"  # a short text
REFERENCE = "ref-8m, WikiText-2"
# Beyond the presets: what rounding with feedback does at the same bytes, and what propagation adds to it.
CALIBRATED = {
    "int4-g32, gptq": ("gptq-int4:g32", ()),
    "int4-g32, gptq, no propagation": ("gptq-int4:g32", ("--propagation", "none")),
    "int4-g32, gptq, search, sweeps": ("gptq-int4:g32:search:sweeps=2", ()),
    "int3-g32, gptq": ("gptq-int3:g32", ()),
    "int3-g32, gptq, no propagation": ("gptq-int3:g32", ("--propagation", "none")),
    "int3-g32, gptq, search, sweeps": ("gptq-int3:g32:search:sweeps=2", ()),
}
# What the models that do not ship with the project are measured with.
FEW = ("int4-g32", "int3-g32", *CALIBRATED)


_only: str | None = None
_row: str | None = None


def only(words: str | None, row: str | None = None) -> None:
    """Leave out the cases, and rows, whose names do not hold these words; None for all."""
    global _only, _row
    _only, _row = words, row


def limited() -> bool:
    """Whether only some cases are wanted."""
    return _only is not None


def selected(case: str) -> bool:
    """Whether a case is to be measured."""
    return _only is None or _only in case


def wanted(row: str) -> bool:
    """Whether a row is to be measured."""
    return _row is None or _row in row


def shared() -> Path:
    """The folder of models and texts that are not part of the repository."""
    return Path(os.environ.get("TENPAK_SHARED", ROOT.parent / "shared"))


def cases() -> dict[str, tuple[Path, Path, Path]]:
    """Model name → its folder, the text to calibrate on and the text to measure on."""
    bundled = ROOT / "models" / "tinystories-3.7m"
    own = bundled / "texts"
    found = {BUNDLED: (bundled, own / "calibration.txt", own / "evaluation.txt")}
    stories = shared() / "data" / "tinystories_train.txt", shared() / "data" / "tinystories_eval.txt"
    if all(path.is_file() for path in stories):
        for name in ("babyllama-tok105-0.94m", "stories260k"):
            if (shared() / "models" / name).is_dir():
                found[f"{name}, stories"] = (shared() / "models" / name, *stories)
        found["tinystories-3.7m, stories"] = (bundled, *stories)
    else:
        print(f"no shared models and texts at {shared()}: only the bundled model is measured", file=sys.stderr)
    reference, wiki = ROOT / "models" / "ref-8m", shared() / "data" / "wikitext2_test.raw.txt"
    if reference.is_dir() and wiki.is_file():
        found[REFERENCE] = reference, reference / "texts" / "calibration.txt", wiki
    return {name: paths for name, paths in found.items() if selected(name)}


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each case: a run that is stopped has measured something."""
    results: dict[str, dict[str, Any]] = {}
    recipes = {**{name: (preset.recipe, ()) for name, preset in PRESETS.items()}, **CALIBRATED}
    for case, paths in cases().items():
        chosen = recipes if case == BUNDLED else {name: recipes[name] for name in FEW}
        # One command at a time per core, one thread each: most of a command is starting.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = pool.map(lambda row, paths=paths: measure(*row, *paths), chosen.values())
            results[case] = dict(zip(chosen, found, strict=True))
        yield {"window": WINDOW, "calibration_tokens": TOKENS, "cases": results}


def measure(recipe: str, options: tuple[str, ...], model: Path, calibration: Path, text: Path) -> dict[str, Any]:
    """Compress and evaluate, each in a process of its own."""
    _, found = compressed(model, ("--recipe", recipe, *options), calibration, text)
    print(f"{model.name}: {recipe}: {found['bpw']:.3f} bpw, KL {found['kl']:.5f}", file=sys.stderr)
    return {"recipe": recipe, "options": list(options), **found}


@cache  # several benchmarks of one run ask for the same
def compressed(
    model: Path, options: tuple[str, ...], calibration: Path | None, text: Path, tokens: int = TOKENS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model compressed and evaluated, each in a process of its own: report and evaluation.

    Args:
        model: its folder.
        options: of `tenpak compress`.
        calibration: text to calibrate on, None for none.
        text: what to measure on.
        tokens: of the calibration text.
    """
    read = ["--calibration-tokens", str(tokens), "--calibration-window", str(WINDOW)]
    read += [] if calibration is None else ["--calibration", str(calibration)]
    with tempfile.TemporaryDirectory(prefix="tenpak-benchmark-") as folder:
        out = Path(folder) / "artifact"
        report = tenpak("compress", model, "-o", out, *options, *read, "--evaluation", "none")
        return report, tenpak("evaluate", out, "--against", model, "--text", text, "--window", str(WINDOW))


def tenpak(*arguments: str | Path) -> dict[str, Any]:
    """One command in a fresh process, its JSON."""
    command = [sys.executable, "-m", "tenpak", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)
