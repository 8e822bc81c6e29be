"""``lowrank/1``: the product of two thin factors, ``W ≈ A·B`` with A ``[out, r]`` and B ``[r, in]``.

The factors are those of least loss ::

    Σᵢ gᵢ (E M Eᵀ)ᵢᵢ        E = W - A·B

which the truncated singular value decomposition of √g·W·M^½ gives (Eckart and Young 1936). ``kind`` says what M is:

- ``plain``: the identity, the error of the weight itself
- ``magnitude``: diagonal, c² with c the mean |w| of a column
- ``activation``: diagonal, E[x²] of each input (or E|x|² where only that is known)
- ``whitened``: the Hessian E[x xᵀ], and g the output curvature where it is known; then the loss is that of the output
  (Wang et al. 2024, SVD-LLM, arXiv 2403.07378, section 3; Saha et al. 2024, CALDERA, arXiv 2405.18886, section 3)

No root of M is needed, nor its inverse: with U the first r eigenvectors of √g·W·M·Wᵀ·√g, A·B = (U/√g)·(Uᵀ·√g·W). So a
singular or indefinite M is no special case; ``damping`` only keeps what calibration never saw from being lost.
Eigenvectors are exact (FP64) for small matrices, high ranks and wherever the spectrum decides the rank; otherwise
they come from a randomised range with power iterations (Halko, Martinsson and Tropp 2011, section 4.5), seeded.

B is encoded first, in the metric in which its errors count, then A is fitted again to B as it decodes and encoded: it
makes up for much of B's error. ``factor`` may be any codec. Each pair of column and row has the same mean square in A
and in B, so neither leaves the range of FP16.

Decoding gives the same FP32 values on every machine, though a product is a sum whose order depends on the machine.
Rows of A and columns of B are rounded to 20 bits below their largest magnitude; products of such integers and sums of
2^13 of them are below 2^53, so FP64 holds them exactly in any order, and one rounding to FP32 remains. It changes an
entry by about 2^-20 of the norms of its row and column, as summing in FP32 would.

Bytes: ``rank`` int32 ``[1]``, r; the tensors of A, named ``left_…``, and of B, named ``right_…``; wider dtypes first,
otherwise in this order. Alone it is a poor codec, worse at any size than rounding: trained weights have no low rank. It
is meant as a stage of a sum.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.dense import Dense
from tenpak.codecs.grouping import row_tiles
from tenpak.codecs.lowrank_fit import (
    by_energy,
    by_error,
    factors,
    left_statistics,
    norm_corrected,
    refitted,
    right_statistics,
    target_of,
)
from tenpak.codecs.nesting import require_inner
from tenpak.codecs.validation import require_bool, require_choice, require_integer, require_number
from tenpak.errors import InvalidPayloadError, RecipeError, UnsupportedShapeError
from tenpak.kernels.parallel import one_thread

__all__ = ["LowRank"]

_RANK, _LEFT, _RIGHT = "rank", "left_", "right_"
_KINDS = ("plain", "magnitude", "activation", "whitened")
_MOST_RANK = 1 << 13
_BITS = 20  # of the integers that factors are rounded to: 2·20 + 13 = 53, the bits of an FP64 number
_MOST_WEIGHTS = 1 << 15  # per byte of a payload; a few hostile bytes must not stand for terabytes


@dataclass(frozen=True)
class LowRank(Codec):
    """A product of two thin factors. Exactly one of ``rank``, ``energy``, ``bpw`` and ``error`` is given.

    Attributes:
        rank: of the product, 1 to 8192; never more than the smaller side of the weight.
        energy: share of the squared singular values of √g·W·M^½ to keep, above 0 to 1: the smallest rank that does.
        bpw: bits per weight: the largest rank that takes no more, but at least 1.
        error: relative error of the output, √(E‖(W - A·B)x‖² / E‖Wx‖²), outputs weighted by their curvature where it is
            known: the smallest rank that does not exceed it before the factors are encoded.
        kind: ``"plain"``, ``"magnitude"``, ``"activation"`` or ``"whitened"``: how errors are weighed.
        factor: encodes the factors.
        damping: added to M, relative to its mean diagonal, 0 to 1; of no effect for ``plain``.
        norm_correction: scale A so that the product has the weight's Frobenius norm. It costs no bytes, and raises the
            error.

    Raises:
        RecipeError: a field is of the wrong type or out of range; none or several of the four are given; the factor
            holds ``lowrank/1`` in turn, or has no fixed rate where ``bpw`` needs one.
    """

    id: ClassVar[str] = "lowrank/1"

    rank: int | None = field(default=None, metadata={"optional": True})
    energy: float | None = field(default=None, metadata={"optional": True})
    bpw: float | None = field(default=None, metadata={"optional": True})
    error: float | None = field(default=None, metadata={"optional": True})
    kind: str = "whitened"
    factor: Codec = field(default=Dense("float16"))
    damping: float = 0.01
    norm_correction: bool = field(default=False, metadata={"optional": True})

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "bpw", "error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"codec {self.id}: exactly one of rank, energy, bpw and error must be given,"
                f" got {' and '.join(given) or 'none'}",
                hint='e.g. {"id": "lowrank/1", "rank": 32}',
            )
        if self.rank is not None:
            require_integer(self.id, "rank", self.rank, 1, _MOST_RANK)
        for name, low, high in (("energy", 1e-6, 1.0), ("bpw", 1e-3, 64.0), ("error", 1e-4, 1.0)):
            if getattr(self, name) is not None:
                require_number(f"codec {self.id}", name, getattr(self, name), low, high)
                object.__setattr__(self, name, float(getattr(self, name)))
        require_choice(self.id, "kind", self.kind, _KINDS)
        require_inner(self, self.factor, "factor")
        require_number(f"codec {self.id}", "damping", self.damping, 0.0, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_bool(self.id, "norm_correction", self.norm_correction)
        if _holds_lowrank(self.factor):  # its size would double with every level
            raise RecipeError(f"codec {self.id}: a factor cannot be of low rank again", hint="use another factor codec")
        if self.bpw is not None and self.factor.fields((1, 1)) is None:
            raise RecipeError(
                f"codec {self.id}: bpw needs a factor of fixed rate, {self.factor.id} has none",
                hint="give the rank instead",
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether the kind, the choice of the rank or the factors do."""
        return self.kind in ("activation", "whitened") or self.error is not None or self.factor.needs_statistics

    @property
    def uses_curvature(self) -> bool:
        """Whether the error is that of the output, or the factors do."""
        return self.kind == "whitened" or self.error is not None or self.factor.uses_curvature

    @property
    def multiplies_cheaply(self) -> bool:
        """Always: two thin products."""
        return True

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """The rank and the fields of both factors; None where the weight decides the rank, or for unknown rates."""
        rank = self._fixed_rank(shape)
        return None if rank is None else self._fields(shape, rank)

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Factor ``weight`` and encode both factors.

        Takes some FP64 copies of the weight where the decomposition is exact (and of M, if whitened), otherwise an
        FP32 copy of both and some factors.

        Raises:
            MissingStatisticsError: there is no Hessian where one is needed.
            CodecError: weight or statistics are not finite or do not fit each other, or a factor is refused.
            UnsupportedShapeError: the weight is too large for so small factors.
        """
        require_matrix(weight)
        shape = rows, columns = (weight.shape[0], weight.shape[1])
        fixed = self._fixed_rank(shape)
        with one_thread():  # sums of several threads depend on their number
            target = target_of(weight, statistics, self.kind, self.damping)
            limit = min(rows, columns, _MOST_RANK) if fixed is None else fixed
            left, right, energies = factors(target, limit, exact=fixed is None)
            if self.energy is not None:
                rank = by_energy(energies, self.energy)
                left, right = left[:, :rank], right[:rank]
            elif self.error is not None:
                rank = by_error(target.weight, left, right, statistics, self.error)
                left, right = left[:, :rank], right[:rank]
            known = right_statistics(statistics, left)
        encoded_right = self.factor.encode(right.contiguous(), known)
        right = self.factor.decode(encoded_right)
        with one_thread():
            left = refitted(target, left, right)
            left = norm_corrected(target.weight, left, right) if self.norm_correction else left
            known = left_statistics(statistics, right)
        encoded_left = self.factor.encode(left.contiguous(), known)
        tensors = {_RANK: torch.tensor([len(right)], dtype=torch.int32, device=weight.device)}
        tensors |= {_LEFT + name: tensor for name, tensor in encoded_left.tensors.items()}
        tensors |= {_RIGHT + name: tensor for name, tensor in encoded_right.tensors.items()}
        payload = self.payload(weight, dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())))
        if rows * columns > payload.bits // 8 * _MOST_WEIGHTS:
            raise UnsupportedShapeError(
                f"{self.id} of rank {len(right)} is too small for a weight {shape}", hint="use a higher rank"
            )
        return payload

    def decode(self, payload: Payload) -> Tensor:
        """The product, FP32 ``[out, in]``."""
        left, right = self._split(payload)
        return _product(self.factor.decode(left), self.factor.decode(right))

    def prepare(self, payload: Payload) -> _Prepared:
        """The runtime forms of both factors, and the payload of B."""
        left, right = self._split(payload)
        return _Prepared(self.factor.prepare(left), self.factor.prepare(right), right)

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``: two thin products, in FP32 for the range of what is between."""
        return self.factor.matmul(self.factor.matmul(x.float(), prepared.right), prepared.left).to(x.dtype)

    def rows(self, indices: Tensor, prepared: _Prepared) -> Tensor:
        """Rows ``indices`` of the product, FP32 ``[*indices.shape, in]``: of A only they are decoded."""
        right = self.factor.decode(prepared.payload)
        left = self.factor.rows(indices.reshape(-1), prepared.left)
        return _product(left, right).view(*indices.shape, right.shape[1])

    def _fixed_rank(self, shape: tuple[int, int]) -> int | None:
        """The rank where configuration and shape tell it."""
        most = min(*shape, _MOST_RANK)
        if self.rank is not None:
            return min(self.rank, most)
        if self.bpw is None:
            return None
        low, high = 1, most
        while low < high:  # sizes grow with the rank
            middle = (low + high + 1) // 2
            size = 8 * sum(f.nbytes for f in self._fields(shape, middle) or ())
            low, high = (middle, high) if size <= self.bpw * shape[0] * shape[1] else (low, middle - 1)
        return low

    def _fields(self, shape: tuple[int, int], rank: int) -> tuple[Field, ...] | None:
        left, right = self.factor.fields((shape[0], rank)), self.factor.fields((rank, shape[1]))
        if left is None or right is None:
            return None
        parts = ((_LEFT, left), (_RIGHT, right))
        named = [dataclasses.replace(f, name=prefix + f.name) for prefix, part in parts for f in part]
        return tuple(sorted((Field(_RANK, torch.int32, (1,)), *named), key=lambda f: -f.dtype.itemsize))

    def _split(self, payload: Payload) -> tuple[Payload, Payload]:
        """The payloads of A and B, which ``factor`` checks itself."""
        rows, columns = payload.shape
        parts: dict[str, dict[str, Tensor]] = {_LEFT: {}, _RIGHT: {}}
        for name, tensor in payload.tensors.items():
            prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
            if prefix is not None:
                parts[prefix][name.removeprefix(prefix)] = tensor
            elif name != _RANK:
                raise _damaged(payload, f"an unexpected tensor {name!r}")
        stored = payload.tensors.get(_RANK)
        if stored is None or stored.dtype != torch.int32 or tuple(stored.shape) != (1,):
            raise _damaged(payload, f"no {_RANK}, int32 [1]")
        rank = int(stored)
        if not 1 <= rank <= min(rows, columns, _MOST_RANK):
            raise _damaged(payload, f"the rank {rank}")
        if rows * columns > payload.bits // 8 * _MOST_WEIGHTS:
            raise _damaged(payload, f"only {payload.bits // 8} bytes")

        def part(prefix: str, shape: tuple[int, int]) -> Payload:
            return Payload(self.factor.to_json(), shape, torch.float32, parts[prefix])

        return part(_LEFT, (rows, rank)), part(_RIGHT, (rank, columns))


