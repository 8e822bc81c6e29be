"""``rotated/1``: a codec on a weight whose input side is rotated, which spreads outliers over all columns.

Formula, for each row w of the weight and each input x, both of length n::

    w' = Q w, x' = Q x        w'·x' = w·x
    Q = B₂ S₂ B₁ S₁           or B₁ S₁ where n is a power of two

N is the largest power of two not above n. B₁ is the orthonormal Hadamard matrix of size N on the first N coordinates,
B₂ the same on the last N; they overlap, so that everything is mixed. S₁ and S₂ are diagonal matrices of random signs;
without S₂, what B₁ spreads B₂ would gather again. Any length takes at most 2 N log₂ N additions and no table. (A
Kronecker product of a Hadamard matrix and a dense orthogonal one, for the odd factor of n, gave the same losses to one
percent on layers of 352 and 768 inputs. It is slow where that factor is large.)

Outliers among weights decide the range of their group's grid, at the cost of all others; after a rotation by random
signs and a Hadamard matrix all weights look normal (Tseng et al. 2024, QuIP#, arXiv 2402.04396, section 3; Ashkboos et
al. 2024, QuaRot, arXiv 2404.00456). The Hessian of the rotated inputs is Q H Qᵀ. Only the input side is rotated: on the
output side the curvatures of the rows would be mixed.

Decoding gives the same FP32 values on every machine:

- Signs: sign k is minus where the highest bit of output k of splitmix64, started at ``seed``, is set (Steele, Lea and
  Flood 2014, "Fast splittable pseudorandom number generators"). S₁ has signs 0 … n-1, S₂ n … 2n-1.
- B: for h = 1, 2, 4, … N/2, of each two entries whose places differ in bit h their sum and their difference, in FP32;
  at the end one product with 2^(-k/2), N = 2^k, in FP32 (for odd k 0.70710677 times a power of two).
- The transpose is B₂, S₂, B₁, S₁ in this order, each its own inverse. Rotating and rotating back leaves FP32 rounding,
  below 1e-6 of a row's norm.

Bytes: the tensors of ``inner``, nothing else; the seed is in the configuration. Encoding takes an FP32 copy of the
weight and two of the Hessian.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.grouping import row_tiles
from tenpak.codecs.nesting import inner_payload, require_inner
from tenpak.codecs.validation import require_integer
from tenpak.errors import CodecError

__all__ = ["Rotated", "rotate", "rotate_back"]

_HALF = 0.7071067811865476  # √½, as FP64 rounds it


@dataclass(frozen=True)
class Rotated(Codec):
    """A codec on a weight with a rotated input side.

    Attributes:
        inner: encodes the rotated weight, with the statistics of its inputs.
        seed: of the signs, 0 to 2^32 - 1.

    Raises:
        RecipeError: ``inner`` is not a codec, there are too many inside one another, or the seed is out of range.
    """

    id: ClassVar[str] = "rotated/1"

    inner: Codec
    seed: int = 0

    def __post_init__(self) -> None:
        require_inner(self, self.inner)
        require_integer(self.id, "seed", self.seed, 0, (1 << 32) - 1)

    @property
    def needs_statistics(self) -> bool:
        """Whether ``inner`` does."""
        return self.inner.needs_statistics

    @property
    def uses_curvature(self) -> bool:
        """Whether ``inner`` does."""
        return self.inner.uses_curvature

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """The fields of ``inner``."""
        return self.inner.fields(shape)

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Rotate ``weight`` and encode it with ``inner``.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, the statistics do not fit it, or ``inner``
                refuses the rotated weight.
            CalibrationError: the statistics lack what ``inner`` needs.
        """
        require_matrix(weight)
        rotated = None if statistics is None else _rotated(statistics, weight.shape[1], self.seed)
        return self.payload(weight, self.inner.encode(rotate(weight, self.seed), rotated).tensors)

    def decode(self, payload: Payload) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        return rotate_back(self.inner.decode(self._inner(payload)), self.seed)

    def prepare(self, payload: Payload) -> Any:
        """The runtime form of ``inner``."""
        return self.inner.prepare(self._inner(payload))

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``: the product of ``inner`` with Q x, rotated in FP32."""
        return self.inner.matmul(rotate(x, self.seed).to(x.dtype), prepared)

    def rows(self, indices: Tensor, prepared: Any) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        return rotate_back(self.inner.rows(indices, prepared), self.seed)

    def _inner(self, payload: Payload) -> Payload:
        return inner_payload(self.inner, payload, payload.tensors)


def rotate(x: Tensor, seed: int) -> Tensor:
    """Q x along the last dimension, FP32 of the shape of ``x``."""
    return _in_tiles(x, seed, forward=True)


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """Qᵀ x along the last dimension, FP32 of the shape of ``x``."""
    return _in_tiles(x, seed, forward=False)


def _in_tiles(x: Tensor, seed: int, *, forward: bool) -> Tensor:
    n = x.shape[-1]
    signs = _signs(seed, 2 * n, x.device).unsqueeze(-1)
    turn = _forward if forward else _back
    flat = x.reshape(-1, n)
    # Columns come first while they are turned, so that every addition runs over contiguous rows.
    out = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
    for tile in row_tiles(*flat.shape):
        out[tile] = turn(flat[tile].float().T.contiguous(), signs[:n], signs[n:]).T
    return out.view(x.shape)


def _forward(v: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Q v, FP32 ``[n, rows]``."""
    size = _block(len(v))
    v = v * first
    v = torch.cat((_hadamard(v[:size]), v[size:]))
    if size == len(v):
        return v
    v = v * second
    return torch.cat((v[:-size], _hadamard(v[-size:])))


