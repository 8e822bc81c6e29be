"""``normalfloat/1``: codes into a small table of levels, scaled by the largest magnitude of each group.

Formula (FP32, one rounding)::

    w ≈ scale·levels[q]        scale = max|w| of the group, rounded up to FP16;  levels in [-1, 1]

``levels="normal"``: the quantiles of a normal distribution with an exact zero and both ends at ±1 (NormalFloat;
Dettmers et al. 2023, "QLoRA", appendix E, which gives 4 bits). With ``k = 2^bits`` levels and Φ⁻¹ the normal quantile
function, ``δ = 1 - (1/(2k) + 1/(2k - 2))/2``: k/2 levels above zero at Φ⁻¹ of equal steps from δ to ½ (½ itself is
the zero), k/2 - 1 below in the same way, all divided by Φ⁻¹(δ). The tables below are constants so that decoding is
exact everywhere; a test derives them again.

``levels="learned"``: one table per tensor that minimises the squared error of the weights (Lloyd 1982, Max 1960),
weighted by scale² and, where there are statistics, by output curvature and the Hessian's diagonal. It works on a
histogram of the scaled weights with 8192 bins, filled in a fixed order in FP64: fast, and the same whatever the number
of threads. Its steps of 1/4096 are finer than the FP16 in which the levels are stored where those are large.

Bytes, G = ceil(in/group) groups per row (one where ``group`` is null)::

    scales  FP16  [out, G]
    levels  FP16  [2^bits]                  learned only
    codes   uint8 [out, ceil(in·bits/8)]    packed, see tenpak.kernels.packing

Bits per weight: ``bits + 16/group`` where the group divides the row (and 2^bits·16 bits per tensor for learned levels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.fields_tuning import TunableFields, over_columns
from tenpak.codecs.grid import round_up
from tenpak.codecs.grouping import (
    Segment,
    column_importance,
    group_count,
    row_importance,
    row_tiles,
    segments,
)
from tenpak.codecs.rounding import Nearest, Rounding, from_json, require_rounding
from tenpak.codecs.validation import require_choice, require_group, require_integer
from tenpak.errors import CodecError
from tenpak.kernels import pack, packed_size, unpack

__all__ = ["NormalFloat"]

# fmt: off
NORMAL_LEVELS = {
    2: (
        -1.0, 0.0, 0.43581817, 1.0,
    ),
    3: (
        -1.0, -0.53502274, -0.24693143, 0.0, 0.18333748, 0.38199395, 0.6229857, 1.0,
    ),
    4: (
        -1.0, -0.6961928, -0.52507293, -0.39491743, -0.28444132, -0.1847734, -0.09104998, 0.0,
        0.079580314, 0.16093014, 0.24611226, 0.33791512, 0.44070974, 0.5626169, 0.72295666, 1.0,
    ),
}
# fmt: on

_BINS = 8192
_CENTRES = torch.arange(_BINS + 1, dtype=torch.float64) / (_BINS // 2) - 1
_LLOYD_ROUNDS = 300
_LLOYD_TOLERANCE = 1e-6  # well below the FP16 spacing of all but the smallest levels


@dataclass(frozen=True)
class NormalFloat(Codec):
    """Quantization to the quantiles of a normal distribution, or to levels learned per tensor.

    Attributes:
        bits: bits per code, 2 to 4.
        group: weights per scale, 8 to 256, or None for one scale per row.
        levels: ``"normal"`` or ``"learned"``.
        rounding: how codes are chosen, see ``tenpak.codecs.rounding``. Levels are learned before.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "normalfloat/1"

    bits: int
    group: int | None = 64
    levels: str = "normal"
    rounding: Rounding = field(default=Nearest(), metadata={"optional": True})

    def __post_init__(self) -> None:
        require_integer(self.id, "bits", self.bits, 2, 4)
        require_group(self.id, self.group)
        require_choice(self.id, "levels", self.levels, ("normal", "learned"))
        require_rounding(self.id, self.rounding)

    @classmethod
    def parse_field(cls, name: str, value: Any) -> Any:
        """The value of field ``name`` from its JSON form."""
        return from_json(value) if name == "rounding" else super().parse_field(name, value)

    @property
    def needs_statistics(self) -> bool:
        """Whether the rounding does."""
        return self.rounding.needs_statistics

    @property
    def uses_curvature(self) -> bool:
        """Whether levels are learned, and for calibrated weights."""
        return self.levels == "learned" and self.rounding.needs_statistics

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """Scales, levels where they are learned, codes."""
        rows, columns = shape
        levels = (Field("levels", torch.float16, (1 << self.bits,)),) if self.levels == "learned" else ()
        return (
            Field("scales", torch.float16, (rows, group_count(columns, self.group))),
            *levels,
            Field("codes", torch.uint8, (rows, packed_size(columns, self.bits))),
        )

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight`` tile by tile; statistics matter to learned levels and to roundings other than nearest.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, exceeds FP16's range, or the statistics do
                not fit it.
            CalibrationError: the statistics lack what the rounding needs.
        """
        require_matrix(weight)
        rows, columns = weight.shape
        tensors = {
            f.name: torch.empty(f.shape, dtype=f.dtype, device=weight.device) for f in self.fields((rows, columns))
        }
        levels = torch.tensor(NORMAL_LEVELS[self.bits], dtype=torch.float32)
        if self.levels == "learned":
            scales = tensors["scales"]
            for tile in row_tiles(rows, columns):
                magnitudes = weight[tile].float().abs()
                for segment in segments(columns, self.group):
                    scales[tile, segment.groups] = round_up(segment.view(magnitudes).amax(-1))
            self._require_finite(scales)
            levels = _learn(_histogram(weight, scales, self.group, statistics), levels).half()
            tensors["levels"].copy_(levels)
            levels = levels.float()
        for rounded in self.rounding.round(weight, _Grids(self.group, levels.to(weight.device)), statistics):
            tensors["scales"][rounded.rows] = rounded.parameters["scales"]
            tensors["codes"][rounded.rows] = pack(rounded.codes, self.bits)
        self._require_finite(tensors["scales"])
        return self.payload(weight, tensors)

    def _require_finite(self, scales: Tensor) -> None:
        if not bool(torch.isfinite(scales).all()):
            raise CodecError(
                f"the weight exceeds FP16's range (±65504) in {self.id}",
                hint="leave this tensor dense (--set 'NAME=dense')",
            )

    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``."""
        tensors = self.checked(payload)
        rows, columns = payload.shape
        weight = torch.empty(payload.shape, dtype=torch.float32, device=tensors["codes"].device)
        for tile in row_tiles(rows, columns):
            self._expand(tensors["codes"][tile], tensors["scales"][tile], self._table(payload), weight[tile])
        return weight

    def rows(self, indices: Tensor, prepared: Payload) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        tensors = self.checked(prepared)
        flat = indices.reshape(-1)
        weight = torch.empty((flat.numel(), prepared.shape[1]), dtype=torch.float32, device=tensors["codes"].device)
        self._expand(tensors["codes"][flat], tensors["scales"][flat], self._table(prepared), weight)
        return weight.view(*indices.shape, prepared.shape[1])

    def tunable(self, payload: Payload) -> TunableFields:
        """Scales are continuous, and learned levels."""
        tensors, columns = self.checked(payload), payload.shape[1]
        codes = unpack(tensors["codes"], self.bits, columns).int()
        fixed = self._table(payload)

        def weight(values: Mapping[str, Tensor]) -> Tensor:
            levels = values.get("levels", fixed).index_select(0, codes.flatten()).view(codes.shape)
            return levels * over_columns(values["scales"], self.group, columns)

        units = {"scales": tensors["scales"].float().abs()}
        units |= {"levels": torch.ones(())} if self.levels == "learned" else {}
        return TunableFields(payload, units, weight)

    def _table(self, payload: Payload) -> Tensor:
        """The levels, FP32 ``[2^bits]``, on the payload's device."""
        if self.levels == "learned":
            return payload.tensors["levels"].float()
        return torch.tensor(NORMAL_LEVELS[self.bits], dtype=torch.float32, device=payload.tensors["codes"].device)

    def _expand(self, packed: Tensor, scales: Tensor, levels: Tensor, out: Tensor) -> None:
        """Decode rows into ``out``, FP32 ``[rows, in]``."""
        codes = unpack(packed, self.bits, out.shape[1])
        out.copy_(levels.index_select(0, codes.view(-1).int()).view(out.shape))
        for segment in segments(out.shape[1], self.group):
            segment.view(out).mul_(scales[:, segment.groups, None].float())


