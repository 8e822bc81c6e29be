"""The codec contract: what turns a weight matrix into a payload and back.

A codec is a frozen dataclass whose fields are its JSON configuration. It sees a plain matrix ``[out, in]`` in floating
point; orientation, stacked experts and tied weights are the checkpoint layer's business. ``decode`` reads the payload
and nothing else, and distrusts it. Fields that only guide the encoder (how to round, whether to search) are part of
the configuration, so that an artifact says how it was made, but ``decode`` ignores them.

The bytes that a codec writes are frozen by its ``id``: the number after the slash changes when they do.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tenpak.errors import CodecError, InvalidPayloadError, MissingStatisticsError, RecipeError

__all__ = ["Codec", "Field", "Payload", "Statistics", "Tunable", "require_hessian", "require_matrix"]


@dataclass(frozen=True)
class Field:
    """One tensor of a payload, described without its data.

    Attributes:
        name: name within the payload, e.g. ``"codes"``.
        dtype: torch dtype of the tensor.
        shape: its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Payload:
    """An encoded weight: everything that decoding needs.

    Attributes:
        codec: the codec's JSON configuration, ``{"id": ..., **fields}``.
        shape: ``(out, in)`` of the weight.
        dtype: dtype of the source weight (``torch.float32`` and so on); informative, decoding gives FP32.
        tensors: the payload's own tensors in the order in which they are stored.
        shared: those that it has in common with payloads of other weights; stored once for all of them.
    """

    codec: Mapping[str, Any]
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Measured size of its own tensors in bits."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device | str) -> Payload:
        """The same payload with its tensors on ``device``."""
        own, shared = ({k: t.to(device) for k, t in tensors.items()} for tensors in (self.tensors, self.shared))
        return dataclasses.replace(self, tensors=own, shared=shared)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What calibration knows about one weight ``[out, in]``; any field may be None. x is its input, y = Wx its output.

    Attributes:
        count: number of inputs (tokens) that the means are over.
        hessian: E[x xᵀ], symmetric, FP32 ``[in, in]``; its diagonal weighs the columns in a search. Where blocks before
            this weight are compressed already, x is the input that they give.
        mean: E[x], FP32 ``[in]``.
        mean_abs: E|x|, FP32 ``[in]``.
        cross: E[x x̂ᵀ], FP32 ``[in, in]``: x the original model's input, x̂ the one after compression so far.
        shift: E[d x̂ᵀ], FP32 ``[out, in]``: d what should be added to the output Wx̂; it takes the place of ``cross``.
        output_curvature: E[(∂ℓ/∂y)²] per output, FP32 ``[out]``, ℓ in nats; weighs the rows.
        token_frequency: of an embedding: how often each row was looked up per token of text, FP32 ``[out]``.
        input_curvature: of an embedding: E[(∂ℓ/∂e)²] at its output e, FP32 ``[in]``. An error E_v of row v of a matrix
            that is embedding and head at once costs ½·E_v (g_v H + f_v diag c) E_vᵀ.
    """

    count: int | None = None
    hessian: Tensor | None = None
    mean: Tensor | None = None
    mean_abs: Tensor | None = None
    cross: Tensor | None = None
    shift: Tensor | None = None
    output_curvature: Tensor | None = None
    token_frequency: Tensor | None = None
    input_curvature: Tensor | None = None

    @property
    def metric(self) -> Tensor | None:
        """What an error of an average row costs, FP32 ``[in, in]`` up to a factor; None where nothing is known.

        It is the Hessian; of an embedding the mean over its rows of g_v H + f_v diag c, as far as these are known.
        """
        if self.input_curvature is None:
            return self.hessian
        looked_up = torch.diag(self.input_curvature)
        if self.hessian is None or self.output_curvature is None:
            return looked_up
        return looked_up / len(self.output_curvature) + self.hessian * self.output_curvature.mean()

    @property
    def row_weight(self) -> Tensor | None:
        """How much the error of a row counts, FP32 ``[out]`` up to a factor; None where nothing is known.

        It is the output curvature; of an embedding the trace of g_v H + f_v diag c.
        """
        if self.input_curvature is None or self.token_frequency is None:
            return self.output_curvature
        looked_up = self.token_frequency * self.input_curvature.sum()
        if self.hessian is None or self.output_curvature is None:
            return looked_up
        return looked_up + self.output_curvature * self.hessian.diagonal().sum()


class Tunable(nn.Module, ABC):
    """A weight whose continuous part can be tuned while its codes stay: products and look-ups pass on gradients."""

    @abstractmethod
    def knobs(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """What can be tuned, each with what gives its value as the payload will hold it.

        Parameters are FP32 and of a scale on which changes of a hundredth matter.
        """

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for FP32 ``x`` of shape ``[..., in]``."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` of the weight, FP32 ``[*indices.shape, in]``."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The weight, FP32 ``[out, in]``."""

    @abstractmethod
    def payload(self) -> Payload:
        """The payload with the parameters as they are now, each rounded."""