@dataclass(frozen=True)
class _Prepared:
    """The runtime form: of A, of B, and the payload of B."""

    left: Any
    right: Any
    payload: Payload


def _damaged(payload: Payload, what: str) -> InvalidPayloadError:
    return InvalidPayloadError(
        f"payload of {LowRank.id} for shape {payload.shape} holds {what}",
        hint="the artifact is damaged or was written by another version",
    )


def _holds_lowrank(codec: Codec) -> bool:
    values = (getattr(codec, f.name) for f in dataclasses.fields(codec))
    return isinstance(codec, LowRank) or any(_holds_lowrank(value) for value in values if isinstance(value, Codec))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, FP32 ``[n, r]`` and ``[r, in]``: the same on every machine, see above.

    Raises:
        InvalidPayloadError: a factor is not finite.
    """
    for part in (left, right):
        if part.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):
            raise InvalidPayloadError(
                f"a factor of a {LowRank.id} payload holds NaN or infinite values", hint="the artifact is damaged"
            )
    a, a_unit = _integers(left, 1)
    b, b_unit = _integers(right, 0)
    product = torch.empty((len(left), right.shape[1]), dtype=torch.float32, device=left.device)
    for tile in row_tiles(*product.shape):
        # Exact in FP64 up to the rounding to FP32. Adding zero makes a zero positive: its sign depends on the order.
        product[tile] = (a[tile] @ b).add_(0.0).mul_(a_unit[tile]).mul_(b_unit)
    return product


def _integers(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Integers of at most 20 bits and the powers of two they are in, one along ``dim``, both FP64."""
    largest = values.abs().amax(dim, keepdim=True).double()
    exponent = torch.frexp(largest).exponent.long() - _BITS  # the largest is below 2^(exponent + 20); 0 gives 0
    return (values.double() * _power_of_two(-exponent)).round(), _power_of_two(exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, FP64: its bits, since a power function may be off by one in the last place on some machine."""
    return ((exponent + 1023) << 52).view(torch.float64)
