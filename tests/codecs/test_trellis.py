"""What the trellis codec promises: distance from the bound, steps in units of the loss, and that it bears any bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tenpak.codecs.base import Payload, Statistics
from tenpak.codecs.rounding.feedback import feedback
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.trellis_stream import SEGMENT, Coded, read, write
from tenpak.errors import CodecError, InvalidPayloadError, MissingStatisticsError, RecipeError
from tenpak.kernels import core


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=random(seed)) * 0.02


def hessian(columns: int, correlation: float = 0.9) -> Tensor:
    """Of inputs whose neighbours correlate and whose power differs by a factor of up to fifty."""
    index = torch.arange(columns)
    size = torch.sin(index * 1.7).exp()
    return correlation ** (index[:, None] - index).abs() * size[:, None] * size


def known(rows: int, columns: int, correlation: float = 0.9) -> Statistics:
    """A Hessian and the curvature of outputs, some a thousand times that of others."""
    curvature = (2 * torch.randn(rows, generator=random(3))).exp() / 1000
    return Statistics(hessian=hessian(columns, correlation), output_curvature=curvature)


def loss(weight: Tensor, payload: Payload, statistics: Statistics) -> float:
    """½·Σ g·(E H Eᵀ) per weight."""
    assert statistics.hessian is not None
    assert statistics.output_curvature is not None
    error = (weight - Trellis.from_json(payload.codec).decode(payload)).double()
    rows = (error @ statistics.hessian.double() * error).sum(1)
    return float(statistics.output_curvature.double() @ rows) / 2 / weight.numel()


def bits(payload: Payload) -> float:
    """Per weight, of what is stored."""
    return payload.bits / math.prod(payload.shape)


# Rate and distortion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "most"), [(4, 0.15), (8, 0.13), (256, 0.08)])
@pytest.mark.parametrize(("step", "about"), [(0.0109, 2), (0.0052, 3), (0.0026, 4)])
def test_gap_to_the_bound(step: float, about: int, states: int, most: float) -> None:
    """Of normal weights no code has a rate below log2(deviation / error); scalar quantizers stay 0.25 bits above it."""
    weight = weights(512, 512)
    codec = Trellis(step, states, calibrated=False)
    payload = codec.encode(weight)
    error = (weight - codec.decode(payload)).norm() / weight.norm()
    assert bits(payload) == pytest.approx(about, abs=0.15)
    assert 0 < bits(payload) + math.log2(error) <= most


def test_more_states_and_a_rate_term_are_better() -> None:
    weight = weights(256, 256)
    codecs = [Trellis(0.01, 8, False, 0.0), Trellis(0.01, 8, False), Trellis(0.01, 256, False)]
    payloads = [codec.encode(weight) for codec in codecs]
    gaps = [
        bits(payload) + math.log2((weight - codec.decode(payload)).norm() / weight.norm())
        for codec, payload in zip(codecs, payloads, strict=True)
    ]
    assert gaps[0] > gaps[1] + 0.02 > gaps[2] + 0.05


@pytest.mark.parametrize(("states", "steps"), [(1, (0.002, 0.01, 0.04)), (8, (0.002, 0.02)), (256, (0.002, 0.02))])
def test_size_is_close_to_the_entropy(states: int, steps: tuple[float, ...]) -> None:
    """Of the indices, given the quantizer: what is stored beside them and what the tables miss is small."""
    for step in steps:
        payload = Trellis(step, states, calibrated=False).encode(weights(512, 512))
        index, quantizer = indices(coded(payload).levels, states)
        entropy = 0.0
        for q in (0, 1):
            counts = index[quantizer == q].unique(return_counts=True)[1].double()
            entropy -= float((counts * (counts / counts.sum()).log2()).sum())
        assert entropy <= payload.bits <= 1.015 * entropy


def test_one_large_row_costs_the_others_nothing() -> None:
    weight = weights(256, 256)
    large = weight.clone()
    large[7] *= 1e4
    before, after = (Trellis(0.005, 8, calibrated=False).encode(w) for w in (weight, large))
    assert after.bits - before.bits < 256 * 16 + 0.01 * before.bits


def coded(payload: Payload) -> Coded:
    """What the payload's stream says, as ``write`` takes it."""
    found = read(payload.tensors["stream"], payload.shape, payload.codec["step"], payload.codec["states"])
    return replace(found, levels=found.levels.int())


