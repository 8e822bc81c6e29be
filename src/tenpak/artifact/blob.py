"""Payloads as bytes: a compressed tensor is one uint8 tensor that holds its payloads' fields back to back.

One tensor per weight keeps headers small (a safetensors entry costs about a hundred bytes). Fields follow each other
without padding, little-endian; the manifest lists their names, dtypes and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tenpak.artifact.schema import FieldSpec, Layout, WeightEntry
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.source import TORCH_DTYPES, dtype_name
from tenpak.codecs.base import Payload
from tenpak.errors import CorruptArtifactError

__all__ = ["join", "layouts", "matrix_shape", "split"]


def join(payloads: Iterable[Payload]) -> Tensor:
    """The payloads' bytes, uint8 ``[n]``."""
    parts = [
        tensor.contiguous().reshape(-1).view(torch.uint8) for payload in payloads for tensor in payload.tensors.values()
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def layouts(payloads: Sequence[Payload]) -> tuple[Layout, ...]:
    """What the manifest says about the payloads that ``join`` wrote, equal neighbours counted together."""
    found: list[Layout] = []
    for payload in payloads:
        fields = tuple(
            FieldSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in payload.tensors.items()
        )
        if found and found[-1].fields == fields:
            found[-1] = Layout(count=found[-1].count + 1, fields=fields)
        else:
            found.append(Layout(count=1, fields=fields))
    return tuple(found)


def split(blob: Tensor, entry: WeightEntry, shared: Mapping[str, Tensor]) -> list[Payload]:
    """The payloads in ``blob`` (uint8 ``[n]``); their tensors are views of it where alignment allows.

    Args:
        blob: what is stored of the weight.
        entry: what the manifest says of it.
        shared: the tensors that its payloads share with those of other weights, by field.

    Raises:
        CorruptArtifactError: ``blob`` has another length than the entry's fields.
    """
    shape = matrix_shape(entry)
    dtype = TORCH_DTYPES[entry.dtype]
    payloads, position = [], 0
    for layout in entry.payloads:
        for _ in range(layout.count):
            tensors = {}
            for spec in layout.fields:
                size = field_bytes(spec)
                if position + size > blob.numel():
                    raise CorruptArtifactError("a payload is shorter than its manifest says")
                part = blob[position : position + size]
                if part.storage_offset() % DTYPE_BYTES[spec.dtype]:
                    part = part.clone()  # torch reinterprets bytes only at aligned addresses
                tensors[spec.name] = part.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
                position += size
            payloads.append(Payload(entry.codec, shape, dtype, tensors, shared))
    if position != blob.numel():
        raise CorruptArtifactError("a payload is longer than its manifest says")
    return payloads


def matrix_shape(entry: WeightEntry) -> tuple[int, int]:
    """``(out, in)`` of each matrix of a compressed tensor."""
    first, second = entry.shape[-2:]
    return (second, first) if entry.transposed else (first, second)


def field_bytes(spec: FieldSpec) -> int:
    """Size of one field in bytes."""
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]
