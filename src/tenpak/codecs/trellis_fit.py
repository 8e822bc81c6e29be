"""Classes and shape of tables for ``trellis/1``: those with which its levels take the fewest bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from tenpak.codecs.trellis_stream import CLASSES, SEGMENT, UNIT, Coded
from tenpak.kernels import core
from tenpak.kernels.parallel import each, one_thread

__all__ = ["fitted", "histogram", "lengths", "shaped"]

_SYMBOLS = 128
_REACH = 62
_TILE = 1 << 16  # values whose squares are held at a time


@cache
def _shifts() -> Tensor:
    """How many low bits of k are coded uniformly, by class."""
    return ((torch.arange(CLASSES) - UNIT) // 4 - 4).clamp(0)


@cache
def _densities() -> tuple[Tensor, Tensor, Tensor]:
    """Normal densities of all classes at a table's levels, their mixtures' wide part, and k → symbol by class."""
    symbol = torch.arange(_REACH + 1, dtype=torch.float64)
    cls, shift = torch.arange(CLASSES), _shifts()
    plain = torch.stack([2 * symbol, 2 * symbol - (symbol > 0).double()])
    levels = torch.where(shift[:, None, None] > 0, 2.0 ** (shift[:, None, None] + 1) * symbol, plain)
    energy = levels.square() / 2 / 2.0 ** ((cls - UNIT)[:, None, None] / 2)
    return (-energy).exp(), (-energy / 4).exp() / 2, torch.arange(_SYMBOLS) >> shift[:, None]


@lru_cache(maxsize=128)  # searches of different weights pass through the same shapes
def lengths(shape: tuple[int, int, int, int]) -> Tensor:
    """About how many bits coding k takes, by class, quantizer and size of k: FP64 ``[64, 2, 128]``.

    What the coder's integer tables give, but for their rounding.
    """
    narrow, wide, symbol = _densities()
    cell = torch.full((1, 2, _REACH + 1), 64.0, dtype=torch.float64)
    cell[0, 0, 0], cell[0, 1, 0], cell[0, 1, 1] = shape[:3]
    shift = _shifts()
    cell = torch.where(shift[:, None, None] > 0, 64.0, cell)
    weight = cell * ((256 - shape[3]) * narrow + shape[3] * wide)
    share = weight / (2 * weight.sum(2, keepdim=True) - weight[..., :1])
    # Below half a unit of frequency a symbol becomes an escape, which takes that unit and some bits.
    bits = torch.where(share < 2.0**-13, 20.0, -share.clamp(2.0**-13).log2())
    bits = torch.nn.functional.pad(bits, (0, _SYMBOLS - _REACH - 1), value=24.0)
    return bits.gather(2, symbol[:, None].expand(-1, 2, -1)) + shift[:, None, None]


def fitted(coded: Coded, values: Tensor | None = None) -> Coded:
    """With the classes and the shape of tables with which levels take the fewest bits.

    Args:
        coded: a weight.
        values: what the classes are to fit in place of the levels, FP32 ``[out, in]``.
    """
    row, column = _variances(coded.levels if values is None else values)
    row_class = torch.round(2 * row.log2()).to(torch.int32)
    # Tables are those of levels 2k; the levels of a uniform quantizer are k.
    unit = UNIT + (4 if coded.states == 1 else 0)
    column_class = (torch.round(2 * column.log2()) + unit).to(torch.int32)
    coded = replace(coded, row_class=row_class, column_class=column_class)
    if values is not None:
        return coded
    return shaped(coded)


def _variances(values: Tensor) -> tuple[Tensor, Tensor]:
    """Factors, FP64 ``[out]`` and ``[in]``, whose products are about the squares of values."""
    rows, columns = values.shape

    def sums(start: int) -> Tensor:
        total = torch.zeros(columns, dtype=torch.float64)
        for square in _squares(values[start : start + SEGMENT]):
            total += square.sum(0)
        return total

    def rescaled(start: int) -> tuple[Tensor, Tensor]:
        """Factors of some rows, and what they leave of columns."""
        inverse, parts, total = column.reciprocal(), [], torch.zeros(columns, dtype=torch.float64)
        for square in _squares(values[start : start + SEGMENT]):
            parts.append((torch.mv(square, inverse) / columns).clamp(floor))
            total.addmv_(square.T, parts[-1].reciprocal())
        return torch.cat(parts), total

    starts = range(0, rows, SEGMENT)
    column = _total(each(sums, starts)) / rows
    with one_thread():
        mean = column.mean().clamp(1e-4)
    # Less than a thirtieth of a step, or of the average, is not told from nothing.
    floor = 1e-3 / mean.clamp(1)
    column = column.clamp(floor * mean)
    for last in (False, False, False, True):  # each estimated as a mean of what the other leaves
        found = each(rescaled, starts)
        row = torch.cat([part for part, _ in found])
        if not last:
            column = (_total([part for _, part in found]) / rows).clamp(floor * mean)
    return row, column


def _squares(values: Tensor) -> Iterator[Tensor]:
    """Their squares, FP64, a few rows at a time, in the same memory: fresh memory takes longer to get than they."""
    rows, columns = values.shape
    height = min(max(_TILE // columns, 1), rows)
    room = torch.empty(height, columns, dtype=torch.float64)
    for start in range(0, rows, height):
        part = values[start : start + height]
        yield room[: len(part)].copy_(part).square_()


def _total(parts: list[Tensor]) -> Tensor:
    """Their sum, in their order."""
    with one_thread():
        return torch.stack(parts).sum(0)


def shaped(coded: Coded) -> Coded:
    """With the shape, and a common shift of all classes, that code the levels in the fewest bits."""
    counts = histogram(coded)
    with one_thread():  # several would wait for each other at every small operation
        return _shaped(coded, counts)


def _shaped(coded: Coded, counts: Tensor) -> Coded:
    used = counts.sum(2, keepdim=True) > 0

    def bits(shape: tuple[int, int, int, int], offset: int) -> float:
        shifted = lengths(shape).roll(-offset, 0)
        return float((counts * shifted.where(used, 0.0)).sum())

    best = (bits(coded.shape, 0), coded.shape, 0)
    for size, index in [(size, index) for size in (16, 6, 2) for index in range(4)]:
        for step in (size, -size):
            while True:
                shape = list(best[1])
                shape[index] = min(max(shape[index] + step, 0 if index == 3 else 1), 255)
                tried = (shape[0], shape[1], shape[2], shape[3])
                found = bits(tried, best[2])
                if found >= best[0]:
                    break
                best = (found, tried, best[2])
        if index == 3:
            for offset in (best[2] - 1, best[2] + 1):
                found = bits(best[1], offset)
                if found < best[0]:
                    best = (found, best[1], offset)
    return replace(coded, shape=best[1], row_class=coded.row_class + best[2])


def histogram(coded: Coded) -> Tensor:
    """How often each |k| occurs by class and quantizer, FP64 ``[64, 2, 128]``; levels are int32."""

    def count(start: int) -> Tensor:
        rows = slice(start, start + SEGMENT)
        classes = coded.row_class[rows], coded.column_class
        return core.histogram(coded.levels[rows], *classes, coded.states, SEGMENT, _SYMBOLS)

    return _total(each(count, range(0, len(coded.levels), SEGMENT))).double()
