"""What ``vector/1`` and ``additive/1`` share: a weight made of sums of codebook entries, and how it is encoded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_hessian, require_matrix
from tenpak.codecs.codebook_fit import Plan, fit
from tenpak.codecs.codebooks import expand, packed, vector_count
from tenpak.codecs.fields_tuning import TunableFields
from tenpak.codecs.grouping import row_tiles
from tenpak.kernels import packed_size, unpack
from tenpak.kernels.parallel import one_thread

__all__ = ["CodebookCodec"]


class CodebookCodec(Codec):
    """A codec whose weight is, in FP32, the sum of an entry of each book, times the row's scale where there is one."""

    _books: ClassVar[str]  # name of the field that holds the codebooks
    _remedy: ClassVar[str]  # what to do without statistics
    damping: float

    @property
    @abstractmethod
    def _plan(self) -> Plan:
        """What is searched for."""

    @property
    def _by_magnitude(self) -> bool:
        """Whether vectors count as much as they are long."""
        return False

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """Scales where rows have them, codebooks unless weights share them, codes."""
        plan, (rows, columns) = self._plan, shape
        count = vector_count(columns, plan.dimension) * plan.books
        return (
            *((Field("scales", torch.float16, (rows,)),) if plan.scaled else ()),
            *(() if self.shared_fields else (Field(self._books, torch.float16, self._books_shape),)),
            Field("codes", torch.uint8, (rows, packed_size(count, _bits(plan)))),
        )

    @property
    def _books_shape(self) -> tuple[int, ...]:
        return self._plan.books, self._plan.entries, self._plan.dimension

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight``, a finite floating-point matrix ``[out, in]``; on the CPU, in one thread.

        Beyond the weight it takes an FP32 copy and, calibrated, some six FP32 copies of the Hessian.

        Raises:
            MissingStatisticsError: it is calibrated and there is no Hessian.
            CodecError: the weight is not a finite floating-point matrix, exceeds FP16's range, or the statistics do
                not fit it.
            SingularHessianError: the Hessian is indefinite.
        """
        return self.encode_sharing(weight, self.learn([weight]), statistics)

    def encode_sharing(
        self, weight: Tensor, shared: Mapping[str, Tensor], statistics: Statistics | None = None
    ) -> Payload:
        """``encode`` with the ``shared`` codebooks, if any, as they are. Raises as ``encode`` does."""
        require_matrix(weight)
        plan, known = self._plan, None
        if self.needs_statistics:
            known = require_hessian(f"codec {self.id} needs", statistics, self._remedy)
        with one_thread():
            target = weight.detach().to("cpu").float().contiguous()
            given = torch.stack(self._unbound(shared[self._books].cpu())) if shared else None
            fitted = fit(target, plan, self.damping, known, self._by_magnitude, given)
            codes = packed(fitted.codes.flatten(1), _bits(plan))
        tensors = {"scales": fitted.scales} if plan.scaled else {}
        tensors |= {} if shared else {self._books: fitted.codebooks.reshape(self._books_shape)}
        tensors["codes"] = codes
        return self.payload(weight, tensors, shared).to(weight.device)

    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``."""
        tensors = self.checked(payload)
        weight = torch.empty(payload.shape, dtype=torch.float32, device=tensors["codes"].device)
        for tile in row_tiles(*payload.shape):
            self._expand(tensors, tile, weight[tile])
        return weight

    def rows(self, indices: Tensor, prepared: Payload) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        tensors = self.checked(prepared)
        flat = indices.reshape(-1)
        weight = torch.empty((flat.numel(), prepared.shape[1]), dtype=torch.float32, device=tensors["codes"].device)
        self._expand(tensors, flat, weight)
        return weight.view(*indices.shape, prepared.shape[1])

    def tunable(self, payload: Payload) -> TunableFields:
        """Codebooks are continuous unless weights share them, and scales where rows have them."""
        tensors, (rows, columns) = self.checked(payload), payload.shape
        codes = self._codes(tensors["codes"], columns).view(-1, self._plan.books).int().unbind(1)
        found = tensors[self._books].float()

        def weight(values: Mapping[str, Tensor]) -> Tensor:
            books = self._unbound(values.get(self._books, found))
            parts = [book.index_select(0, code) for book, code in zip(books, codes, strict=True)]
            sums = torch.stack(parts).sum(0).view(rows, -1)[:, :columns]
            return sums * values["scales"].unsqueeze(1) if "scales" in values else sums

        units = {"scales": tensors["scales"].float().abs()} if "scales" in tensors else {}
        units |= {} if self.shared_fields else {self._books: found.square().mean().sqrt()}
        return TunableFields(payload, units, weight)

    def _expand(self, tensors: Mapping[str, Tensor], rows: slice | Tensor, out: Tensor) -> None:
        """Decode some rows into ``out``, FP32 ``[rows, in]``."""
        codes = self._codes(tensors["codes"][rows], out.shape[1])
        sums = expand(codes, self._unbound(tensors[self._books].float()))
        out.copy_(sums.flatten(1)[:, : out.shape[1]])
        if "scales" in tensors:
            out.mul_(tensors["scales"][rows].float().unsqueeze(1))

    def _codes(self, stream: Tensor, columns: int) -> Tensor:
        """Codes of rows, ``[rows, vectors, books]``."""
        plan = self._plan
        count = vector_count(columns, plan.dimension)
        return unpack(stream, _bits(plan), count * plan.books).view(len(stream), count, plan.books)

    def _unbound(self, books: Tensor) -> tuple[Tensor, ...]:
        """The books one by one, each ``[entries, dimension]``."""
        return books.view(-1, self._plan.entries, self._plan.dimension).unbind()


def _bits(plan: Plan) -> int:
    """Of a code."""
    return plan.entries.bit_length() - 1
