"""``entropycoded/1``: any codec of a fixed rate with its payload entropy-coded, without loss.

``decode(encode(w))`` is, to the bit, what ``inner`` makes of ``w``; only the size is another, and known after coding
only. Codes on a grid that covers its group are far from uniform, which is 3 to 7 % of their bits at 3 and 4 bits;
scales and offsets have few exponents, which is a third of theirs.

Bytes: one field, ``stream`` (uint8): the bytes of the fields of ``inner``, one plane for each byte of an entry, so that
the exponents of FP16 are apart from the bits below, which are noise. Each plane is coded as ``planes`` does, or left as
it is where that saves nothing: a payload is at most one byte per plane larger than that of ``inner``.

It is a form for storage. ``prepare`` decodes the stream once and hands its payload to ``inner``, so in memory and in
products it is what ``inner`` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.nesting import inner_payload, require_inner
from tenpak.codecs.planes import read, write
from tenpak.codecs.streams import ByteReader
from tenpak.errors import InvalidPayloadError, RecipeError

__all__ = ["EntropyCoded"]

_STREAM = "stream"
_MOST_BYTES = 1 << 15  # of a payload per byte of a stream: a symbol takes 2^-11.5 bits at least


@dataclass(frozen=True)
class EntropyCoded(Codec):
    """A codec with an entropy-coded payload.

    Attributes:
        inner: encodes the weight; its rate is fixed.

    Raises:
        RecipeError: ``inner`` is not a codec or has no fixed rate, or there are too many inside one another.
    """

    id: ClassVar[str] = "entropycoded/1"

    inner: Codec

    def __post_init__(self) -> None:
        require_inner(self, self.inner)
        if self.inner.fields((1, 1)) is None:
            raise RecipeError(
                f"codec {self.id}: inner must have a fixed rate, and that of {self.inner.id} follows from coding",
                hint="it is entropy-coded already: use it as it is",
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether ``inner`` does."""
        return self.inner.needs_statistics

    @property
    def uses_curvature(self) -> bool:
        """Whether ``inner`` does."""
        return self.inner.uses_curvature

    @property
    def multiplies_cheaply(self) -> bool:
        """Whether ``inner`` does."""
        return self.inner.multiplies_cheaply

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight`` with ``inner`` and code the payload.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, or ``inner`` refuses it.
            CalibrationError: the statistics lack what ``inner`` needs.
        """
        require_matrix(weight)
        tensors = self.inner.encode(weight, statistics).tensors
        sections = [write(plane) for tensor in tensors.values() for plane in _planes(tensor.cpu())]
        return self.payload(weight, {_STREAM: torch.cat(sections).to(weight.device)})

    def decode(self, payload: Payload) -> Tensor:
        """The weight as ``inner`` decodes it, FP32 ``[out, in]``.

        Raises:
            InvalidPayloadError: the stream is damaged.
        """
        return self.inner.decode(self._inner(payload))

    def prepare(self, payload: Payload) -> Any:
        """The runtime form of ``inner``."""
        return self.inner.prepare(self._inner(payload))

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, in the dtype of ``x``: the product of ``inner``."""
        return self.inner.matmul(x, prepared)

    def rows(self, indices: Tensor, prepared: Any) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``: those of ``inner``."""
        return self.inner.rows(indices, prepared)

    def _inner(self, payload: Payload) -> Payload:
        """The payload of ``inner``."""
        found = {name: (t.dtype, t.ndim) for name, t in payload.tensors.items()}
        if found != {_STREAM: (torch.uint8, 1)}:
            raise InvalidPayloadError(f"payload of {self.id} holds {found}, expected a uint8 vector {_STREAM!r}")
        stream = payload.tensors[_STREAM]
        data = ByteReader(self.id, stream.cpu())
        fields = self.inner.fields(payload.shape) if min(payload.shape) > 0 else None
        # Before any memory is taken.
        if fields is None or sum(field.nbytes for field in fields) > len(stream) * _MOST_BYTES:
            raise data.damaged(f"it cannot hold a weight {list(payload.shape)}")
        tensors = {field.name: _read_field(data, field).to(stream.device) for field in fields}
        if data.at != len(stream):
            raise data.damaged("its length")
        return inner_payload(self.inner, payload, tensors)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a plane of a tensor of this shape: a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(rows, 1)


def _planes(tensor: Tensor) -> list[Tensor]:
    """The first bytes of all entries, the second ones and so on, each uint8 ``[rows, columns]``."""
    # A copy: of a dimension of one entry the stride may be anything, which a view as bytes does not take.
    entries = tensor.clone(memory_format=torch.contiguous_format)
    entries = entries.reshape(*_grid(tuple(tensor.shape)), 1).view(torch.uint8)
    return [plane.contiguous() for plane in entries.unbind(-1)]


def _read_field(data: ByteReader, field: Field) -> Tensor:
    """The field whose planes come next."""
    planes = [read(data, *_grid(field.shape)) for _ in range(field.dtype.itemsize)]
    return torch.stack(planes, -1).view(field.dtype).reshape(field.shape)