@dataclass(frozen=True)
class Codec(ABC):
    """Base of all codecs; subclasses are frozen dataclasses with JSON-compatible fields (or codecs) only."""

    id: ClassVar[str]

    @abstractmethod
    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight``, a finite floating-point matrix ``[out, in]``; what it shares is learned from it.

        Raises:
            UnsupportedShapeError: the codec does not accept this shape.
            CodecError: the weight is not a finite floating-point matrix, or exceeds the codec's range.
        """

    @abstractmethod
    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``, on the payload's device.

        Raises:
            InvalidPayloadError: the tensors are not what configuration and shape imply.
        """

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """The payload's own tensors for a weight of this shape, in stored order; None where only coding can tell."""
        return None

    def estimate_bits(self, shape: tuple[int, int]) -> int | None:
        """Exact size in bits of a payload for this shape, or None where the rate is only known after coding."""
        fields = self.fields(shape)
        return None if fields is None else 8 * sum(f.nbytes for f in fields)

    @property
    def needs_statistics(self) -> bool:
        """Whether ``encode`` cannot do without statistics (the Hessian)."""
        return False

    @property
    def uses_curvature(self) -> bool:
        """Whether ``encode`` weighs rows by their curvature, which takes a backward pass to collect."""
        return False

    @property
    def multiplies_cheaply(self) -> bool:
        """Whether ``matmul`` takes far less than decoding does, so that a sum had better multiply stage by stage."""
        return False

    # Sharing: what the payloads of several weights have in common is learned before any of them is encoded. ---------

    @property
    def shared_fields(self) -> tuple[Field, ...]:
        """The tensors that all weights of a plan with exactly this codec share, whatever their shapes."""
        return ()

    def learn(self, weights: Iterable[Tensor]) -> dict[str, Tensor]:
        """The shared tensors for these matrices, of which one is asked for at a time.

        Raises:
            CodecError: as ``encode``.
        """
        return {}

    def encode_sharing(
        self, weight: Tensor, shared: Mapping[str, Tensor], statistics: Statistics | None = None
    ) -> Payload:
        """``encode`` with the ``shared`` tensors as they are. Raises as ``encode`` does."""
        return self.encode(weight, statistics)

    # Runtime: what ``prepare`` returns stays in memory; products and look-ups work from it. --------------------------

    def prepare(self, payload: Payload) -> Any:
        """The runtime form of a payload, made once at load. By default the payload itself, decoded at each use."""
        return payload

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, in the dtype of ``x``."""
        return torch.nn.functional.linear(x, self.decode(prepared).to(x.dtype))

    def rows(self, indices: Tensor, prepared: Any) -> Tensor:
        """Rows ``indices`` (int64, any shape) of the decoded weight, FP32 ``[*indices.shape, in]``: a look-up."""
        return self.decode(prepared)[indices]

    def tunable(self, payload: Payload) -> Tunable | None:
        """What of a payload is continuous, to be tuned by its gradient; None where a codec has nothing of the kind.

        Raises:
            InvalidPayloadError: as ``decode``.
        """
        return None

    # Configuration -----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The JSON configuration: ``{"id": ..., **fields}``, nested codecs included.

        A field with the metadata ``{"optional": True}`` is left out where it has its default: it came later, and what
        was written before it must stay the same to the byte.
        """
        config: dict[str, Any] = {"id": self.id}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("optional") and value == field.default:
                continue
            config[field.name] = value.to_json() if hasattr(value, "to_json") else value
        return config

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """The codec of a configuration whose ``id`` is this class's (``registry.from_json`` finds the class).

        Raises:
            RecipeError: a field is unknown, missing, of the wrong type or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(config) - known - {"id"})
        if unknown:
            raise RecipeError(
                f"codec {cls.id} has no field {', '.join(map(repr, unknown))}",
                hint=f"its fields are {', '.join(sorted(known)) or 'none'}",
            )
        values = {key: cls.parse_field(key, value) for key, value in config.items() if key != "id"}
        try:
            return cls(**values)
        except TypeError as error:
            raise RecipeError(f"codec {cls.id}: {error}") from error

    @classmethod
    def parse_field(cls, name: str, value: Any) -> Any:
        """The value of field ``name`` from its JSON form: a codec from an object, anything else as it is.

        Raises:
            RecipeError: it cannot be understood.
        """
        from tenpak.codecs import registry  # the registry imports codecs lazily; at import time it would be a cycle

        return registry.from_json(value) if isinstance(value, Mapping) else value

    # Help for subclasses -----------------------------------------------------------------------------------------

    def payload(
        self, weight: Tensor, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None
    ) -> Payload:
        """The payload of ``weight`` with these tensors."""
        shape = weight.shape[0], weight.shape[1]
        return Payload(self.to_json(), shape, weight.dtype, dict(tensors), dict(shared or {}))

    def checked(self, payload: Payload) -> Mapping[str, Tensor]:
        """The payload's tensors, shared ones too, after comparing them with what is expected; for fixed-rate codecs.

        Raises:
            InvalidPayloadError: a tensor is missing, unexpected, or of another dtype or shape.
        """
        expected = {f.name: (f.dtype, f.shape) for f in self.fields(payload.shape) or ()}
        expected |= {f"shared {f.name}": (f.dtype, f.shape) for f in self.shared_fields}
        found = {name: (t.dtype, tuple(t.shape)) for name, t in payload.tensors.items()}
        found |= {f"shared {name}": (t.dtype, tuple(t.shape)) for name, t in payload.shared.items()}
        if expected != found:
            raise InvalidPayloadError(
                f"payload of {self.id} for shape {payload.shape} holds {found}, expected {expected}",
                hint="the artifact is damaged or was written by another version",
            )
        return {**payload.tensors, **payload.shared}


def require_matrix(weight: Tensor) -> None:
    """Raise CodecError unless ``weight`` is a non-empty floating-point matrix of finite values."""
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise CodecError(
            f"a codec takes a non-empty floating-point matrix [out, in], got {weight.dtype} {tuple(weight.shape)}"
        )
    # min and max propagate NaN and infinities and, unlike isfinite().all(), need no temporary of the weight's size.
    low, high = torch.aminmax(weight)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CodecError(
            "the weight holds NaN or infinite values",
            hint="the checkpoint is broken: obtain it again, or repair that tensor",
        )


def require_hessian(who: str, statistics: Statistics | None, otherwise: str) -> Statistics:
    """``statistics``, with a metric in them.

    Args:
        who: needs them, e.g. ``"codec trellis/1 needs"``.
        statistics: what calibration knows, if anything.
        otherwise: what to do instead of calibrating.

    Raises:
        MissingStatisticsError: there is no Hessian.
    """
    if statistics is None or statistics.metric is None:
        raise MissingStatisticsError(
            f"{who} the Hessian E[x xᵀ] of the weight's inputs, and there is none",
            hint=f"calibrate on text (--calibration TEXT), or {otherwise}",
        )
    return statistics