def _back(v: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Qᵀ v, FP32 ``[n, rows]``."""
    size = _block(len(v))
    if size < len(v):
        v = torch.cat((v[:-size], _hadamard(v[-size:]))) * second
    return torch.cat((_hadamard(v[:size]), v[size:])) * first


def _block(n: int) -> int:
    """The largest power of two not above ``n``."""
    return 1 << (n.bit_length() - 1)


def _hadamard(v: Tensor) -> Tensor:
    """The orthonormal Hadamard matrix times ``v``, FP32 ``[2^k, rows]``."""
    size = len(v)
    step = 1
    while step < size:
        pairs = v.reshape(size // (2 * step), 2, step, -1)
        one, other = pairs[:, 0], pairs[:, 1]
        v = torch.stack((one + other, one - other), 1)
        step *= 2
    halvings, odd = divmod(size.bit_length() - 1, 2)
    return v.reshape(size, -1) * ((_HALF if odd else 1.0) * 0.5**halvings)


def _signs(seed: int, count: int, device: torch.device) -> Tensor:
    """The first signs of a seed, FP32 ``[count]``; int64 arithmetic wraps around as that of unsigned 64 bits does."""

    def signed(constant: int) -> int:
        return constant - (1 << 64) if constant >> 63 else constant

    def shifted(z: Tensor, by: int) -> Tensor:
        return z >> by & (1 << (64 - by)) - 1

    z = torch.arange(1, count + 1) * signed(0x9E3779B97F4A7C15) + seed
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    # splitmix64 ends with z ^ (z >> 31), which leaves the highest bit as it is.
    return torch.where(z < 0, -1.0, 1.0).to(device)


def _rotated(statistics: Statistics, columns: int, seed: int) -> Statistics:
    """The statistics of the inputs Q x. E|x| of them is not known.

    Of an embedding, the cost of an error in the looked-up row has no diagonal form any more; it goes into the Hessian.
    """

    def both_sides(matrix: Tensor | None) -> Tensor | None:
        if matrix is None:
            return None
        if tuple(matrix.shape) != (columns, columns):
            raise CodecError(f"the Hessian is {tuple(matrix.shape)}, the weight has {columns} input columns")
        return rotate(rotate(matrix, seed).T, seed).T

    metric = both_sides(statistics.metric)
    return dataclasses.replace(
        statistics,
        hessian=None if metric is None else ((metric + metric.T) / 2),
        cross=both_sides(statistics.cross),
        mean=None if statistics.mean is None else rotate(statistics.mean, seed),
        mean_abs=None,
        output_curvature=statistics.row_weight,
        token_frequency=None,
        input_curvature=None,
    )
