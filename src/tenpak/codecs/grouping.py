"""Groups of a weight's columns that share a scale, tiles of rows that are encoded together, and column weights.

A group is ``group`` neighbouring weights of one row; a row of ``in`` weights has ``ceil(in / group)`` of them and the
last one is shorter where ``group`` does not divide ``in``. ``group=None``, or a group longer than the row, means one
group per row. ``segments`` describes a row as at most two runs of equally long groups, so that each run is handled as
a dense tensor ``[rows, groups, size]`` without padding.

Tiles bound memory: no FP32 copy of a whole weight is ever made. They depend on the shape only, and every sum over a
group is made in an order that does not depend on the number of threads, so the bytes do not either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.codecs.base import Statistics
from tenpak.errors import CodecError

__all__ = ["Segment", "column_importance", "group_count", "group_sum", "row_importance", "row_tiles", "segments"]

TILE = 1 << 18  # weights per tile: 1 MiB in FP32, which stays in the caches of one core
_SERIAL = 1 << 14  # torch sums so few elements in one thread, hence in one order
_DAMPING = 0.01


@dataclass(frozen=True)
class Segment:
    """A run of ``count`` groups of ``size`` columns each.

    Attributes:
        columns: the columns it covers.
        groups: the groups it covers, as a slice of a row's groups.
        count: number of groups.
        size: columns per group.
    """

    columns: slice
    groups: slice
    count: int
    size: int

    def view(self, block: Tensor) -> Tensor:
        """This segment of ``block`` ``[..., in]`` as a view ``[..., count, size]``."""
        return block[..., self.columns].view(*block.shape[:-1], self.count, self.size)


def group_count(columns: int, group: int | None) -> int:
    """Groups in a row of ``columns`` weights."""
    return 1 if group is None else -(-columns // group)


def segments(columns: int, group: int | None) -> tuple[Segment, ...]:
    """The runs of equally long groups that make up a row of ``columns`` weights."""
    size = columns if group is None else min(group, columns)
    whole, rest = divmod(columns, size)
    runs = [Segment(slice(0, whole * size), slice(0, whole), whole, size)]
    if rest:
        runs.append(Segment(slice(whole * size, columns), slice(whole, whole + 1), 1, rest))
    return tuple(runs)


def row_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold about ``TILE`` weights each (one row where a row is longer)."""
    step = max(1, TILE // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def group_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, kept; the order of additions does not depend on the number of threads."""
    if values.shape[-1] <= _SERIAL:
        return values.sum(-1, keepdim=True)
    # Only a sum to a single element is split among threads, and only above 2^15 elements: sum in smaller parts.
    first, *others = torch.split(values, _SERIAL, -1)
    total = first.sum(-1, keepdim=True)
    for part in others:
        total += part.sum(-1, keepdim=True)
    return total


def column_importance(statistics: Statistics | None, columns: int, device: torch.device) -> Tensor | None:
    """Relative weight of each input column, FP32 ``[in]`` with mean one, or None where nothing is known.

    It is the diagonal of the Hessian plus one percent of its mean: a column that calibration never saw active must
    not lose its weights altogether.

    Raises:
        CodecError: the Hessian is not ``[in, in]``, or its diagonal is negative or not finite.
    """
    hessian = None if statistics is None else statistics.metric
    if hessian is None:
        return None
    if tuple(hessian.shape) != (columns, columns):
        raise CodecError(f"the Hessian is {tuple(hessian.shape)}, the weight has {columns} input columns")
    return _relative(hessian.diagonal(), "diagonal of the Hessian", device)


def row_importance(statistics: Statistics | None, rows: int, device: torch.device) -> Tensor | None:
    """Relative weight of each output row, FP32 ``[out]`` with mean one, or None where nothing is known.

    Raises:
        CodecError: the output curvature is not ``[out]``, negative or not finite.
    """
    curvature = None if statistics is None else statistics.row_weight
    if curvature is None:
        return None
    if tuple(curvature.shape) != (rows,):
        raise CodecError(f"the output curvature is {tuple(curvature.shape)}, the weight has {rows} output rows")
    return _relative(curvature, "output curvature", device)


def _relative(values: Tensor, name: str, device: torch.device) -> Tensor | None:
    values = values.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise CodecError(f"the {name} holds negative, NaN or infinite values", hint="calibrate again")
    mean = values.sum() / values.numel()
    if not float(mean) > 0:
        return None
    return ((values / mean + _DAMPING) / (1 + _DAMPING)).to(device, torch.float32)
