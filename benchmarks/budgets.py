"""Models at budgets: ratios, and the bytes that GPTQ takes; texts, tokens and windows are those of ``quality``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quality import BUNDLED, TOKENS, WINDOW, cases, compressed, shared, wanted

BUDGETS = ("10x", "12x")
RIVALS = ("gptq-int4:g32", "gptq-int3:g32")  # embeddings int8
WAYS = {"propagation": (), "no propagation": ("--propagation", "none")}


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each artifact."""
    result: dict[str, Any] = {"window": WINDOW, "calibration_tokens": TOKENS, "models": {}}
    tasks = [task for task in runs() if wanted(task[1])]
    # One command at a time per core, one thread each.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda task: measure(*task[2:]), tasks)
        for (case, name, *_), measured in zip(tasks, found, strict=True):
            result["models"].setdefault(case, {})[name] = measured
            yield result


def runs() -> Iterator[tuple[str, str, tuple[str, ...], Path, Path, Path]]:
    """Case, name of the row, options, model, text to calibrate on, text to measure on."""
    web = shared() / "data" / "calibration_c4.txt"
    for case, (model, calibration, text) in cases().items():
        for budget in BUDGETS:
            yield case, budget, ("--target", budget), model, calibration, text
        if case != BUNDLED:
            yield case, "10x, not tuned", ("--target", "10x", "--tune", "0"), model, calibration, text
        if web.is_file() and case != BUNDLED:
            yield case, "10x, calibrated on web text", ("--target", "10x"), model, web, text


def run_rivals() -> dict[str, Any]:
    """GPTQ, with later blocks corrected for earlier ones and without, and its bytes as a budget, without tuning."""
    chosen = {case: paths for case, paths in cases().items() if case != BUNDLED}
    tasks = [(case, rival) for case in chosen for rival in RIVALS]

    def against(task: tuple[str, str]) -> dict[str, Any]:
        paths = chosen[task[0]]
        found = {name: measure(("--recipe", task[1], *more), *paths) for name, more in WAYS.items()}
        budget = f"{found['propagation']['bytes']}B"
        return {**found, "trellis": measure(("--max-bytes", budget, "--tune", "0"), *paths)}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(against, tasks))
    models: dict[str, Any] = {}
    for (case, rival), row in zip(tasks, rows, strict=True):
        models.setdefault(case, {})[rival] = row
    return {"window": WINDOW, "calibration_tokens": TOKENS, "models": models}


def measure(options: tuple[str, ...], model: Path, calibration: Path, text: Path) -> dict[str, Any]:
    """Compress and evaluate, each in a process of its own."""
    report, found = compressed(model, options, calibration, text)
    print(f"{model.name}: {' '.join(options)}: {found['ratio_fp32']:.3f}x, KL {found['kl']:.5f}", file=sys.stderr)
    kept = {key: report[key] for key in ("recipe", "search", "seconds", "codecs")}
    kept |= {"tuning": report["calibration"].get("tuning")}
    return {**kept, "calibration": calibration.name, **found}
