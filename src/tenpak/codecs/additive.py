"""``additive/1``: a sum of entries of several codebooks for neighbouring weights of a row.

Formula (FP32, added in the order of books, then one product)::

    w = scale[row]·(codebook_0[code_0] + codebook_1[code_1] + …)

Bytes, V = ceil(in/dimension) vectors per row, the last one cut off at the row's end::

    scales     FP16  [out]
    codebooks  FP16  [books, entries, dimension]
    codes      uint8 [out, ceil(V·books·log2(entries)/8)]   packed; the codes of a vector one after the other

Bits per weight: ``books·log2(entries)/dimension`` where the dimension divides the row, ``+ 16/in``, and
``16·books·entries·dimension`` bits per tensor. Two books of 256 entries reach 65,536 sums for the bytes of 512
entries, so it goes on where one codebook would grow too large; choosing the codes is what it costs (a beam search), and
sums are not free to lie where one codebook's entries could.

Additive quantization: Babenko and Lempitsky 2014; of language models: Egiazarian et al. 2024, AQLM, arXiv 2401.06118.
Here codes are first chosen with feedback of errors through the full Hessian, vector by vector, and only then improved
by sweeps over all vectors, and codebooks are solved for by conjugate gradients; see ``codebook_fit``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.codebook_fit import Plan, fit
from tenpak.codecs.codebooks import DIMENSIONS, ENTRIES, expand, packed, vector_count
from tenpak.codecs.fields_tuning import TunableFields
from tenpak.codecs.grouping import row_tiles
from tenpak.codecs.validation import require_bool, require_choice, require_integer, require_number
from tenpak.errors import MissingStatisticsError
from tenpak.kernels import packed_size, unpack
from tenpak.kernels.parallel import one_thread

__all__ = ["Additive"]


@dataclass(frozen=True)
class Additive(Codec):
    """Additive quantization.

    Attributes:
        books: number of codebooks, 1 to 4.
        dimension: weights per vector: 2, 4, 8 or 16.
        entries: of each codebook: a power of two, 16 to 65,536.
        calibrated: use Hessian and output curvature; otherwise all inputs and outputs count the same.
        beam: sums that the search for codes goes on with, 1 to 64.
        rounds: of codebooks, scales and codes after the first codes, 0 to 100; each lowers the loss.
        damping: of the Hessian, relative to its mean diagonal; 1e-6 to 1.
        seed: of k-means, 0 to 2^32 - 1.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "additive/1"

    books: int = 2
    dimension: int = 8
    entries: int = 256
    calibrated: bool = True
    beam: int = 8
    rounds: int = 6
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer(self.id, "books", self.books, 1, 4)
        require_choice(self.id, "dimension", self.dimension, DIMENSIONS)
        require_choice(self.id, "entries", self.entries, ENTRIES)
        require_bool(self.id, "calibrated", self.calibrated)
        require_integer(self.id, "beam", self.beam, 1, 64)
        require_integer(self.id, "rounds", self.rounds, 0, 100)
        require_number(self.id, "damping", self.damping, 1e-6, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_integer(self.id, "seed", self.seed, 0, (1 << 32) - 1)

    @property
    def needs_statistics(self) -> bool:
        """Whether it is calibrated."""
        return self.calibrated

    @property
    def uses_curvature(self) -> bool:
        """Whether it is calibrated."""
        return self.calibrated

    @property
    def _bits(self) -> int:
        """Of a code."""
        return self.entries.bit_length() - 1

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """Scales, codebooks, codes."""
        rows, columns = shape
        count = vector_count(columns, self.dimension)
        return (
            Field("scales", torch.float16, (rows,)),
            Field("codebooks", torch.float16, (self.books, self.entries, self.dimension)),
            Field("codes", torch.uint8, (rows, packed_size(count * self.books, self._bits))),
        )

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight``, a finite floating-point matrix ``[out, in]``; on the CPU, in one thread.

        Beyond the weight it takes an FP32 copy and, calibrated, some six FP32 copies of the Hessian.

        Raises:
            MissingStatisticsError: it is calibrated and there is no Hessian.
            CodecError: the weight is not a finite floating-point matrix, exceeds FP16's range, or the statistics do
                not fit it.
            SingularHessianError: the Hessian is indefinite.
        """
        require_matrix(weight)
        if self.calibrated and (statistics is None or statistics.metric is None):
            raise MissingStatisticsError(
                f"codec {self.id} needs the Hessian E[x xᵀ] of the weight's inputs, and there is none",
                hint="calibrate on text (--calibration TEXT), or set calibrated to false",
            )
        plan = Plan(self.dimension, self.entries, self.books, True, self.beam, self.rounds, self.seed)
        with one_thread():
            target = weight.detach().to("cpu").float().contiguous()
            fitted = fit(target, plan, self.damping, statistics if self.calibrated else None, by_magnitude=False)
            codes = packed(fitted.codes.flatten(1), self._bits)
        tensors = {"scales": fitted.scales, "codebooks": fitted.codebooks, "codes": codes}
        return self.payload(weight, {name: tensor.to(weight.device) for name, tensor in tensors.items()})

    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``."""
        tensors = self.checked(payload)
        weight = torch.empty(payload.shape, dtype=torch.float32, device=tensors["codes"].device)
        for tile in row_tiles(*payload.shape):
            self._expand(tensors["codes"][tile], tensors["scales"][tile], tensors["codebooks"], weight[tile])
        return weight

    def rows(self, indices: Tensor, prepared: Payload) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        tensors = self.checked(prepared)
        flat = indices.reshape(-1)
        weight = torch.empty((flat.numel(), prepared.shape[1]), dtype=torch.float32, device=tensors["codes"].device)
        self._expand(tensors["codes"][flat], tensors["scales"][flat], tensors["codebooks"], weight)
        return weight.view(*indices.shape, prepared.shape[1])

    def tunable(self, payload: Payload) -> TunableFields:
        """Codebooks and scales are continuous."""
        tensors, (rows, columns) = self.checked(payload), payload.shape
        count = vector_count(columns, self.dimension)
        codes = unpack(tensors["codes"], self._bits, count * self.books).view(-1, self.books).int().unbind(1)

        def weight(values: Mapping[str, Tensor]) -> Tensor:
            parts = [book[code] for book, code in zip(values["codebooks"], codes, strict=True)]
            sums = torch.stack(parts).sum(0).view(rows, -1)[:, :columns]
            return sums * values["scales"].unsqueeze(1)

        entries = tensors["codebooks"].float().square().mean().sqrt()
        return TunableFields(payload, {"scales": tensors["scales"].float().abs(), "codebooks": entries}, weight)

    def _expand(self, stream: Tensor, scales: Tensor, codebooks: Tensor, out: Tensor) -> None:
        """Decode rows into ``out``, FP32 ``[rows, in]``."""
        rows, columns = out.shape
        count = vector_count(columns, self.dimension)
        codes = unpack(stream, self._bits, count * self.books).view(rows, count, self.books)
        sums = expand(codes, codebooks.float().unbind()).view(rows, count * self.dimension)
        out.copy_(sums[:, :columns]).mul_(scales.float().unsqueeze(1))
