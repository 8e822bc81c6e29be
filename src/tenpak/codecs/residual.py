"""``residual/1``: a codec on what another leaves, ``W ≈ base(W) + rest(W - base(W))``.

The sum is made in FP32. Nesting gives sums of any number of stages: ``a + b + c`` is ``Residual(a, Residual(b, c))``.

Bytes: the tensors of both stages, named ``base_…`` and ``rest_…``; wider dtypes come first so that all stay aligned,
otherwise in the order of the stages. Bits per weight: the sum of the stages'. Encoding needs one FP32 copy of the
weight (what remains), decoding a second one for the stage being added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.errors import InvalidPayloadError, RecipeError

__all__ = ["Residual"]

_MOST_STAGES = 16  # more bring nothing, and a hostile configuration must not nest without end


@dataclass(frozen=True)
class _Prepared:
    payload: Payload
    base: Any
    rest: Any


@dataclass(frozen=True)
class Residual(Codec):
    """The sum of two codecs.

    Attributes:
        base: encodes the weight.
        rest: encodes what ``base`` leaves.

    Raises:
        RecipeError: a stage is not a codec, or there are more than 16.
    """

    id: ClassVar[str] = "residual/1"

    base: Codec
    rest: Codec

    def __post_init__(self) -> None:
        for name in ("base", "rest"):
            if not isinstance(getattr(self, name), Codec):
                raise RecipeError(
                    f"codec {self.id}: {name} must be a codec, got {getattr(self, name)!r}",
                    hint='write it as {"id": ..., ...}',
                )
        if self.stages > _MOST_STAGES:
            raise RecipeError(
                f"codec {self.id}: at most {_MOST_STAGES} stages may be added, got {self.stages}",
                hint="use fewer stages of more bits",
            )

    @property
    def stages(self) -> int:
        """Number of codecs that are added."""
        return sum(part.stages if isinstance(part, Residual) else 1 for part in (self.base, self.rest))

    @property
    def needs_statistics(self) -> bool:
        """Whether a stage does."""
        return self.base.needs_statistics or self.rest.needs_statistics

    @property
    def uses_curvature(self) -> bool:
        """Whether a stage does."""
        return self.base.uses_curvature or self.rest.uses_curvature

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """The fields of both stages, or None where the rate of one is only known after coding."""
        base, rest = self.base.fields(shape), self.rest.fields(shape)
        if base is None or rest is None:
            return None
        named = [
            dataclasses.replace(field, name=prefix + field.name)
            for prefix, fields in (("base_", base), ("rest_", rest))
            for field in fields
        ]
        return tuple(sorted(named, key=lambda field: -field.dtype.itemsize))

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight`` with ``base``, then what is left with ``rest``; both get the statistics.

        Raises:
            CodecError: a stage refuses its input.
        """
        require_matrix(weight)
        base = self.base.encode(weight, statistics)
        remainder = weight - self.base.decode(base)  # a decoded weight may share memory with the weight: never in place
        rest = self.rest.encode(remainder, statistics)
        tensors = {f"base_{name}": tensor for name, tensor in base.tensors.items()}
        tensors |= {f"rest_{name}": tensor for name, tensor in rest.tensors.items()}
        return self.payload(weight, dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())))

    def decode(self, payload: Payload) -> Tensor:
        """The sum of both stages, FP32 ``[out, in]``."""
        base, rest = self._stages(payload)
        return self.base.decode(base) + self.rest.decode(rest)

    def prepare(self, payload: Payload) -> _Prepared:
        """The payload, and the runtime forms of both stages."""
        base, rest = self._stages(payload)
        return _Prepared(payload, self.base.prepare(base), self.rest.prepare(rest))

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, with the sum: a product for each stage would cost twice."""
        return super().matmul(x, prepared.payload)

    def rows(self, indices: Tensor, prepared: _Prepared) -> Tensor:
        """Rows ``indices`` of the sum, FP32 ``[*indices.shape, in]``."""
        return self.base.rows(indices, prepared.base) + self.rest.rows(indices, prepared.rest)

    def _stages(self, payload: Payload) -> tuple[Payload, Payload]:
        """The payloads of the stages; each stage checks its own."""
        parts: dict[str, dict[str, Tensor]] = {"base": {}, "rest": {}}
        for name, tensor in payload.tensors.items():
            stage, _, inner = name.partition("_")
            if stage not in parts:
                raise InvalidPayloadError(
                    f"payload of {self.id} for shape {payload.shape} holds an unexpected tensor {name!r}",
                    hint="the artifact is damaged or was written by another version",
                )
            parts[stage][inner] = tensor

        def part(codec: Codec, tensors: Mapping[str, Tensor]) -> Payload:
            return Payload(codec.to_json(), payload.shape, payload.dtype, tensors)

        return part(self.base, parts["base"]), part(self.rest, parts["rest"])
