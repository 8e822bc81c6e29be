"""Standard errors by bootstrap over windows.

Every figure here is a function of per-window sums: a perplexity is exp(Σ nll / Σ tokens), a mean is Σ value / Σ tokens.
Tokens of one window are dependent, windows nearly independent, so windows are what is drawn: R times n windows of n
with replacement, the figure recomputed each time, its standard deviation over the R draws being the standard error.
Figures of two models use the same draws, hence are *paired*: what both models find hard cancels in the difference, so
an increase of 0.5 % can be told from zero on a text whose perplexity itself is known to 2 %.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap"]

Array = NDArray[np.float64]

_DRAWS_AT_ONCE = 64  # bounds the table of draws to 64 x windows


def bootstrap(
    sums: Mapping[str, Array],
    figures: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float | None]:
    """Standard errors of figures that are functions of sums over windows.

    Args:
        sums: per quantity its sum within each window, float64 ``[windows]``, all of one length.
        figures: takes the quantities' totals, float64 ``[draws]`` each, and gives the figures, ``[draws]`` each.
        resamples: number of draws, at least 2.
        seed: of the draws.

    Returns:
        The standard error of each figure; None where fewer than two windows leave it unknown.
    """
    names = list(sums)
    table = np.stack([sums[name] for name in names], axis=1)
    count = len(table)
    if count < 2:
        return dict.fromkeys(figures({name: table[:, i] for i, name in enumerate(names)}))
    generator = np.random.default_rng(seed)
    draws: dict[str, list[Array]] = {}
    for begin in range(0, resamples, _DRAWS_AT_ONCE):
        picks = generator.multinomial(count, np.full(count, 1 / count), size=min(_DRAWS_AT_ONCE, resamples - begin))
        totals = picks.astype(np.float64) @ table
        for figure, values in figures({name: totals[:, i] for i, name in enumerate(names)}).items():
            draws.setdefault(figure, []).append(values)
    return {figure: float(np.std(np.concatenate(values), ddof=1)) for figure, values in draws.items()}