@dataclass(frozen=True)
class _Grids:
    """The codec's levels: what its rounding asks for."""

    group: int | None
    table: Tensor

    def fit(self, groups: Tensor, segment: Segment) -> _Levels:
        return _Levels(round_up(groups.abs().amax(-1)), self.table, (self.table[1:] + self.table[:-1]) / 2)


@dataclass(frozen=True)
class _Levels:
    """A table of levels, the limits between them, and scales, FP16 ``[rows, groups]``."""

    scales: Tensor
    table: Tensor
    between: Tensor

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {"scales": self.scales}

    def nearest(self, groups: Tensor) -> Tensor:
        scale = self.scales.unsqueeze(-1).float()
        return torch.bucketize(groups * _inverse(scale), self.between, out_int32=True)

    def column(self, group: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        scale = self.scales[:, group].float()
        inverse, table, between = _inverse(scale), self.table, self.between

        def nearest(values: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.bucketize(values * inverse, between, out_int32=True)
            return codes, table.index_select(0, codes).mul_(scale)

        return nearest


def _inverse(scale: Tensor) -> Tensor:
    """1/scale, zero where the scale is."""
    return torch.where(scale != 0, scale.reciprocal(), 0.0)


def _scaled(block: Tensor, scales: Tensor, group: int | None) -> Iterator[tuple[Segment, Tensor]]:
    """Each segment of a tile with its weights divided by their scales, FP32 ``[rows, groups, size]`` in [-1, 1]."""
    block = block.float().contiguous()
    for segment in segments(block.shape[1], group):
        scale = scales[:, segment.groups, None].float()
        yield segment, segment.view(block) * _inverse(scale)


def _histogram(weight: Tensor, scales: Tensor, group: int | None, statistics: Statistics | None) -> Tensor:
    """Weighted histogram of the scaled weights: FP64 ``[_BINS + 1]`` on the CPU; bin ``i`` near ``2i/_BINS - 1``."""
    rows, columns = weight.shape
    by_column = column_importance(statistics, columns, weight.device)
    by_row = row_importance(statistics, rows, weight.device)
    histogram = torch.zeros(_BINS + 1, dtype=torch.float64)
    for tile in row_tiles(rows, columns):
        for segment, scaled in _scaled(weight[tile], scales[tile], group):
            # An error of a scaled weight is multiplied by its scale, so the squared error counts scale² times.
            importance = scales[tile, segment.groups, None].float().square()
            if by_row is not None:
                importance = importance * by_row[tile, None, None]
            if by_column is not None:
                importance = importance * segment.view(by_column)
            bins = scaled.add_(1).mul_(_BINS // 2).round_().clamp_(0, _BINS).int()
            # On the CPU bincount adds one after another; on a GPU the order, and so the sum, would vary.
            histogram += torch.bincount(
                bins.reshape(-1).cpu(),
                weights=importance.expand(bins.shape).reshape(-1).cpu().double(),
                minlength=_BINS + 1,
            )
    return histogram


def _learn(histogram: Tensor, normal: Tensor) -> Tensor:
    """The best levels (sorted, FP64) that Lloyd's iteration finds on the histogram.

    It ends in a local minimum, so it starts twice: from the normal quantiles, and from quantiles of the density to the
    power 1/3, where the levels of a fine quantizer lie (Panter and Dite 1951), which copes with any distribution.
    """
    mass = histogram.pow(1 / 3).cumsum(0)
    if not float(mass[-1]) > 0:
        return normal.double()
    parts = (torch.arange(len(normal), dtype=torch.float64) + 0.5) / len(normal)
    spread = _CENTRES[torch.searchsorted(mass, parts * mass[-1]).clamp_(max=_BINS)]
    (first, error), (second, other) = (_lloyd_max(histogram, start.double()) for start in (normal, spread))
    return first if error <= other else second


def _lloyd_max(histogram: Tensor, levels: Tensor) -> tuple[Tensor, float]:
    """The levels that Lloyd's iteration reaches from ``levels``, and their squared error less a constant."""
    centres = _CENTRES
    zero = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat((zero, histogram.cumsum(0)))
    moment = torch.cat((zero, (histogram * centres).cumsum(0)))
    for _ in range(_LLOYD_ROUNDS):
        cuts = torch.searchsorted(centres, (levels[1:] + levels[:-1]) / 2, right=True)
        edges = torch.cat((cuts.new_zeros(1), cuts, cuts.new_tensor([_BINS + 1])))
        weight = mass[edges].diff()
        moved = torch.where(weight > 0, moment[edges].diff() / weight, levels)
        done = bool((moved - levels).abs().max() < _LLOYD_TOLERANCE)
        levels = moved
        if done:
            break
    # Σ m (x - l)² = Σ m x² - Σ m l² when every level is the mean of its cell.
    return levels, -float((weight * levels.square()).sum())
