"""Uniform grids with FP16 parameters: the grid that covers a group, and the search for a better one.

Asymmetric: ``w ≈ offset + scale·q`` with codes ``q`` in ``[0, 2^bits - 1]``. The covering grid puts ``offset`` at the
group's minimum, rounded down to FP16, and ``scale = (max - offset) / (2^bits - 1)``, rounded up, so that every weight
lies between two levels and no error exceeds ``scale / 2`` (up to FP32 rounding). Rounding to nearest would clip the
maximum, by many levels where the scale is an FP16 subnormal. A constant group has scale 0 and its value as offset.

Symmetric: ``w ≈ scale·(q - 2^(bits-1))``; the signed scale maps the weight of largest magnitude to code 0, so all
levels are used (the idea is that of llama.cpp's Q4_0). The other side reaches one level less far, hence a weight there
may be off by up to one scale.

``refine`` looks for the FP16 parameters of least (weighted) squared error. From several grids that fall short of the
range (clipping, as in OMSE, Choukroun et al. 2019) it alternates between assigning codes and solving the weighted least
squares problem for scale and offset given the codes, as Lloyd does. Each step is kept, group by group, only where the
error measured with the rounded parameters falls; the result is never worse than the covering grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.codecs.grouping import group_sum

__all__ = ["Grid", "covering", "quantize", "refine", "round_up"]

# Steps by which a candidate grid falls short of the range: at both ends together, and at either end alone. Measured on
# normal and Student-t weights; the one-sided ones are worth 5 % of the error at 4 bits, further ones less than 1 %.
_SHORT_BOTH = (-0.5, 0.5, 1.0, 2.0)
_SHORT_ONE = (0.5, 1.0, 2.0)
_ROUNDS = 12  # of alternating least squares; few groups still change after ten


@dataclass(frozen=True)
class Grid:
    """The levels of each group.

    Attributes:
        bits: bits per code.
        scale: FP16 ``[rows, groups, 1]``.
        offset: FP16 of the same shape, or None for a symmetric grid.
    """

    bits: int
    scale: Tensor
    offset: Tensor | None

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def origin(self) -> Tensor:
        """The value of code 0, FP32 (exact for both kinds)."""
        return self.scale.float() * -(1 << (self.bits - 1)) if self.offset is None else self.offset.float()

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The payload's scales and offsets, FP16 ``[rows, groups]``."""
        scales = {"scales": self.scale.squeeze(-1)}
        return scales if self.offset is None else {**scales, "offsets": self.offset.squeeze(-1)}

    def nearest(self, groups: Tensor) -> Tensor:
        """Nearest codes of ``groups``, FP32 ``[rows, groups, size]``, as FP32 integers."""
        return quantize(groups, self)

    def column(self, group: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """``quantize`` for one column of a group: values FP32 ``[rows]`` to codes and levels, both FP32."""
        scale, origin = self.scale[:, group, 0].float(), self.origin()[:, group, 0].contiguous()
        inverse = torch.where(scale != 0, scale.reciprocal(), 0.0)
        top = self.top

        def nearest(values: Tensor) -> tuple[Tensor, Tensor]:
            codes = (values - origin).mul_(inverse).round_().clamp_(0, top)
            # A product of 8 and 11 bits is exact, so this rounds once, as decoding does.
            return codes, torch.addcmul(origin, codes, scale)

        return nearest


def covering(groups: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid that covers each group of ``groups``, FP32 ``[rows, groups, size]``.

    Parameters beyond FP16 come out infinite; the caller refuses them.
    """
    # amin and amax vectorise, aminmax over a short dimension does not. Adding zero turns -0.0 into 0.0.
    low = groups.amin(-1, keepdim=True) + 0.0
    high = groups.amax(-1, keepdim=True) + 0.0
    return _between(low, high, bits, symmetric)


def quantize(groups: Tensor, grid: Grid) -> Tensor:
    """Nearest codes of ``groups`` on ``grid``, as FP32 integers ``[rows, groups, size]``."""
    scale = grid.scale.float()
    inverse = torch.where(scale != 0, scale.reciprocal(), 0.0)
    return (groups - grid.origin()).mul_(inverse).round_().clamp_(0, grid.top)


def refine(groups: Tensor, weights: Tensor | None, grid: Grid) -> Grid:
    """A grid of no larger, and usually much smaller, weighted squared error than ``grid`` on every group.

    Args:
        groups: FP32 ``[rows, groups, size]``.
        weights: weights of the squared errors, FP32 ``[groups, size]``, or None for equal ones.
        grid: where to start.
    """
    best, codes, error = grid, *_evaluate(groups, weights, grid)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for start in _candidates(low, high, grid.bits, grid.offset is None):
        candidate = _least_squares(groups, weights, quantize(groups, start), start)
        codes_there, error_there = _evaluate(groups, weights, candidate)
        best, codes, error, _ = _accept(best, codes, error, candidate, codes_there, error_there)
    for _ in range(_ROUNDS):
        candidate = _least_squares(groups, weights, codes, best)
        codes_there, error_there = _evaluate(groups, weights, candidate)
        best, codes, error, improved = _accept(best, codes, error, candidate, codes_there, error_there)
        if not bool(improved.any()):
            break
    return best


def _between(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid that covers ``[low, high]``."""
    if symmetric:
        extreme = torch.where(-low >= high, low, high)
        scale = extreme / -(1 << (bits - 1))
        return Grid(bits, torch.where(scale >= 0, round_up(scale.abs()), -round_up(scale.abs())), None)
    varies = high > low
    offset = torch.where(varies, -round_up(-low), low.half())
    scale = round_up((high - offset.float()) / ((1 << bits) - 1))
    return Grid(bits, torch.where(varies, scale, torch.zeros_like(scale)), offset)


def _candidates(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Iterator[Grid]:
    """Grids that cover a little less, or more, than ``[low, high]``."""
    if symmetric:
        half = 1 << (bits - 1)
        for short in (0.0, *_SHORT_BOTH):
            end = torch.maximum(-low, high) * (half / (half + short))
            yield _between(-end, -end, bits, True)  # either side may be the one that code 0 reaches
            yield _between(end, end, bits, True)
        return
    top, span = (1 << bits) - 1, high - low
    for short in _SHORT_BOTH:
        cut = span * (short / (top + short) / 2)
        yield _between(low + cut, high - cut, bits, False)
    for short in _SHORT_ONE:
        cut = span * (short / (top + short))
        yield _between(low + cut, high, bits, False)
        yield _between(low, high - cut, bits, False)


def _least_squares(groups: Tensor, weights: Tensor | None, codes: Tensor, grid: Grid) -> Grid:
    """The FP16 grid that fits ``groups`` best when the codes stay; not finite where codes do not determine one."""
    symmetric = grid.offset is None
    # Codes are centred and values taken from the grid's middle, else FP32 sums cancel for weights far from zero.
    centre = float(1 << (grid.bits - 1)) if symmetric else grid.top / 2
    middle = grid.origin() + grid.scale.float() * centre
    q, x = codes - centre, groups - middle
    wq = q if weights is None else q * weights
    sqq, sxq = group_sum(wq * q), group_sum(wq * x)
    if symmetric:
        return Grid(grid.bits, (sxq / sqq).half(), None)
    sq = group_sum(wq)
    if weights is None:
        total: Tensor | int = groups.shape[-1]
        sx = group_sum(x)
    else:
        total, sx = group_sum(weights), group_sum(x * weights)
    scale = (total * sxq - sx * sq) / (total * sqq - sq * sq)
    half_scale = scale.half()
    # The offset is solved for the scale that will be stored.
    offset = middle + (sx - half_scale.float() * sq) / total - half_scale.float() * centre
    return Grid(grid.bits, half_scale, offset.half())


def _evaluate(groups: Tensor, weights: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Nearest codes and each group's weighted squared error ``[rows, groups, 1]``."""
    codes = quantize(groups, grid)
    squares = (codes * grid.scale.float()).add_(grid.origin()).sub_(groups).square_()
    return codes, group_sum(squares if weights is None else squares.mul_(weights))


def _accept(
    best: Grid, codes: Tensor, error: Tensor, candidate: Grid, codes_there: Tensor, error_there: Tensor
) -> tuple[Grid, Tensor, Tensor, Tensor]:
    """The better grid of each group. A candidate that is not finite has a NaN or infinite error and loses."""
    better = error_there < error
    offset = None
    if best.offset is not None and candidate.offset is not None:
        offset = torch.where(better, candidate.offset, best.offset)
    grid = Grid(best.bits, torch.where(better, candidate.scale, best.scale), offset)
    return grid, torch.where(better, codes_there, codes), torch.where(better, error_there, error), better


def round_up(values: Tensor) -> Tensor:
    """The smallest FP16 not below each FP32 value (infinite beyond 65504)."""
    half = values.half()
    # Sign and magnitude: one step up adds one to the pattern of a positive number, subtracts one from a negative's.
    step = torch.where(half >= 0, 1, -1).to(torch.int16)
    return torch.where(half.float() < values, (half.view(torch.int16) + step).view(torch.float16), half)