def indices(levels: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """The index that is coded for each level, and its quantizer."""
    index, quantizer = levels.clone(), torch.zeros_like(levels)
    if states == 1:
        return index, quantizer
    h0, h1 = core.machine(states)
    state = torch.zeros(levels.shape[1], dtype=torch.int32)
    for i, level in enumerate(levels):
        state *= i % SEGMENT != 0
        quantizer[i] = q = state & 1
        index[i] = level.sign() * ((level.abs() + q) // 2)
        state = (state >> 1) ^ (q * h0) ^ ((index[i] & 1) * h1)
    return index, quantizer


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_loss_is_about_a_tenth_of_the_square_of_the_step(step: float, scale: float) -> None:
    """Whatever the units of weight and inputs."""
    weight, statistics = weights(256, 192), known(256, 192)
    assert statistics.hessian is not None
    statistics = replace(statistics, hessian=statistics.hessian / scale**2)
    payload = Trellis(step, 256).encode(weight * scale, statistics)
    assert bits(payload) > 1.5
    assert 0.07 <= loss(weight * scale, payload, statistics) / step**2 <= 0.13


def test_steps_follow_curvature_and_pivots() -> None:
    """step·g^(-½) and d^(-½), each to the nearest quarter of an octave."""
    weight, statistics = weights(48, 40), known(48, 40)
    assert statistics.output_curvature is not None
    statistics.output_curvature[5] = 0
    prepared = (codec := Trellis(1e-3, 8)).prepare(codec.encode(weight, statistics))
    pivots = feedback(statistics, 40, 0.01, by_activation=False, sweeps=False).pivots
    curvature = statistics.output_curvature.clamp(0.01 * float(statistics.output_curvature.mean()))
    for found, expected in ((prepared.row_scale, 1e-3 * curvature**-0.5), (prepared.column_scale, pivots**-0.5)):
        assert (found / expected).log2().abs().max() <= 0.1251


def test_pivots_are_the_factor_s_squared_diagonal() -> None:
    """H + λI = U Uᵀ with U upper triangular: in the Hessian's units, whatever its scale."""
    matrix = hessian(30)
    for scale in (1.0, 1e-6, 1e6):
        shared = feedback(Statistics(hessian=matrix * scale), 30, 0.02, by_activation=False, sweeps=False)
        upper = torch.diag(shared.pivots.double().sqrt()) @ shared.earlier.double()
        damped = scale * (matrix + 0.02 * matrix.diagonal().mean() * torch.eye(30)).double()
        torch.testing.assert_close(upper.T @ upper, damped, rtol=1e-4, atol=1e-5 * scale)
    order = feedback(Statistics(hessian=matrix), 30, 0.02, by_activation=True, sweeps=False)
    assert torch.linalg.det((matrix + 0.02 * matrix.diagonal().mean() * torch.eye(30)).double()).log() == pytest.approx(
        float(order.pivots.double().log().sum()), abs=1e-3
    )


def test_feedback_pays() -> None:
    """Without it levels take more bits and still lose half as much again."""
    weight, statistics = weights(256, 192), known(256, 192)
    assert statistics.hessian is not None
    alone = replace(statistics, hessian=statistics.hessian.diagonal().diag())
    for step in (1e-4, 1e-3):
        ours = Trellis(step, 8).encode(weight, statistics)
        theirs = Trellis(1.5 * step, 8).encode(weight, alone)
        assert bits(theirs) > bits(ours)
        assert loss(weight, theirs, statistics) > 1.5 * loss(weight, ours, statistics)


def test_without_correlation_there_is_no_feedback() -> None:
    """Then a Hessian of one and no curvature are the same as no statistics, but for the damping of the steps."""
    weight = weights(70, 150)
    free, calibrated = Trellis(0.004, 8, False), Trellis(0.004, 8, damping=1e-6)
    expected = free.decode(free.encode(weight))
    assert torch.equal(calibrated.decode(calibrated.encode(weight, Statistics(hessian=torch.eye(150)))), expected)
    ignored = free.encode(weight, known(70, 150))
    assert torch.equal(free.decode(ignored), expected)


# Embeddings ----------------------------------------------------------------------------------------------------------


def embedding(rows: int, columns: int, *, tied: bool) -> Statistics:
    frequency = 1 / torch.arange(1, rows + 1)
    curvature = torch.sin(torch.arange(columns) * 0.9).exp() / 100
    head = known(rows, columns) if tied else Statistics()
    return replace(head, token_frequency=frequency / frequency.sum(), input_curvature=curvature)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_rounded_by_how_often_they_are_looked_up(tied: bool) -> None:
    """Their loss is ½·Σ E_v (g_v H + f_v diag c) E_vᵀ: about a tenth of the step's square for each weight again."""
    weight, statistics = weights(300, 64), embedding(300, 64, tied=tied)
    step = 3e-5 if not tied else 1e-4
    codec = Trellis(step, 256)
    payload = codec.encode(weight, statistics)
    error = (weight - codec.decode(payload)).double()
    assert statistics.token_frequency is not None
    assert statistics.input_curvature is not None
    total = float(statistics.token_frequency.double() @ (error.square() @ statistics.input_curvature.double())) / 2
    if tied:
        total += loss(weight, payload, statistics) * weight.numel()
    assert bits(payload) > 1.5
    assert 0.05 <= total / weight.numel() / step**2 <= 0.2
    if not tied:
        scale = codec.prepare(payload).row_scale
        assert scale[100] / scale[0] == pytest.approx(101**0.5, rel=0.2)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [None, Statistics(), Statistics(output_curvature=torch.ones(3))])
def test_missing_statistics(statistics: Statistics | None) -> None:
    with pytest.raises(MissingStatisticsError, match="Hessian") as caught:
        Trellis(0.01).encode(weights(3, 40), statistics)
    assert ":datafree" in str(caught.value.hint)


@pytest.mark.parametrize(
    "curvature", [torch.ones(4), torch.ones(3, 1), torch.tensor([1, float("nan"), 1]), torch.tensor([1.0, -1.0, 1.0])]
)
def test_curvature_that_cannot_be_is_refused(curvature: Tensor) -> None:
    with pytest.raises(CodecError, match="output curvature"):
        Trellis(0.01).encode(weights(3, 40), Statistics(hessian=torch.eye(40), output_curvature=curvature))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0.0}, "step must be a number from 1e-12"),
        ({"step": float("nan")}, "step must be"),
        ({"step": "1"}, "step must be"),
        ({"states": 3}, "states must be one of 1, 4, 8, 16, 32, 64, 128, 256, got 3"),
        ({"states": True}, "states must be one of"),
        ({"states": 8.0}, "states must be one of"),
        ({"calibrated": 1}, "calibrated must be true or false"),
        ({"rate_weight": -0.1}, "rate_weight must be a number from 0 to 2"),
        ({"damping": 0.0}, "damping must be a number from 1e-06 to 1"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Trellis(**{"step": 0.01, **changes})


# Odd input -----------------------------------------------------------------------------------------------------------


def test_extremes_stay_finite() -> None:
    """Steps, weights and statistics far from each other; where FP32 cannot hold what they lead to, that is said."""
    weight, refused = weights(5, 7), 0
    for step in (1e-12, 1e-3, 1e6):
        for size in (1e-40, 1e-20, 1.0, 1e15, 1e36):
            for power in (1e-36, 1.0, 1e36):
                statistics = Statistics(hessian=hessian(7) * power, output_curvature=torch.full((5,), 1 / power))
                codec = Trellis(step, 4)
                try:
                    payload = codec.encode(weight * size, statistics)
                except CodecError as error:
                    assert size == 1e36
                    assert "beyond the range" in str(error)  # noqa: PT017
                    refused += 1
                    continue
                assert codec.decode(payload).isfinite().all()
    assert refused > 0


def test_outliers_widen_the_step_of_their_row_only() -> None:
    weight = weights(6, 50)
    weight[2, 3] = 1e6
    decoded = (codec := Trellis(0.01, 8, calibrated=False)).decode(codec.encode(weight))
    assert decoded[2, 3] == pytest.approx(1e6, rel=1e-5)
    others = [0, 1, 3, 4, 5]
    assert (weight - decoded)[others].abs().max() <= 0.02
    assert not decoded[2, 4:].any()


@pytest.mark.parametrize("value", [0.25, -1.0, 3e-5])
def test_constants_are_kept_to_a_step(value: float) -> None:
    weight = torch.full((40, 50), value)
    for states in (1, 8, 256):
        codec = Trellis(0.01, states, calibrated=False)
        assert (codec.decode(codec.encode(weight)) - weight).abs().max() <= 0.0201


def test_what_was_never_seen_takes_three_to_four_bits() -> None:
    """An expert that no token went to: its step is relative to its weights, whatever the recipe's."""
    for step, size in ((1e-6, 1.0), (1.0, 1e-4)):
        payload = Trellis(step, 8).encode(weights(256, 256) * size, Statistics(count=0, hessian=torch.eye(256)))
        assert 3 <= bits(payload) <= 4


# Decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (40, 30), (SEGMENT + 50, 33)])
@pytest.mark.parametrize("states", [1, 256])
@pytest.mark.usefixtures("threads")
def test_what_is_decoded_is_levels_times_scales(shape: tuple[int, int], states: int) -> None:
    """To the bit, in one order of products; for any number of threads."""
    weight, statistics, codec = weights(*shape), known(*shape), Trellis(1e-3, states)
    payloads = []
    for count in (1, 2):
        torch.set_num_threads(count)
        payloads.append(codec.encode(weight, statistics))
    assert torch.equal(payloads[0].tensors["stream"], payloads[1].tensors["stream"])
    prepared, decoded = codec.prepare(payloads[0]), codec.decode(payloads[0])
    assert prepared.levels.dtype in (torch.int8, torch.int16)
    levels, row, column = (part.numpy() for part in (prepared.levels, prepared.row_scale, prepared.column_scale))
    assert np.array_equal(levels.astype(np.float32) * (row[:, None] * column), decoded.numpy())
    assert torch.equal(codec.rows(torch.tensor([-1, 0, 0]), prepared), decoded[[-1, 0, 0]])


@pytest.mark.usefixtures("threads")
def test_decoding_works_in_inference_mode() -> None:
    """Also of a weight that is coded in several parts, which threads fill."""
    torch.set_num_threads(2)
    codec = Trellis(0.5, calibrated=False)
    payload = codec.encode(weights(2048, 1100))
    expected = codec.decode(payload)
    with torch.inference_mode():
        assert torch.equal(codec.decode(payload), expected)


@pytest.mark.parametrize("states", [1, 4, 256])
def test_every_instruction_set_writes_and_reads_the_same(states: int) -> None:
    weight, statistics, codec = weights(30, 20), known(30, 20), Trellis(1e-3, states)
    payload = codec.encode(weight, statistics)
    expected = codec.decode(payload)
    for isa in core.instruction_sets():
        with core.using(isa):
            assert torch.equal(codec.encode(weight, statistics).tensors["stream"], payload.tensors["stream"])
            assert torch.equal(codec.decode(payload), expected)


@pytest.mark.parametrize("deltas", [False, True])
def test_scales_are_exact(deltas: bool) -> None:
    """Powers of two times one of four constants, rounded to FP32 once; with fine parts where the stream has them."""
    generator = random(0)

    def vector(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator, dtype=torch.int32)

    sent = Coded(0.3, 4, vector(-90, 90, 9), vector(-99, 50, 7), 2 * vector(-3, 3, 63).view(9, 7))
    sent.levels[1:] = 0
    sent.row_class, sent.column_class = vector(0, 20, 9), vector(-5, 9, 7)
    if deltas:
        sent.row_delta, sent.column_delta, sent.places = vector(-127, 300, 9), vector(-127, 300, 7), 8
    got = read(write(sent), (9, 7), 0.3, 4)
    assert got.levels.tolist() == sent.levels.tolist()
    for name in ("row_power", "column_power", "row_class", "column_class", "row_delta", "column_delta"):
        assert torch.equal(getattr(got, name), getattr(sent, name)), name
    for scale, base, power, delta in (
        (got.row_scale, 0.3, sent.row_power, sent.row_delta),
        (got.column_scale, 1.0, sent.column_power, sent.column_delta),
    ):
        fine = delta.tolist() if deltas else [0] * len(power)
        expected = [
            math.ldexp(base * 2 ** (p % 4 / 4), p // 4) * (1 + d / 256)
            for p, d in zip(power.tolist(), fine, strict=True)
        ]
        assert scale.tolist() == np.array(expected, np.float32).tolist()


# Damage --------------------------------------------------------------------------------------------------------------


def outcome(payload: Payload, stream: Tensor) -> bool:
    """Whether ``stream`` decodes, to finite values, or is refused; nothing else may happen."""
    codec = Trellis.from_json(payload.codec)
    try:
        decoded = codec.decode(replace(payload, tensors={"stream": stream}))
    except InvalidPayloadError as error:
        assert "damaged" in str(error)  # noqa: PT017
        return False
    assert decoded.shape == payload.shape
    assert decoded.isfinite().all()
    return True


@pytest.mark.parametrize("states", [1, 8])
def test_damaged_streams_are_refused_or_decode_to_something(states: int) -> None:
    payload = Trellis(0.01, states, calibrated=False).encode(weights(9, 8))
    stream, generator = payload.tensors["stream"], random(1)
    assert outcome(payload, stream)
    assert not any(outcome(payload, stream[:length]) for length in range(len(stream)))
    assert not outcome(payload, torch.cat([stream, stream[:1]]))
    for place in range(len(stream)):
        for change in (1, 128, *torch.randint(1, 256, (4,), generator=generator).tolist()):
            other = stream.clone()
            other[place] ^= change
            outcome(payload, other)
    for _ in range(300):
        length = int(torch.randint(0, 2 * len(stream), (1,), generator=generator))
        drawn = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)
        drawn[: int(torch.randint(0, 30, (1,), generator=generator))] = 0
        start = int(torch.randint(0, len(stream), (1,), generator=generator))
        assert not outcome(payload, torch.cat([stream[:start], drawn]))


@pytest.mark.parametrize("shape", [(9, 9), (8, 8), (1 << 20, 1 << 20), (1, 1 << 40), (-9, -8), (9, 0), (0, 0)])
def test_other_shapes_are_refused_before_memory_is_taken(shape: tuple[int, int]) -> None:
    payload = Trellis(0.01, 8, calibrated=False).encode(weights(9, 8))
    assert not outcome(replace(payload, shape=shape), payload.tensors["stream"])


@pytest.mark.parametrize("name", ["row_power", "column_power"])
@pytest.mark.parametrize("power", [-1400, 500, 100_000])
def test_scales_beyond_fp32_are_refused(name: str, power: int) -> None:
    sent = coded(Trellis(0.01, 8, calibrated=False).encode(weights(9, 8)))
    getattr(sent, name)[3] = power
    with pytest.raises(InvalidPayloadError, match="scales"):
        read(write(sent), (9, 8), 0.01, 8)
