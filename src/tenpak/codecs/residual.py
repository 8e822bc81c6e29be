"""``residual/1``: a codec on what another leaves, ``W ≈ base(W) + rest(W - base(W))``.

The sum is made in FP32. Nesting gives sums of any number of stages: ``a + b + c`` is ``Residual(a, Residual(b, c))``.

The first encoding of ``base`` knows nothing of ``rest``. ``iterations`` rounds of refinement encode each again on what
the other leaves, ::

    base ← W - rest,    rest ← W - base

and the round of least loss Σᵢ gᵢ(E H Eᵀ)ᵢᵢ is kept, H the Hessian and g the output curvature, as far as they are
known; the first may be it. They end after three rounds in a row that gain less than one in a thousand: a stage that
rounds may lose by chance. With whitened ``lowrank/1`` and a quantizer this is CALDERA (Saha et al. 2024, arXiv
2405.18886, section 3). A quantizer gains by it if it searches for its grids. Where these cover the range of the
weights, later rounds lose more and more: what the other stage leaves has the quantizer's errors in it, and a wider
range.

Bytes: the tensors of both stages, named ``base_…`` and ``rest_…``; wider dtypes come first so that all stay aligned,
otherwise in the order of the stages. Bits per weight: the sum of the stages'. Encoding needs one FP32 copy of the
weight (what remains), decoding a second one for the stage being added; refinement takes another two, and a payload.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.grouping import column_importance, row_importance
from tenpak.codecs.loss import output_loss
from tenpak.codecs.nesting import require_alone
from tenpak.codecs.validation import require_integer
from tenpak.errors import InvalidPayloadError, RecipeError
from tenpak.kernels.parallel import one_thread

__all__ = ["Residual"]

_MOST_STAGES = 16  # more bring nothing, and a hostile configuration must not nest without end
_LEAST_GAIN = 1e-3
_PATIENCE = 3


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
        iterations: at most so many rounds of refinement, 0 to 20. Those of a nested sum multiply.

    Raises:
        RecipeError: a stage is not a codec, there are more than 16, or the iterations are out of range.
    """

    id: ClassVar[str] = "residual/1"

    base: Codec
    rest: Codec
    iterations: int = field(default=0, metadata={"optional": True})

    def __post_init__(self) -> None:
        require_integer(self.id, "iterations", self.iterations, 0, 20)
        for name in ("base", "rest"):
            if not isinstance(getattr(self, name), Codec):
                raise RecipeError(
                    f"codec {self.id}: {name} must be a codec, got {getattr(self, name)!r}",
                    hint='write it as {"id": ..., ...}',
                )
            require_alone(getattr(self, name), f"{name} of codec {self.id}")
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

    @property
    def multiplies_cheaply(self) -> bool:
        """Whether a stage does: it need not be decoded then."""
        return self.base.multiplies_cheaply or self.rest.multiplies_cheaply

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """The fields of both stages, or None where the rate of one is only known after coding."""
        base, rest = self.base.fields(shape), self.rest.fields(shape)
        if base is None or rest is None:
            return None
        named = [
            dataclasses.replace(f, name=prefix + f.name)
            for prefix, fields in (("base_", base), ("rest_", rest))
            for f in fields
        ]
        return tuple(sorted(named, key=lambda f: -f.dtype.itemsize))

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight`` with ``base``, then what is left with ``rest``, and refine; all get the statistics.

        Raises:
            CodecError: a stage refuses its input, or the statistics do not fit the weight.
        """
        require_matrix(weight)
        base = self.base.encode(weight, statistics)
        remainder = weight - self.base.decode(base)  # a decoded weight may share memory with the weight: never in place
        rest = self.rest.encode(remainder, statistics)
        if self.iterations:
            base, rest = self._refined(weight, statistics, base, rest)
        tensors = {f"base_{name}": tensor for name, tensor in base.tensors.items()}
        tensors |= {f"rest_{name}": tensor for name, tensor in rest.tensors.items()}
        return self.payload(weight, dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())))

    def _refined(
        self, weight: Tensor, statistics: Statistics | None, base: Payload, rest: Payload
    ) -> tuple[Payload, Payload]:
        """The stages of the round of least loss, these ones being the first."""
        column_importance(statistics, weight.shape[1], weight.device)  # refuses what does not fit
        metric = None if statistics is None or statistics.metric is None else statistics.metric.to(weight.device)
        rows = row_importance(statistics, len(weight), weight.device)

        def measured(base: Payload, rest: Payload) -> tuple[float, Tensor]:
            found = self.rest.decode(rest)
            with one_thread():
                return output_loss(weight, self.base.decode(base) + found, metric, rows), found

        least, found = measured(base, rest)
        best, stale = (base, rest), 0
        for _ in range(self.iterations):
            base = self.base.encode(weight - found, statistics)
            rest = self.rest.encode(weight - self.base.decode(base), statistics)
            loss, found = measured(base, rest)
            stale = 0 if loss < least * (1 - _LEAST_GAIN) else stale + 1
            if loss < least:
                least, best = loss, (base, rest)
            if stale == _PATIENCE:
                break
        return best

    def decode(self, payload: Payload) -> Tensor:
        """The sum of both stages, FP32 ``[out, in]``."""
        base, rest = self._stages(payload)
        return self.base.decode(base) + self.rest.decode(rest)

    def prepare(self, payload: Payload) -> _Prepared:
        """The payload, and the runtime forms of both stages."""
        base, rest = self._stages(payload)
        return _Prepared(payload, self.base.prepare(base), self.rest.prepare(rest))

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``.

        It is made with the sum, since a product for each stage would cost twice, unless one has a cheap product.
        """
        if self.multiplies_cheaply:
            return self.base.matmul(x, prepared.base) + self.rest.matmul(x, prepared.rest)
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
