"""``sparse24/1``: of every four neighbouring weights of a row two are kept, in any codec; the other two are zero.

A *block* is four neighbouring columns, B = ceil(in/4) of them; where 4 does not divide the row the last one is shorter.
Row by row, the values of the kept pairs (i < j) of the blocks follow each other in a matrix ``[out, half]``, which
``values`` encodes::

    w[4b + i] = v[2b]     w[4b + j] = v[2b + 1]     half = 2·(in div 4) + min(2, in mod 4)

A last block of one or two columns is kept whole, as the pair (0, 1), and has no values beyond the row's end.

There are six pairs, numbered j·(j - 1)/2 + i, in base six: seventeen digits, least significant first, make a word of
44 bits (6^17 < 2^44), which is 2.588 bits a block where log₂ 6 is 2.585. The last word of a row has fewer digits, d,
and as many groups of four bits as 6^d - 1 needs. A row's words are a stream of bits, least significant first, which
ends at a byte, so that rows can be read one by one.

Bytes, with D bytes a row for the pairs::

    values_…  the tensors of ``values``, wider dtypes first
    pairs     uint8 [out, D]        D = ceil((11·(B div 17) + ceil(bits(6^(B mod 17) - 1)/4)) / 2)

Bits per weight: those of ``values`` halved, and 0.647 for the pairs. So int4 values take the bits of int3 without any
zeros, and lose to it (docs/codecs.md has figures); the zeros are worth having where hardware skips them.

``importance`` says which pair is kept: ``"magnitude"``, w²; ``"wanda"``, w²·H_jj (Sun et al. 2023, arXiv 2306.11695:
|w|·‖x_j‖ in groups of four); ``"sparsegpt"``, the loss that remains when the other weights make up for it, with values
to match (see ``rounding.pruning``), rounded with feedback to the levels of ``values`` if that codec takes a rounding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_hessian, require_matrix
from tenpak.codecs.grouping import column_importance, row_tiles
from tenpak.codecs.nesting import inner_payload, joined, joined_fields, require_kept_values, rows_only, split
from tenpak.codecs.rounding.pruning import PAIRS, Exact, Metric, Pruning, metric, prune
from tenpak.codecs.validation import require_choice, require_integer, require_number
from tenpak.errors import InvalidPayloadError
from tenpak.kernels import pack, packed_size, unpack
from tenpak.kernels.parallel import each

__all__ = ["Sparse24"]

_OWN, _PREFIX = "pairs", "values_"
_DIGITS, _NIBBLES = 17, 11  # of a word


@dataclass(frozen=True)
class _Prepared:
    payload: Payload
    pairs: Tensor
    values: Any


@dataclass(frozen=True)
class Sparse24(Codec):
    """2:4 semi-structured sparsity along the input dimension.

    Attributes:
        values: encodes the kept values, ``[out, half]``. It cannot use the Hessian, which belongs to other columns.
        importance: which weights are kept, ``"magnitude"``, ``"wanda"`` or ``"sparsegpt"``.
        damping: of the Hessian, relative to its mean diagonal, 1e-6 to 1; sparsegpt only.
        sweeps: of block coordinate descent, 0 to 100; sparsegpt only.

    Raises:
        RecipeError: a field is of the wrong type or out of range, or ``values`` needs statistics.
    """

    id: ClassVar[str] = "sparse24/1"

    values: Codec
    importance: str = "magnitude"
    damping: float = 0.01
    sweeps: int = 4

    def __post_init__(self) -> None:
        remedy = 'give values a rounding to nearest, and the importance "sparsegpt", which feeds its errors back'
        require_kept_values(self, self.values, remedy)
        require_choice(self.id, "importance", self.importance, ("magnitude", "wanda", "sparsegpt"))
        require_number(self.id, "damping", self.damping, 1e-6, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_integer(self.id, "sweeps", self.sweeps, 0, 100)

    @property
    def needs_statistics(self) -> bool:
        """Whether the importance does."""
        return self.importance != "magnitude"

    @property
    def uses_curvature(self) -> bool:
        """Whether ``values`` does."""
        return self.values.uses_curvature

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """Those of ``values``, and the pairs; None where the rate of ``values`` is only known after coding."""
        return joined_fields(_own(shape), _PREFIX, self.values.fields((shape[0], _half(shape[1]))))

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Choose pairs and values, and encode these.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, the statistics do not fit it, or ``values``
                refuses what is kept.
            MissingStatisticsError: the importance needs the Hessian, and there is none.
            SingularHessianError: the Hessian is indefinite.
        """
        require_matrix(weight)
        columns = weight.shape[1]
        if self.importance == "magnitude":
            pairs = _largest(weight, None)
            return self._payload(weight, pairs, self._encode(_kept(weight, pairs), statistics))
        needing = f"the importance {self.importance} of {self.id} needs"
        statistics = require_hessian(needing, statistics, 'use the importance "magnitude"')
        pairs = _largest(weight, column_importance(statistics, columns, weight.device))
        if self.importance == "wanda":
            return self._payload(weight, pairs, self._encode(_kept(weight, pairs), statistics))
        shared = metric(statistics, columns, self.damping, sweeps=self.sweeps > 0, device=weight.device)
        return self._compensated(weight, pairs, shared, statistics)

    def decode(self, payload: Payload) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        pairs, values = self._split(payload)
        return _expanded(_unpacked(pairs, payload.shape[1]), self.values.decode(values), payload.shape[1])

    def prepare(self, payload: Payload) -> _Prepared:
        """The payload, its pairs, and the runtime form of the values."""
        pairs, values = self._split(payload)
        return _Prepared(payload, pairs, self.values.prepare(values))

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, with the expanded weight."""
        return super().matmul(x, prepared.payload)

    def rows(self, indices: Tensor, prepared: _Prepared) -> Tensor:
        """Rows ``indices`` of the weight, FP32 ``[*indices.shape, in]``; only they are expanded."""
        columns = prepared.payload.shape[1]
        flat = indices.reshape(-1)
        pairs = _unpacked(prepared.pairs[flat], columns)
        return _expanded(pairs, self.values.rows(flat, prepared.values), columns).view(*indices.shape, columns)

    def _compensated(self, weight: Tensor, pairs: Tensor, shared: Metric, statistics: Statistics) -> Payload:
        """With pairs and values by least loss; ``pairs`` show a codec that learns levels how large values are."""
        if any(field.name == "rounding" for field in dataclasses.fields(self.values)):
            rounding = Pruning(weight.detach(), shared, self.sweeps)
            changes: dict[str, Any] = {"rounding": rounding}
            values = dataclasses.replace(self.values, **changes)
            encoded = values.encode(_kept(weight, pairs), rows_only(statistics))
            return self._payload(weight, torch.cat(rounding.pairs), encoded)
        tiles = list(prune(weight.detach(), shared, Exact(), self.sweeps))
        kept = self._encode(torch.cat([tile.values for tile in tiles]), statistics)
        return self._payload(weight, torch.cat([tile.pairs for tile in tiles]), kept)

    def _encode(self, kept: Tensor, statistics: Statistics | None) -> Payload:
        return self.values.encode(kept, rows_only(statistics))

    def _payload(self, weight: Tensor, pairs: Tensor, values: Payload) -> Payload:
        return self.payload(weight, joined({_OWN: _packed(pairs)}, _PREFIX, values))

    def _split(self, payload: Payload) -> tuple[Tensor, Payload]:
        """The packed pairs, checked, and the payload of ``values``, which checks its own."""
        own, tensors = split(payload, _own(payload.shape), _PREFIX)
        kept = payload.shape[0], _half(payload.shape[1])
        return own[_OWN], inner_payload(self.values, payload, tensors, kept)


def _half(columns: int) -> int:
    """Kept values of a row."""
    return 2 * (columns // 4) + min(2, columns % 4)


def _nibbles(blocks: int) -> int:
    """Groups of four bits that the pairs of a row take."""
    words, rest = divmod(blocks, _DIGITS)
    return _NIBBLES * words + -(-int(6**rest - 1).bit_length() // 4)


def _own(shape: tuple[int, int]) -> tuple[Field, ...]:
    return (Field(_OWN, torch.uint8, (shape[0], packed_size(_nibbles(-(-shape[1] // 4)), 4))),)


def _places(device: torch.device) -> Tensor:
    return torch.tensor(PAIRS, dtype=torch.int64, device=device)


def _largest(weight: Tensor, importance: Tensor | None) -> Tensor:
    """The pair of largest w²·importance of each block, uint8 ``[out, blocks]``; of equal weights the first."""
    rows, columns = weight.shape
    power = None if importance is None else importance.sqrt()

    def work(tile: slice) -> Tensor:
        # |w|·√importance has the same order as its square and does not overflow.
        score = weight[tile].detach().float().abs()
        score = pad(score if power is None else score * power, (0, -columns % 4), value=-1.0)
        places = score.view(len(score), -1, 4).unbind(-1)
        kept = torch.zeros_like(places[0], dtype=torch.uint8)
        for i, own in enumerate(places):
            larger = [(other >= own) if j < i else (other > own) for j, other in enumerate(places) if j != i]
            kept |= ((larger[0].byte() + larger[1] + larger[2]) < 2).byte() << i
        return _number(weight.device)[kept.int()]

    return torch.cat(each(work, list(row_tiles(rows, columns))))


def _number(device: torch.device) -> Tensor:
    """The pair of each set of two places, these being bits, uint8 ``[16]``."""
    table = torch.zeros(16, dtype=torch.uint8)
    for number, (i, j) in enumerate(PAIRS):
        table[1 << i | 1 << j] = number
    return table.to(device)


def _kept(weight: Tensor, pairs: Tensor) -> Tensor:
    """The values of the kept pairs, ``[out, half]`` in the dtype of ``weight``."""
    rows, columns = weight.shape
    blocks = pad(weight.detach(), (0, -columns % 4)).view(rows, -1, 4)
    kept = blocks.gather(2, _places(weight.device)[pairs.long()])
    return kept.flatten(1)[:, : _half(columns)].clone(memory_format=torch.contiguous_format)


def _expanded(pairs: Tensor, values: Tensor, columns: int) -> Tensor:
    """The weight of kept values, FP32 ``[out, in]``; ``pairs`` uint8 ``[out, blocks]``."""
    rows, blocks = pairs.shape
    weight = torch.zeros((rows, blocks, 4), dtype=torch.float32, device=values.device)
    both = pad(values, (0, 2 * blocks - values.shape[1])).view(rows, blocks, 2)
    weight.scatter_(2, _places(values.device)[pairs.long()], both)
    return weight.flatten(1)[:, :columns].contiguous()


def _packed(pairs: Tensor) -> Tensor:
    """Pairs, uint8 ``[out, blocks]``, as words in base six, uint8 ``[out, D]``."""
    rows, blocks = pairs.shape
    digits = pad(pairs.long(), (0, -blocks % _DIGITS)).view(rows, -1, _DIGITS)
    words = digits[..., 0].clone()
    for place in range(1, _DIGITS):
        words += digits[..., place] * 6**place
    nibbles = (words[..., None] >> torch.arange(0, 4 * _NIBBLES, 4, device=pairs.device)) & 15
    stored = nibbles.to(torch.uint8).flatten(1)[:, : _nibbles(blocks)]
    return pack(stored.clone(memory_format=torch.contiguous_format), 4)


def _unpacked(packed: Tensor, columns: int) -> Tensor:
    """The pairs of rows, uint8 ``[rows, blocks]``.

    Raises:
        InvalidPayloadError: a word is too large, or a pair lies beyond the row's end.
    """
    blocks = -(-columns // 4)
    words = -(-blocks // _DIGITS)
    nibbles = unpack(packed, 4, _nibbles(blocks)).long()
    nibbles = pad(nibbles, (0, words * _NIBBLES - nibbles.shape[1])).view(-1, words, _NIBBLES)
    rest = torch.zeros(nibbles.shape[:2], dtype=torch.int64, device=packed.device)
    for place in range(_NIBBLES):
        rest |= nibbles[..., place] << (4 * place)
    digits = torch.empty((*rest.shape, _DIGITS), dtype=torch.uint8, device=packed.device)
    for place in range(_DIGITS):
        digits[..., place] = rest % 6
        rest = rest // 6
    pairs = digits.flatten(1)
    last = columns % 4
    allowed = max(1, last * (last - 1) // 2) if last else 6
    if bool(rest.any()) or bool(pairs[:, blocks:].any()) or bool((pairs[:, blocks - 1] >= allowed).any()):
        raise InvalidPayloadError(
            f"{_OWN} of {Sparse24.id} name places that a row of {columns} columns does not have",
            hint="the artifact is damaged or was written by another version",
        )
    return pairs[:, :blocks].contiguous()
