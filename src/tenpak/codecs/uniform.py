"""``uniform/1``: integer codes on a uniform grid with FP16 parameters per group.

Formula (all in FP32, one rounding; see ``grid`` for how the parameters are found)::

    asymmetric   w ≈ offset + scale·q              q = 0 … 2^bits - 1
    symmetric    w ≈ scale·(q - 2^(bits-1))        the signed scale uses every level

Bytes, G = ceil(in/group) groups per row (one where ``group`` is null)::

    scales   FP16  [out, G]
    offsets  FP16  [out, G]                    asymmetric only
    codes    uint8 [out, ceil(in·bits/8)]      packed, see tenpak.kernels.packing

Bits per weight: ``bits + 32/group`` (asymmetric) or ``bits + 16/group`` where the group divides the row. FP16
parameters limit the range to ±65504, which trained weights do not come near; a group beyond it is refused. Parameters
are not compressed further: at g32 they cost one bit of five, which is what entropy-coded codecs will save.

``bits``, ``group`` and ``symmetric`` fix the bytes; ``search`` and ``rounding`` only guide the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.fields_tuning import TunableFields, over_columns
from tenpak.codecs.grid import Grid, covering, refine
from tenpak.codecs.grouping import Segment, column_importance, group_count, row_tiles, segments
from tenpak.codecs.integers import fits, product
from tenpak.codecs.rounding import Nearest, Rounding, from_json, require_rounding
from tenpak.codecs.validation import require_bool, require_group, require_integer
from tenpak.errors import CodecError
from tenpak.kernels import pack, packed_size, unpack

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(Codec):
    """Uniform quantization.

    Attributes:
        bits: bits per code, 2 to 8.
        group: weights per scale, 8 to 256, or None for one scale per row.
        symmetric: no offset, half the parameters.
        search: refine scale and offset to the least squared error, weighted by the Hessian's diagonal where the
            statistics have one; about twenty times slower than covering each group's range.
        rounding: how codes are chosen, see ``tenpak.codecs.rounding``.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "uniform/1"

    bits: int
    group: int | None = 32
    symmetric: bool = False
    search: bool = False
    rounding: Rounding = field(default=Nearest(), metadata={"optional": True})

    def __post_init__(self) -> None:
        require_integer(self.id, "bits", self.bits, 2, 8)
        require_group(self.id, self.group)
        require_bool(self.id, "symmetric", self.symmetric)
        require_bool(self.id, "search", self.search)
        require_rounding(self.id, self.rounding)

    @classmethod
    def parse_field(cls, name: str, value: Any) -> Any:
        """The value of field ``name`` from its JSON form."""
        return from_json(value) if name == "rounding" else super().parse_field(name, value)

    @property
    def needs_statistics(self) -> bool:
        """Whether the rounding does."""
        return self.rounding.needs_statistics

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """Scales, offsets unless symmetric, codes."""
        rows, columns = shape
        parameters = (rows, group_count(columns, self.group))
        names = ("scales",) if self.symmetric else ("scales", "offsets")
        return (
            *(Field(name, torch.float16, parameters) for name in names),
            Field("codes", torch.uint8, (rows, packed_size(columns, self.bits))),
        )

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight`` tile by tile; to nearest takes a few MiB beyond the payload, if no row exceeds 262,144.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, a group exceeds FP16's range, or the
                statistics do not fit the weight.
            CalibrationError: the statistics lack what the rounding needs.
        """
        require_matrix(weight)
        rows, columns = weight.shape
        importance = column_importance(statistics, columns, weight.device) if self.search else None
        tensors = {
            f.name: torch.empty(f.shape, dtype=f.dtype, device=weight.device) for f in self.fields((rows, columns))
        }
        for tile in self.rounding.round(weight, _Grids(self, importance), statistics):
            for name, values in tile.parameters.items():
                tensors[name][tile.rows] = values
            tensors["codes"][tile.rows] = pack(tile.codes, self.bits)
        for name in ("scales", "offsets"):
            if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
                raise CodecError(
                    f"{name} of the weight exceed FP16's range (±65504) in {self.id}",
                    hint="leave this tensor dense (--set 'NAME=dense')",
                )
        return self.payload(weight, tensors)

    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``."""
        tensors = self.checked(payload)
        rows, columns = payload.shape
        weight = torch.empty(payload.shape, dtype=torch.float32, device=tensors["codes"].device)
        for tile in row_tiles(rows, columns):
            self._expand({name: tensor[tile] for name, tensor in tensors.items()}, weight[tile])
        return weight

    @property
    def multiplies_cheaply(self) -> bool:
        """Whether a weight is a byte times the scale of its row, which the compiled core multiplies with as it is."""
        return self.bits == 8 and self.group is None and self.symmetric

    def matmul(self, x: Tensor, prepared: Payload) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, in the dtype of ``x``; from the codes where that is cheap."""
        if self.multiplies_cheaply:
            tensors = self.checked(prepared)
            codes, scales = tensors["codes"].contiguous(), tensors["scales"].float().flatten()
            if fits(x, codes):
                return product(x, codes, scales, torch.ones(prepared.shape[1]))
        return super().matmul(x, prepared)

    def rows(self, indices: Tensor, prepared: Payload) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        tensors = self.checked(prepared)
        flat = indices.reshape(-1)
        chosen = {name: tensor[flat] for name, tensor in tensors.items()}
        weight = torch.empty((flat.numel(), prepared.shape[1]), dtype=torch.float32, device=tensors["codes"].device)
        self._expand(chosen, weight)
        return weight.view(*indices.shape, prepared.shape[1])

    def tunable(self, payload: Payload) -> TunableFields:
        """Scales and offsets are continuous."""
        tensors, columns = self.checked(payload), payload.shape[1]
        codes = unpack(tensors["codes"], self.bits, columns).float()
        steps = tensors["scales"].float().abs()
        if self.symmetric:
            codes -= 1 << (self.bits - 1)

        def weight(values: Mapping[str, Tensor]) -> Tensor:
            scaled = codes * over_columns(values["scales"], self.group, columns)
            return scaled if self.symmetric else scaled + over_columns(values["offsets"], self.group, columns)

        units = {"scales": steps} if self.symmetric else {"scales": steps, "offsets": steps * 2 ** (self.bits - 1)}
        return TunableFields(payload, units, weight)

    def _expand(self, tensors: dict[str, Tensor], out: Tensor) -> None:
        """Decode the rows held by ``tensors`` into ``out``, FP32 ``[rows, in]``."""
        columns = out.shape[1]
        out.copy_(unpack(tensors["codes"], self.bits, columns))
        if self.symmetric:
            out.sub_(1 << (self.bits - 1))
        for segment in segments(columns, self.group):
            groups = segment.view(out)
            # Code times scale is exact in FP32 (8 + 11 bits), so the sum below is the only rounding.
            groups.mul_(tensors["scales"][:, segment.groups, None].float())
            if not self.symmetric:
                groups.add_(tensors["offsets"][:, segment.groups, None].float())


@dataclass(frozen=True)
class _Grids:
    """The codec's grids: what its rounding asks for."""

    codec: Uniform
    importance: Tensor | None

    @property
    def group(self) -> int | None:
        return self.codec.group

    def fit(self, groups: Tensor, segment: Segment) -> Grid:
        grid = covering(groups, self.codec.bits, self.codec.symmetric)
        if not self.codec.search:
            return grid
        return refine(groups, None if self.importance is None else segment.view(self.importance), grid)
