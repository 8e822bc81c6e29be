"""Compressed tensors: what every compressor here returns, and its file.

A weight is a sum of payloads, each of a codec. Patterns that weights share are held and stored once. A file (see
``files``) holds

    patterns                 FP16 [n, size, size], where they are shared: ``patterns`` of every ``pattern/1`` payload
    PART:FIELD:NAME          a payload's tensor; PART counts the payloads that are added
    dense:NAME               a tensor as it was
    about                    shapes, dtypes, codecs, errors

and every ratio counts all of it, header included.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tenpak.checkpoint.source import TORCH_DTYPES, dtype_name
from tenpak.codecs import registry
from tenpak.codecs.base import Payload
from tenpak.codecs.pattern import Pattern
from tenpak.errors import CodecError, InvalidPayloadError, UnknownCodecError
from tenpak.pixel.files import About, damaged, file_bytes, read_file, write_file

__all__ = ["CompressedTensor", "CompressedTensors", "PatternRefs", "decoded", "measured"]

_SHARED, _DENSE = "patterns", "dense"


@dataclass(frozen=True)
class PatternRefs:
    """What the blocks of a weight are made of, row by row of blocks.

    Attributes:
        ids: of patterns in the dictionary, int64 ``[blocks, terms]``.
        scales: by which they are multiplied, FP32 ``[blocks, terms]``.
    """

    ids: Tensor
    scales: Tensor


@dataclass(frozen=True)
class CompressedTensor:
    """A weight as a sum of payloads.

    Attributes:
        payloads: of matrices ``[out, in]``, to be added in FP32 in this order.
        shape: of the tensor as it was; leading dimensions are rows of the matrix.
        transposed: the tensor is the transposed matrix, ``[in, out]``.
        error: ‖W - Ŵ‖ / ‖W‖ (Frobenius), 0 for a weight of zeros.
        energy: ‖W‖².
    """

    payloads: tuple[Payload, ...]
    shape: tuple[int, ...]
    transposed: bool
    error: float
    energy: float

    def decode(self) -> Tensor:
        """The tensor, in its own shape and dtype.

        Raises:
            InvalidPayloadError: a payload is damaged.
        """
        matrix = decoded(self.payloads).to(self.payloads[0].dtype)
        return (matrix.T.contiguous() if self.transposed else matrix).view(self.shape)


def decoded(payloads: tuple[Payload, ...]) -> Tensor:
    """The sum of payloads, FP32 ``[out, in]``."""
    first, *others = (registry.from_json(payload.codec).decode(payload) for payload in payloads)
    for other in others:
        first = first + other
    return first


def measured(
    weight: Tensor, payloads: tuple[Payload, ...], *, shape: tuple[int, ...] | None = None, transposed: bool = False
) -> CompressedTensor:
    """The compressed form of a matrix ``[out, in]``, its error measured on what the payloads decode to."""
    weight = weight.detach()
    energy = float(weight.double().square().sum())
    lost = float((weight.double() - decoded(payloads)).square().sum())
    moved = tuple(payload.to("cpu") for payload in payloads)
    error = math.sqrt(lost / energy) if energy > 0 else 0.0
    return CompressedTensor(moved, tuple(weight.shape) if shape is None else shape, transposed, error, energy)


@dataclass(frozen=True)
class CompressedTensors:
    """Compressed tensors and those that stay as they are.

    Attributes:
        weights: name → compressed tensor.
        dense: name → tensor as it was, not copied.
        tied: name → name of the tensor whose memory it shares; stored and counted once.
        patterns: that all ``pattern/1`` payloads share, FP16 ``[n, size, size]``; None where each has its own.
        pattern_ids: ids in the dictionary by a pattern's place in payloads, those made by code first.
    """

    weights: Mapping[str, CompressedTensor]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    patterns: Tensor | None = None
    pattern_ids: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(w.shape) for w in self.weights.values()) + sum(t.numel() for t in self.dense.values())

    @property
    def nbytes(self) -> int:
        """Size in bytes of the file that ``save`` writes."""
        return file_bytes(self._tensors(), self._about())

    @property
    def compression_ratio(self) -> float:
        """Bytes of all tensors in FP32, divided by ``nbytes``."""
        return 4 * self.parameters / self.nbytes

    @property
    def ratio_checkpoint(self) -> float:
        """Bytes of all tensors in their own dtypes, divided by ``nbytes``."""
        own = sum(math.prod(w.shape) * w.payloads[0].dtype.itemsize for w in self.weights.values())
        return (own + sum(t.numel() * t.element_size() for t in self.dense.values())) / self.nbytes

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of each compressed tensor, ‖W - Ŵ‖ / ‖W‖."""
        return {name: weight.error for name, weight in self.weights.items()}

    @property
    def reconstruction_error(self) -> float:
        """Relative error of all compressed tensors together, √(Σ‖W - Ŵ‖² / Σ‖W‖²); 0 where there are none."""
        energy = sum(weight.energy for weight in self.weights.values())
        return math.sqrt(sum(w.error**2 * w.energy for w in self.weights.values()) / energy) if energy > 0 else 0.0

    @property
    def pattern_refs(self) -> dict[str, PatternRefs]:
        """What patterns the tensors are made of, for those that have some.

        Raises:
            InvalidPayloadError: a payload is damaged.
        """
        found = {}
        for name, weight in self.weights.items():
            for payload in weight.payloads:
                codec = registry.from_json(payload.codec)
                if isinstance(codec, Pattern):
                    places, scales = codec.references(payload)
                    ids = torch.tensor(self.pattern_ids)[places] if self.pattern_ids else places
                    found[name] = PatternRefs(ids, scales)
        return found

    def decompress(self) -> dict[str, Tensor]:
        """All tensors, in their own shapes and dtypes.

        Raises:
            InvalidPayloadError: a payload is damaged; the message names the tensor.
        """
        tensors = dict(self.dense)
        for name, weight in self.weights.items():
            try:
                tensors[name] = weight.decode()
            except InvalidPayloadError as error:
                raise InvalidPayloadError(f"{name}: {error}", hint=error.hint) from error
        return tensors | {name: tensors[other] for name, other in self.tied.items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of ``nbytes`` bytes.

        Raises:
            ArtifactError: it cannot be written.
            UnsupportedDtypeError: tenpak does not store the dtype of a dense tensor.
        """
        write_file(path, self._tensors(), self._about())

    @classmethod
    def load(cls, path: str | Path) -> CompressedTensors:
        """Read what ``save`` wrote.

        Raises:
            CorruptArtifactError: it is no such file, or was changed since it was written.
            UnknownCodecError: this tenpak does not have one of its codecs.
        """
        tensors, about = read_file(path, _About)
        dense = {}
        parts: dict[tuple[str, int], dict[str, Tensor]] = defaultdict(dict)
        shared = tensors.pop(_SHARED, None)
        for key, tensor in tensors.items():
            part, _, rest = key.partition(":")
            if part == _DENSE:
                dense[rest] = tensor
                continue
            name = rest.partition(":")[2]
            if not part.isdecimal() or name not in about.weights or int(part) >= len(about.weights[name].codecs):
                raise damaged(path, f"nothing is said about its tensor {key!r}")
            parts[name, int(part)][rest.partition(":")[0]] = tensor
        weights = {}
        for name, entry in about.weights.items():
            try:
                of_it = [parts[name, part] for part in range(len(entry.codecs))]
                weights[name] = entry.restored(of_it, shared, len(about.pattern_ids))
            except UnknownCodecError:
                raise
            except CodecError as error:
                raise damaged(path, f"{name}: {error}") from error
        if not set(about.tied.values()) <= {*weights, *dense}:
            raise damaged(path, "a tensor is tied to one that is not there")
        return cls(weights, dense, about.tied, shared, about.pattern_ids)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {} if self.patterns is None else {_SHARED: self.patterns}
        for name, weight in self.weights.items():
            for part, payload in enumerate(weight.payloads):
                for key, tensor in payload.tensors.items():
                    if self.patterns is None or key != _SHARED:
                        tensors[f"{part}:{key}:{name}"] = tensor
        return tensors | {f"{_DENSE}:{name}": tensor for name, tensor in self.dense.items()}

    def _about(self) -> _About:
        return _About(
            format="tenpak-pixel-tensors/1",
            weights={name: _Entry.of(weight) for name, weight in self.weights.items()},
            tied=dict(self.tied),
            pattern_ids=self.pattern_ids,
        )


_Natural = Annotated[int, Field(ge=0, lt=2**62)]
_Positive = Annotated[int, Field(ge=1, lt=2**62)]


class _Entry(About):
    """A compressed tensor without its data."""

    shape: Annotated[tuple[_Positive, ...], Field(min_length=2, max_length=8)]
    dtype: str
    transposed: bool
    error: float
    energy: float
    codecs: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=16)]

    @classmethod
    def of(cls, weight: CompressedTensor) -> _Entry:
        first = weight.payloads[0]
        return cls(
            shape=weight.shape,
            dtype=dtype_name(first.dtype),
            transposed=weight.transposed,
            error=weight.error,
            energy=weight.energy,
            codecs=tuple(dict(payload.codec) for payload in weight.payloads),
        )

    def restored(self, parts: list[dict[str, Tensor]], shared: Tensor | None, ids: int) -> CompressedTensor:
        """The tensor of these payloads' tensors, where so many patterns have an id.

        Raises:
            CodecError: the entry contradicts itself or the patterns that are shared.
        """
        dtype = TORCH_DTYPES.get(self.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise CodecError(f"{self.dtype} is no dtype of a weight")
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        matrix = (columns, rows) if self.transposed else (rows, columns)
        payloads = []
        for config, tensors in zip(self.codecs, parts, strict=True):
            codec = registry.from_json(config)
            if shared is not None and isinstance(codec, Pattern):
                if codec.made + codec.learned != ids:
                    raise CodecError(f"{ids} patterns have an id, of {codec.made + codec.learned}")
                given = codec.shared(shared, matrix)
                tensors = {_SHARED: given, **tensors} if len(given) else tensors
            payloads.append(Payload(codec.to_json(), matrix, dtype, tensors))
        return CompressedTensor(tuple(payloads), self.shape, self.transposed, self.error, self.energy)


class _About(About):
    format: Literal["tenpak-pixel-tensors/1"]
    weights: dict[str, _Entry]
    tied: dict[str, str]
    pattern_ids: tuple[_Natural, ...]
