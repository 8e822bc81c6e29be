"""``sparse/1``: of every row the same share of weights is kept, wherever they are, in any codec; the others are zero.

A row of n columns keeps k = max(1, round(share·n)) of them (the FP64 product, halves to even), at p₀ < p₁ < …, whose
values follow each other in a matrix ``[out, k]``, which ``values`` encodes::

    w[p_i] = v[i]     all others 0

Before the kept weight i there are z_i = p_i - i zeros, and 0 ≤ z₀ ≤ z₁ ≤ … ≤ n - k. Numbers that never fall are stored
as Elias (1974) and Fano (1971) did: the low L bits of each as they are, the bits above them in unary, all in one map
where a 1 stands for a number and the 0s before it for how large it is::

    high   bit (z_i >> L) + i is 1, the others of k + ((n - k) >> L) are 0
    low    z_i mod 2^L, packed in L bits each

L, 0 to 16, is what makes both the shortest, of equals the least: it follows from the shape, and so do the bytes.
Counting zeros instead of columns saves k/2^L bits, and makes a map of n bits, 1 where a weight is kept, the case L = 0.

Bytes::

    values_…  the tensors of ``values``, wider dtypes first
    high      uint8 [out, ceil((k + ((n - k) >> L))/8)]
    low       uint8 [out, ceil(k·L/8)]                      where L > 0

Bits per weight, s being the share: s times those of ``values``, and s·(L + 1) + (1 - s)/2^L for the places, which is 1
at 50 %, 0.875 at 25 %, 0.309 at 5 % and 0.085 at 1 %, up to 11 % more than log₂ of the number of choices. Coding them
arithmetically would save that, and rows could no longer be read one by one.

It is for what the stages of a sum leave where that is small but for a few weights (SpQR, Dettmers et al. 2023, arXiv
2306.03078; SqueezeLLM, Kim et al. 2023, arXiv 2306.07629). Of what looks normal, a quarter holds 0.72 of the squares
and a twentieth 0.28; a searched grid of two bits for all of it holds 0.90.

``importance`` says which weights are kept: ``"magnitude"``, w²; ``"wanda"``, w²·H_jj (Sun et al. 2023, arXiv
2306.11695), the largest of each row. The others are not made up for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_hessian, require_matrix
from tenpak.codecs.grouping import column_importance, row_tiles
from tenpak.codecs.nesting import inner_payload, joined, joined_fields, require_kept_values, rows_only, split
from tenpak.codecs.validation import require_choice, require_number
from tenpak.errors import InvalidPayloadError
from tenpak.kernels import pack, packed_size, unpack
from tenpak.kernels.parallel import each

__all__ = ["Sparse"]

_HIGH, _LOW, _PREFIX = "high", "low", "values_"
_MOST_LOW = 16  # bits, as many as codes can have


@dataclass(frozen=True)
class _Prepared:
    payload: Payload
    places: dict[str, Tensor]
    values: Any


@dataclass(frozen=True)
class Sparse(Codec):
    """Unstructured sparsity, the same number of weights in every row.

    Attributes:
        share: of each row that is kept, 1e-6 to 0.5; at least one weight is.
        values: encodes the kept values, ``[out, k]``. It cannot use the Hessian, which belongs to other columns.
        importance: which weights are kept, ``"magnitude"`` or ``"wanda"``.

    Raises:
        RecipeError: a field is of the wrong type or out of range, or ``values`` needs statistics.
    """

    id: ClassVar[str] = "sparse/1"

    share: float
    values: Codec
    importance: str = "magnitude"

    def __post_init__(self) -> None:
        require_number(self.id, "share", self.share, 1e-6, 0.5)
        require_kept_values(self, self.values, "give values a rounding to nearest")
        require_choice(self.id, "importance", self.importance, ("magnitude", "wanda"))

    @property
    def needs_statistics(self) -> bool:
        """Whether the importance does."""
        return self.importance != "magnitude"

    @property
    def uses_curvature(self) -> bool:
        """Whether ``values`` does."""
        return self.values.uses_curvature

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """Those of ``values``, and the places; None where the rate of ``values`` is only known after coding."""
        kept = _count(self.share, shape[1])
        return joined_fields(_own(shape, kept), _PREFIX, self.values.fields((shape[0], kept)))

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Choose which weights are kept, and encode them; places are made tile by tile.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, the statistics do not fit it, or ``values``
                refuses what is kept.
            MissingStatisticsError: the importance needs the Hessian, and there is none.
        """
        require_matrix(weight)
        rows, columns = weight.shape
        power = None
        if self.importance == "wanda":
            needing = f"the importance {self.importance} of {self.id} needs"
            statistics = require_hessian(needing, statistics, 'use the importance "magnitude"')
            importance = column_importance(statistics, columns, weight.device)
            power = None if importance is None else importance.sqrt()
        kept = _count(self.share, columns)

        def work(tile: slice) -> tuple[dict[str, Tensor], Tensor]:
            part = weight[tile].detach()
            places = _largest(part, power, kept)
            return _packed(places, columns), part.gather(1, places)

        own, values = zip(*each(work, list(row_tiles(rows, columns))), strict=True)
        encoded = self.values.encode(torch.cat(values), rows_only(statistics))
        return self.payload(weight, joined({n: torch.cat([part[n] for part in own]) for n in own[0]}, _PREFIX, encoded))

    def decode(self, payload: Payload) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        places, inner = self._split(payload)
        values = self.values.decode(inner)
        weight = torch.zeros(payload.shape, dtype=torch.float32, device=values.device)
        for tile in row_tiles(*payload.shape):
            part = {name: tensor[tile] for name, tensor in places.items()}
            weight[tile].scatter_(1, _unpacked(part, payload.shape[1], inner.shape[1]), values[tile])
        return weight

    def prepare(self, payload: Payload) -> _Prepared:
        """The payload, its places as they are stored, and the runtime form of the values."""
        places, inner = self._split(payload)
        return _Prepared(payload, places, self.values.prepare(inner))

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, with the expanded weight."""
        return super().matmul(x, prepared.payload)

    def rows(self, indices: Tensor, prepared: _Prepared) -> Tensor:
        """Rows ``indices`` of the weight, FP32 ``[*indices.shape, in]``; only they are expanded."""
        columns = prepared.payload.shape[1]
        flat = indices.reshape(-1)
        chosen = {name: tensor[flat] for name, tensor in prepared.places.items()}
        places = _unpacked(chosen, columns, _count(self.share, columns))
        values = self.values.rows(flat, prepared.values)
        weight = torch.zeros((len(flat), columns), dtype=torch.float32, device=values.device)
        return weight.scatter_(1, places, values).view(*indices.shape, columns)

    def _split(self, payload: Payload) -> tuple[dict[str, Tensor], Payload]:
        """The packed places, checked, and the payload of ``values``, which checks its own."""
        rows, kept = payload.shape[0], _count(self.share, payload.shape[1])
        own, tensors = split(payload, _own(payload.shape, kept), _PREFIX)
        return own, inner_payload(self.values, payload, tensors, (rows, kept))


def _count(share: float, columns: int) -> int:
    """Weights of a row that are kept."""
    return max(1, round(share * columns))


def _low_bits(columns: int, kept: int) -> int:
    """L, with which places take the fewest bits."""
    return min(range(_MOST_LOW + 1), key=lambda low: kept * low + ((columns - kept) >> low))


def _own(shape: tuple[int, int], kept: int) -> tuple[Field, ...]:
    rows, columns = shape
    low = _low_bits(columns, kept)
    high = Field(_HIGH, torch.uint8, (rows, packed_size(kept + ((columns - kept) >> low), 1)))
    return (high, Field(_LOW, torch.uint8, (rows, packed_size(kept, low)))) if low else (high,)


def _largest(weight: Tensor, power: Tensor | None, kept: int) -> Tensor:
    """Columns of the largest |w|·power of each row in rising order, int64 ``[rows, kept]``; of equals the first."""
    # The order is that of the squares, whose range is narrower.
    score = weight.float().abs()
    score = score if power is None else score * power
    least = score.topk(kept).values[:, -1:]  # which of equals topk takes is not defined, so only this is asked
    chosen = score > least
    equal = score == least
    chosen |= equal & (equal.cumsum(1) <= kept - chosen.sum(1, keepdim=True))
    return chosen.nonzero()[:, 1].view(len(weight), kept)


def _packed(places: Tensor, columns: int) -> dict[str, Tensor]:
    """Rising columns, int64 ``[rows, kept]``, as ``high`` and, where they have low bits, ``low``."""
    rows, kept = places.shape
    low = _low_bits(columns, kept)
    index = torch.arange(kept, device=places.device)
    zeros = places - index
    high = torch.zeros((rows, kept + ((columns - kept) >> low)), dtype=torch.uint8, device=places.device)
    packed = {_HIGH: pack(high.scatter_(1, (zeros >> low) + index, 1), 1)}
    if low:
        rest = zeros & ((1 << low) - 1)
        packed[_LOW] = pack(rest.to(torch.uint8 if low <= 8 else torch.int32), low)
    return packed


def _unpacked(packed: dict[str, Tensor], columns: int, kept: int) -> Tensor:
    """The columns that rows keep, int64 ``[rows, kept]``.

    Raises:
        InvalidPayloadError: a row keeps more or fewer, or they do not rise, or they exceed the row.
    """
    low = _low_bits(columns, kept)
    high = unpack(packed[_HIGH], 1, kept + ((columns - kept) >> low))
    if bool((high.sum(1) == kept).all()):
        index = torch.arange(kept, device=high.device)
        zeros = high.nonzero()[:, 1].view(-1, kept) - index << low
        if low:
            zeros |= unpack(packed[_LOW], low, kept)
        rising = bool((zeros[:, 1:] >= zeros[:, :-1]).all())
        if rising and bool((zeros[:, -1] <= columns - kept).all()):
            return zeros + index
    raise InvalidPayloadError(
        f"the places of {Sparse.id} are not {kept} rising columns of a row of {columns}",
        hint="the artifact is damaged or was written by another version",
    )
