"""``channelscaled/1``: a codec on a weight whose input channels are scaled by how active they are.

Formula::

    encode   inner ← w[i, j] / t[j]           in FP32
    decode   w[i, j] ≈ inner[i, j]·t[j]       in FP32, one more rounding
    t = (1 + m/16)·2^e                        e the upper, m the lower four bits of the channel's byte: 1 … 63488

1/t is the activation-aware scale s of AWQ (Lin et al. 2023, arXiv 2306.00978, section 3.2): (a / max a)^exponent with
a = E|x|, or √E[x²] where that is not known. The error of an active channel falls by its s, at the cost of channels that
matter less. To a is added one percent of its mean: a channel that calibration never saw active keeps a finite scale,
and some of its weights. No s exceeds one, so what ``inner`` could encode it still can.

``exponent=None`` chooses among 0, 0.05, … 1 by the loss ::

    Σᵢ gᵢ·(E H Eᵀ)ᵢᵢ        E = W - Ŵ, H the Hessian, g the output curvature plus one percent, as far as they are known

of the weight as ``inner`` itself, with its rounding, encodes it. Multiples of 0.2 first, then those of 0.1 and of 0.05
next to the best: ten encodings. 0, which is no scaling, is among them and wins ties. On the layers of two small
language models the sum of losses comes within 0.9 % of trying all 21; it is 3 to 6 % below that of no scaling for int4
and int3, 1 to 3 % with GPTQ. Choosing by rounding to nearest, which is cheaper, gained nothing for GPTQ. A fixed 0.5 is
often worse than no scaling on these models.

Bytes: ``channel_scales`` uint8 ``[in]``, and the tensors of ``inner``, named ``inner_…``; wider dtypes come first,
otherwise in this order. Bits per weight: those of ``inner`` plus ``8/out``. A byte is enough: unrounded scales changed
the loss by 0.7 % at most, in either direction; powers of two lost nearly all that scaling gains. No byte stands for
zero, infinity or NaN.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.grouping import group_sum, row_importance
from tenpak.codecs.loss import output_loss
from tenpak.codecs.nesting import inner_payload, require_inner
from tenpak.codecs.validation import require_number
from tenpak.errors import CodecError, InvalidPayloadError, MissingStatisticsError
from tenpak.kernels.parallel import ordered_map

__all__ = ["ChannelScaled"]

_OWN, _PREFIX = "channel_scales", "inner_"
_DAMPING = 0.01
_GRID = 20  # the searched exponents are multiples of 1/_GRID
_STRIDES = (4, 2, 1)


@dataclass(frozen=True)
class ChannelScaled(Codec):
    """A codec on a weight with scaled input channels.

    Attributes:
        inner: encodes the scaled weight, with the statistics of its inputs.
        exponent: of the activation in the scales, 0 to 1, or None to search for the best.

    Raises:
        RecipeError: ``inner`` is not a codec, there are too many inside one another, or the exponent is out of range.
    """

    id: ClassVar[str] = "channelscaled/1"

    inner: Codec
    exponent: float | None = None

    def __post_init__(self) -> None:
        require_inner(self, self.inner)
        if self.exponent is not None:
            require_number(self.id, "exponent", self.exponent, 0.0, 1.0)
            object.__setattr__(self, "exponent", float(self.exponent))

    @property
    def needs_statistics(self) -> bool:
        """Always: the scales come from them."""
        return True

    @property
    def uses_curvature(self) -> bool:
        """Whether ``inner`` does; the search takes it where it is there, but is hardly better for it."""
        return self.inner.uses_curvature

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """The scales and the fields of ``inner``, or None where its rate is only known after coding."""
        inner = self.inner.fields(shape)
        if inner is None:
            return None
        named = (dataclasses.replace(field, name=_PREFIX + field.name) for field in inner)
        own = Field(_OWN, torch.uint8, (shape[1],))
        return tuple(sorted((own, *named), key=lambda field: -field.dtype.itemsize))

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Scale ``weight`` and encode it with ``inner``.

        Takes an FP32 copy of the weight and one of the Hessian; the search, for each thread, these, the decoded
        weight and a payload.

        Raises:
            MissingStatisticsError: neither E|x| nor the Hessian is known.
            CodecError: the weight is not a finite floating-point matrix, the statistics do not fit it or are not
                finite, or ``inner`` refuses the scaled weight.
        """
        require_matrix(weight)
        activity = _activity(statistics, weight.shape[1])
        assert statistics is not None  # else there is no activity
        if self.exponent is not None:
            return self._encode(weight, statistics, _nearest_bytes(activity, self.exponent))
        return self._search(weight, statistics, activity)

    def decode(self, payload: Payload) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        own, inner = self._split(payload)
        return self.inner.decode(inner) * _scales(own)

    def prepare(self, payload: Payload) -> _Prepared:
        """The scales t, FP32 ``[in]``, and the runtime form of ``inner``."""
        own, inner = self._split(payload)
        return _Prepared(_scales(own), self.inner.prepare(inner))

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``: the product of ``inner`` with x·t.

        It is made in FP32, since x·t may be too large for FP16.
        """
        return self.inner.matmul(x.float() * prepared.scales, prepared.inner).to(x.dtype)

    def rows(self, indices: Tensor, prepared: _Prepared) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        return self.inner.rows(indices, prepared.inner) * prepared.scales

    def _encode(self, weight: Tensor, statistics: Statistics, own: Tensor) -> Payload:
        """The payload with these channel scales, uint8 ``[in]``."""
        own = own.to(weight.device)
        scales = _scales(own)
        inner = self.inner.encode(weight.float() / scales, _scaled(statistics, scales))
        tensors = {_OWN: own} | {_PREFIX + name: tensor for name, tensor in inner.tensors.items()}
        return self.payload(weight, dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())))

    def _search(self, weight: Tensor, statistics: Statistics, activity: Tensor) -> Payload:
        """The payload of least loss over the exponents."""
        # The metric may be a sum made for the occasion, and is the same for all.
        metric, rows = statistics.metric, row_importance(statistics, len(weight), weight.device)
        metric = activity.square().float() if metric is None else metric
        metric = metric.to(weight.device)

        def attempt(step: int) -> tuple[float, int, Payload]:
            payload = self._encode(weight, statistics, _nearest_bytes(activity, step / _GRID))
            return output_loss(weight, self.decode(payload), metric, rows), step, payload

        tried: set[int] = set()
        best = (math.inf, 0)
        chosen: Payload | None = None
        for stride in _STRIDES:
            around = range(0, _GRID + 1, stride) if not tried else (best[1] - stride, best[1] + stride)
            steps = [step for step in around if 0 <= step <= _GRID and step not in tried]
            for loss, step, payload in ordered_map(attempt, steps):
                tried.add(step)
                if chosen is None or (loss, step) < best:
                    best, chosen = (loss, step), payload
        if chosen is None or not math.isfinite(best[0]):
            raise CodecError(
                f"no exponent of {self.id} has a finite loss: the Hessian holds NaN or infinite values, or the weight"
                " is too large",
                hint="calibrate again, or leave this tensor dense (--set 'NAME=dense')",
            )
        return chosen

    def _split(self, payload: Payload) -> tuple[Tensor, Payload]:
        """The bytes of the scales, checked, and the payload of ``inner``, which checks its own."""
        inner = {name.removeprefix(_PREFIX): t for name, t in payload.tensors.items() if name.startswith(_PREFIX)}
        own = payload.tensors.get(_OWN)
        if len(inner) + 1 != len(payload.tensors) or own is None:
            raise InvalidPayloadError(
                f"payload of {self.id} for shape {payload.shape} holds {list(payload.tensors)}, expected {_OWN} and"
                f" names that begin with {_PREFIX}",
                hint="the artifact is damaged or was written by another version",
            )
        if own.dtype != torch.uint8 or tuple(own.shape) != payload.shape[1:]:
            raise InvalidPayloadError(
                f"{_OWN} of {self.id} for shape {payload.shape} is {own.dtype} {tuple(own.shape)}, expected uint8"
                f" {payload.shape[1:]}",
                hint="the artifact is damaged or was written by another version",
            )
        return own, inner_payload(self.inner, payload, inner)


@dataclass(frozen=True)
class _Prepared:
    """The runtime form: scales t, FP32 ``[in]``, and that of the inner codec."""

    scales: Tensor
    inner: Any


def _scales(own: Tensor) -> Tensor:
    """The scales t that bytes stand for, FP32, exact."""
    return ((16 + (own & 15).int()) << (own >> 4).int()).float().div_(16)


def _nearest_bytes(activity: Tensor, exponent: float) -> Tensor:
    """The bytes whose t is nearest to (max a / a)^exponent, uint8 ``[in]``; beyond the range the last."""
    table = _scales(torch.arange(256, dtype=torch.uint8)).double()
    wanted = (activity.max() / activity).pow(exponent)
    return torch.bucketize(wanted, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _activity(statistics: Statistics | None, columns: int) -> Tensor:
    """The activity a of each input channel, relative and damped: positive, FP64 ``[in]`` on the CPU.

    Raises:
        MissingStatisticsError: nothing is known of the inputs.
        CodecError: what is known does not fit, or is negative or not finite.
    """
    known, name = None, "E|x|"
    if statistics is not None:
        known = statistics.mean_abs
        if known is None and statistics.metric is not None:
            known, name = statistics.metric.diagonal(), "diagonal of the Hessian"
    if statistics is None or known is None:
        raise MissingStatisticsError(
            "scaling channels by activity needs E|x| of the weight's inputs, or their Hessian, and there is neither",
            hint="calibrate on text (--calibration TEXT), or choose a recipe without awq-",
        )
    metric = statistics.metric
    if tuple(known.shape) != (columns,) or (metric is not None and tuple(metric.shape) != (columns, columns)):
        raise CodecError(f"the statistics are of {len(known)} inputs, the weight has {columns} input columns")
    activity = known.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(activity).all()) or bool((activity < 0).any()):
        raise CodecError(f"the {name} holds negative, NaN or infinite values", hint="calibrate again")
    if statistics.mean_abs is None:
        activity = activity.sqrt()
    mean = group_sum(activity) / columns
    return activity / mean + _DAMPING if float(mean) > 0 else torch.ones_like(activity)


def _scaled(statistics: Statistics, scales: Tensor) -> Statistics:
    """The statistics of the inputs x·t."""

    def times(power: int, values: Tensor | None) -> Tensor | None:
        return None if values is None else values * scales.to(values.device).pow(power)

    def both_sides(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else (matrix * scales.to(matrix.device)).mul_(scales.to(matrix.device)[:, None])

    once = partial(times, 1)
    return dataclasses.replace(
        statistics,
        hessian=both_sides(statistics.hessian),
        cross=both_sides(statistics.cross),
        mean=once(statistics.mean),
        mean_abs=once(statistics.mean_abs),
        input_curvature=times(2, statistics.input_curvature),
    )
