"""``trellis/1``: entropy-coded trellis quantization with full-Hessian feedback.

Steps. With E = W - Ŵ the loss is ½·Σᵢ gᵢ·(E H Eᵀ)ᵢᵢ nats per token; with H = U·Uᵀ and the feedback of
``rounding.feedback`` it is ½·Σᵢⱼ gᵢ·dⱼ·(uᵢⱼ - ŵᵢⱼ)², dⱼ = U[j, j]². So the step of weight (i, j) is ::

    step · rᵢ · sⱼ        rᵢ ≈ gᵢ^(-½), sⱼ ≈ dⱼ^(-½), both rounded to quarter powers of two

in absolute units: one ``step`` for all weights of a model spends each bit where it saves most (reverse water-filling).
Without statistics g and H are one and the identity.

Levels. Along each column a trellis chooses between two quantizers (``kernels.core.quantize``), minimising squared error
plus ``rate_weight`` times the bits that the levels will take. At 0.3 reconstruction points are where the
levels' conditional means are, within one per cent from 1 to 4 bits, so no shrinkage is stored.

Bytes. A weight is level · row scale · column scale, in FP32, scales being step·2^(a/4)·(1 + b/2^e) and
2^(c/4)·(1 + d/2^e), b and d zero until a model is tuned. Levels are entropy-coded with the tables of a class: the sum
of a row's and a column's class, a standard deviation in quarter octaves. The one field, ``stream`` (uint8), is
described in docs/format.md.

Entropy-coded trellis quantization: Fischer and Wang 1992, Joshi and Fischer 1995; with a rate term along the path as
in video coding (Schwarz et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Payload, Statistics, require_hessian, require_matrix
from tenpak.codecs.integers import fits, product
from tenpak.codecs.rounding.feedback import feedback
from tenpak.codecs.trellis_fit import fitted, lengths
from tenpak.codecs.trellis_stream import SEGMENT, Coded, read, representable, write
from tenpak.codecs.trellis_tuning import TunableTrellis
from tenpak.codecs.validation import require_bool, require_choice, require_number
from tenpak.errors import CodecError, InvalidPayloadError
from tenpak.kernels import core
from tenpak.kernels.parallel import each, one_thread, ordered_map

__all__ = ["Prepared", "Trellis"]

_BLOCK = 64  # columns per GEMM
_TILE = 1 << 18
_WEIGHTS = 1 << 22  # of a product that are FP32 at a time
_PASSES = 2  # the second one knows the rates that the first one has led to
# Outputs that hardly matter on the calibration text get no larger steps than this share of the mean curvature.
_LEAST_CURVATURE = 0.01
_MOST_LEVEL = 500_000.0
_MOST_IMPORTANCE = 1e24  # and its inverse: scales of 2^±40, so that FP32 holds the product of two and any step
_STEP_IN_THE_DARK = 0.25  # of the weight's root mean square, where calibration saw no input of it

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """The runtime form: levels, int8 or as wide as they need, ``[out, in]``, and FP32 scales."""

    levels: Tensor
    row_scale: Tensor
    column_scale: Tensor


@dataclass(frozen=True)
class Trellis(Codec):
    """Entropy-coded trellis quantization.

    Attributes:
        step: what a step costs, absolute: the loss is about step²/10 nats per token and weight, step²/24 with one
            state; 1e-12 to 1e6.
        states: of the trellis: 1 (a uniform quantizer), 4, 8, 16, 32, 64, 128 or 256. More are better and slower.
        calibrated: use Hessian and output curvature; otherwise all inputs and outputs count the same.
        rate_weight: cost of a bit in squared steps, for the choice of levels, 0 to 2.
        damping: added to the Hessian's diagonal, relative to its mean; 1e-6 to 1.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "trellis/1"

    step: float
    states: int = 256
    calibrated: bool = True
    rate_weight: float = 0.3
    damping: float = 0.01

    def __post_init__(self) -> None:
        require_number(self.id, "step", self.step, 1e-12, 1e6)
        require_choice(self.id, "states", self.states, core.STATES)
        require_bool(self.id, "calibrated", self.calibrated)
        require_number(self.id, "rate_weight", self.rate_weight, 0.0, 2.0)
        require_number(self.id, "damping", self.damping, 1e-6, 1.0)
        for name in ("step", "rate_weight", "damping"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def needs_statistics(self) -> bool:
        """Whether it is calibrated."""
        return self.calibrated

    @property
    def uses_curvature(self) -> bool:
        """Whether it is calibrated."""
        return self.calibrated

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight``, a finite floating-point matrix ``[out, in]``.

        Raises:
            MissingStatisticsError: it is calibrated and there is no Hessian.
            CodecError: weight or statistics are not finite or do not fit each other, or a weight is beyond about 1e30.
            SingularHessianError: the Hessian is indefinite.
        """
        require_matrix(weight)
        target = weight.detach().to("cpu").float()
        known = None
        if self.calibrated:
            known = require_hessian("codec trellis/1 needs", statistics, "add :datafree to the recipe")
        with one_thread():  # also what follows outside of tiles: sums of several threads depend on their number
            earlier, pivots = _feedback(known, target.shape[1], self.damping)
            importance = _row_importance(known, len(target))
            if known is not None and known.count == 0:  # nothing is known of this one: about three bits
                importance *= (self.step / max(_STEP_IN_THE_DARK * float(target.square().mean().sqrt()), 1e-30)) ** 2
            coded = self._start(target, importance, pivots)
        for _ in range(_PASSES):
            coded.levels = self._quantized(target, earlier, coded)
            coded = fitted(coded)
        return self.payload(weight, {"stream": write(coded)})

    def _start(self, target: Tensor, importance: Tensor, pivots: Tensor) -> Coded:
        """Steps, and classes as they would be if levels were the weight in steps."""
        row_power, column_power = _power(importance), _power(pivots)
        coded = Coded(self.step, self.states, row_power, column_power, torch.zeros(1, 1, dtype=torch.int32))
        column_scale = coded.column_scale

        def largest(rows: slice) -> Tensor:
            return (target[rows].abs() / column_scale).amax(1)

        # An outlier beyond the range of levels widens its row's step.
        widest = torch.cat(_by_rows(largest, target.shape)).double() / coded.row_scale
        coded.row_power += (4 * torch.log2(widest / _MOST_LEVEL)).ceil().clamp(0, 1000).to(torch.int32)
        if not representable(coded):
            raise CodecError(
                "the weight is beyond the range of codec trellis/1", hint="use another codec for this tensor"
            )
        row_scale, steps = coded.row_scale, torch.empty_like(target)

        def in_steps(rows: slice) -> None:
            torch.div(target[rows], row_scale[rows, None], out=steps[rows]).div_(column_scale)

        _by_rows(in_steps, target.shape)
        return fitted(coded, steps)

    def _quantized(self, target: Tensor, earlier: Tensor | None, coded: Coded) -> Tensor:
        """Levels, int32 ``[out, in]``."""
        rates = torch.zeros(0, 2, 1)
        if self.rate_weight and self.states > 1:
            with one_thread():  # several would wait for each other at every small operation
                rates = lengths(coded.shape).float() * self.rate_weight
        tiles = [slice(start, start + SEGMENT) for start in range(0, len(target), SEGMENT)]

        levels = torch.empty(target.shape, dtype=torch.int32)

        def work(tile: slice) -> None:
            levels[tile] = _quantized_tile(target[tile], earlier, coded, tile, rates)

        for _ in ordered_map(work, tiles):
            pass
        return levels

    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``.

        Raises:
            InvalidPayloadError: the stream is damaged.
        """
        return _decoded(self.prepare(payload))

    def prepare(self, payload: Payload) -> Prepared:
        """Levels and scales: what products are made from."""
        coded = self._read(payload)
        device = payload.tensors["stream"].device
        return Prepared(*(part.to(device) for part in (coded.levels, coded.row_scale, coded.column_scale)))

    def tunable(self, payload: Payload) -> TunableTrellis:
        """Row and column scales are continuous.

        Raises:
            InvalidPayloadError: the stream is damaged.
        """
        return TunableTrellis(payload, self._read(payload))

    def _read(self, payload: Payload) -> Coded:
        fields = {name: (t.dtype, t.ndim) for name, t in payload.tensors.items()}
        if fields != {"stream": (torch.uint8, 1)}:
            raise InvalidPayloadError(f"payload of {self.id} holds {fields}, expected a uint8 vector 'stream'")
        return read(payload.tensors["stream"].cpu(), payload.shape, self.step, self.states)

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, in the dtype of ``x``; on a CPU in FP32, from levels."""
        levels = prepared.levels
        if fits(x, levels):
            return product(x, levels, prepared.row_scale, prepared.column_scale)
        height = max(_WEIGHTS // levels.shape[1], 1)
        parts = [slice(start, start + height) for start in range(0, len(levels), height)]
        return torch.cat([torch.nn.functional.linear(x, _expanded(prepared, part).to(x.dtype)) for part in parts], -1)

    def rows(self, indices: Tensor, prepared: Any) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``."""
        scale: Tensor = prepared.row_scale[indices].unsqueeze(-1) * prepared.column_scale
        return scale.mul_(prepared.levels[indices])


def _expanded(prepared: Prepared, rows: slice) -> Tensor:
    """Rows of the weight, FP32."""
    scale = prepared.row_scale[rows, None] * prepared.column_scale
    return scale.mul_(prepared.levels[rows])


def _decoded(prepared: Prepared) -> Tensor:
    """The weight, FP32 ``[out, in]``."""
    levels = prepared.levels
    if not levels.is_cpu:
        return _expanded(prepared, slice(None))
    weight = torch.empty(levels.shape, dtype=torch.float32)

    def fill(rows: slice) -> None:
        torch.mul(prepared.row_scale[rows, None], prepared.column_scale, out=weight[rows]).mul_(levels[rows])

    _by_rows(fill, levels.shape)
    return weight


def _by_rows(work: Callable[[slice], Result], shape: Sequence[int]) -> list[Result]:
    """What ``work`` gives for a few rows at a time, so that they stay in the cache where one pass follows another."""
    height = max(_TILE // shape[1], 1)

    def several(first: int) -> list[Result]:
        last = min(first + SEGMENT, shape[0])
        return [work(slice(start, min(start + height, last))) for start in range(first, last, height)]

    return [result for results in each(several, range(0, shape[0], SEGMENT)) for result in results]


def _power(importance: Tensor) -> Tensor:
    """The power a of the step 2^(a/4) that is nearest to importance^(-½), int32."""
    bounded = importance.double().clamp(1 / _MOST_IMPORTANCE, _MOST_IMPORTANCE)
    return torch.round(-2 * torch.log2(bounded)).to(torch.int32)


def _feedback(statistics: Statistics | None, columns: int, damping: float) -> tuple[Tensor | None, Tensor]:
    """The feedback of earlier columns, FP32 ``[in, in]``, None for none, and the pivots, FP32 ``[in]``."""
    if statistics is None:
        return None, torch.ones(columns)
    shared = feedback(statistics, columns, damping, by_activation=False, sweeps=False).to(torch.device("cpu"))
    return shared.earlier, shared.pivots


def _row_importance(statistics: Statistics | None, rows: int) -> Tensor:
    """How many nats a squared error costs in a row beyond what the metric says, FP64 ``[out]``."""
    weight = None if statistics is None else statistics.row_weight
    if statistics is None or weight is None:
        return torch.ones(rows, dtype=torch.float64)
    weight = weight.cpu().double()
    if tuple(weight.shape) != (rows,) or not bool(weight.isfinite().all()) or bool((weight < 0).any()):
        raise CodecError(
            f"the output curvature {tuple(weight.shape)} is not of {rows} rows, or is NaN, infinite or negative",
            hint="calibrate again",
        )
    if statistics.input_curvature is not None:  # an embedding's metric is the mean over its rows
        assert statistics.metric is not None  # it has one where it has an input curvature
        weight = weight / statistics.metric.diagonal().double().sum().clamp(1e-60)
    mean = float(weight.mean())
    if not mean > 0:
        return torch.ones(rows, dtype=torch.float64)
    return weight.clamp(_LEAST_CURVATURE * mean)


def _quantized_tile(target: Tensor, earlier: Tensor | None, coded: Coded, tile: slice, rates: Tensor) -> Tensor:
    """Levels of some rows, int32 ``[rows, in]``: what ``kernels.core.quantize`` does, and feedback between blocks."""
    columns = target.shape[1]
    weight = target.T.contiguous()
    error, levels = torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.int32)
    row_scale, row_class = coded.row_scale[tile].contiguous(), coded.row_class[tile].contiguous()
    column_scale = coded.column_scale
    for start in range(0, columns, _BLOCK):
        block = slice(start, min(start + _BLOCK, columns))
        if earlier is None:
            aim, feed = weight[block].clone(), torch.eye(block.stop - start)
        else:
            aim, feed = torch.addmm(weight[block], earlier[block, :start], error[:start]), earlier[block, block]
        core.quantize(
            weight[block],
            aim,
            error[block],
            levels[block],
            feed.contiguous(),
            row_scale,
            column_scale[block].contiguous(),
            rates,
            row_class,
            coded.column_class[block].contiguous(),
            coded.states,
            SEGMENT,
        )
    return levels.T
