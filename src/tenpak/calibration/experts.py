"""Statistics of experts: each has its own, and one that saw too few tokens those of its whole layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from tenpak.calibration.sums import Key
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Statistics

__all__ = ["experts", "pooled", "rows_before"]


def experts(
    get: Callable[[Key], Statistics | None], weight: Weight, matrices: Sequence[int], *, rows_before: int = 0
) -> tuple[Statistics | None, ...]:
    """Statistics of the experts in a tensor; one that saw too few tokens takes the means over its layer's experts.

    Args:
        get: statistics of one matrix of a parameter.
        weight: the tensor: a stack of experts, or (``slot``) a part of the rows of one.
        matrices: the experts that saw any token.
        rows_before: rows of the expert's matrix in tensors before this one.
    """
    wanted = range(weight.matrices) if weight.slot is None else [weight.slot[0]]
    found = []
    shared: Statistics | None = None
    for expert in wanted:
        own = get((weight.parameter, expert))
        tokens = 0 if own is None else own.count or 0
        if tokens < weight.matrix_shape[1]:
            if shared is None and matrices:
                shared = pooled([s for m in matrices if (s := get((weight.parameter, m))) is not None])
            own = None if shared is None else replace(shared, count=tokens)
        if own is not None and weight.slot is not None and own.output_curvature is not None:
            rows = slice(rows_before, rows_before + weight.matrix_shape[0])
            own = replace(own, output_curvature=own.output_curvature[rows])
        found.append(own)
    return tuple(found)


def rows_before(weights: Sequence[Weight]) -> dict[str, int]:
    """Tensors that are a part of an expert's rows → rows in the parts before it."""
    found: dict[str, int] = {}
    rows: dict[Key, int] = {}
    for weight in sorted((w for w in weights if w.slot is not None), key=lambda w: w.slot or (0, 0)):
        key = weight.parameter, (weight.slot or (0, 0))[0]
        found[weight.name] = rows.get(key, 0)
        rows[key] = found[weight.name] + weight.matrix_shape[0]
    return found


def pooled(statistics: Sequence[Statistics]) -> Statistics | None:
    """The statistics of all these inputs together; None where there are none."""
    total = sum(s.count or 0 for s in statistics)
    if not total:
        return None

    def mean(name: str) -> Tensor | None:
        values = [(s.count or 0, getattr(s, name)) for s in statistics]
        if any(value is None for _, value in values):
            return None
        summed: Tensor = sum(value.double() * (count / total) for count, value in values)
        return summed.float()

    names = ("hessian", "mean", "mean_abs", "output_curvature")
    return Statistics(count=total, **{name: mean(name) for name in names})
