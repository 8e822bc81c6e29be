"""Bars of rounding with feedback: KL at the same bytes, to nearest, with GPTQ, and with propagation on top.

Models with texts of their kind; 65,536 tokens of calibration. Needs the shared models and texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from quality import BUNDLED, TOKENS, WINDOW, cases, measure

ROWS = {
    f"{way}, int{bits}": (f"{prefix}int{bits}:g32", options)
    for bits in (4, 3)
    for way, prefix, options in (
        ("nearest", "", ()),
        ("gptq", "gptq-", ("--propagation", "none")),
        ("gptq and propagation", "gptq-", ()),
    )
}


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each model."""
    results = {}
    for case, paths in cases().items():
        if case == BUNDLED:
            continue
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda row, paths=paths: measure(*row, *paths), ROWS.values())
            results[case] = dict(zip(ROWS, found, strict=True))
        yield {"window": WINDOW, "calibration_tokens": TOKENS, "cases": results}
