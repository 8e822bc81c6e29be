"""Scaled channels against plain matrices, what the search promises, and what dead or damaged inputs may not do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Codec, Field, Payload, Statistics
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError, InvalidPayloadError, MissingStatisticsError, RecipeError

INT4 = Uniform(4, 32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.02


def inputs(columns: int, outliers: int = 4, count: int = 500) -> Tensor:
    """Inputs of which a few channels, spread over all, are thirty times as large as the others."""
    x = torch.randn(count, columns, generator=generator(1))
    x[:, torch.arange(outliers) * columns // outliers] *= 30
    return x


def statistics(x: Tensor, **more: Tensor) -> Statistics:
    """What calibration would find, summed in FP64."""
    x = x.double()
    hessian = (x.T @ x / len(x)).float()
    return Statistics(count=len(x), hessian=hessian, mean=x.mean(0).float(), mean_abs=x.abs().mean(0).float(), **more)


def loss(weight: Tensor, decoded: Tensor, known: Statistics) -> float:
    error = (weight - decoded).double()
    assert known.hessian is not None
    rows = ((error @ known.hessian.double()) * error).sum(1)
    return float(rows.sum() if known.output_curvature is None else (rows * known.output_curvature).sum())


def decoded(codec: Codec, weight: Tensor, known: Statistics) -> Tensor:
    return codec.decode(codec.encode(weight, known))


def scales(payload: Payload) -> Tensor:
    """The t of each channel, from the layout as documented."""
    own = payload.tensors["channel_scales"].tolist()
    return torch.tensor([(1 + byte % 16 / 16) * 2 ** (byte // 16) for byte in own])


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("by_power", [False, True])
def test_formula(exponent: float, by_power: bool) -> None:
    weight, known = weights(20, 96), statistics(inputs(96))
    if by_power:
        known = dataclasses.replace(known, mean_abs=None)
    payload = ChannelScaled(INT4, exponent).encode(weight, known)
    assert known.hessian is not None
    activity = (known.hessian.diagonal().sqrt() if by_power else inputs(96).abs().mean(0)).double()
    activity = activity / activity.mean() + 0.01
    wanted = (activity.max() / activity) ** exponent
    found = scales(payload).double()
    assert (found / wanted - 1).abs().max() <= 1 / 32 + 1e-6  # half a step of a sixteenth
    inner = INT4.encode(weight / found.float())
    for name, tensor in inner.tensors.items():
        assert torch.equal(payload.tensors[f"inner_{name}"], tensor)
    assert torch.equal(ChannelScaled(INT4, exponent).decode(payload), INT4.decode(inner) * found.float())


def test_every_byte_is_a_sound_scale() -> None:
    codec = ChannelScaled(Dense("float32"), 0.5)
    own = torch.arange(256, dtype=torch.uint8)
    payload = Payload(
        codec.to_json(), (1, 256), torch.float32, {"inner_values": torch.ones(1, 256), "channel_scales": own}
    )
    found = codec.decode(payload)[0]
    assert torch.equal(found, scales(payload))
    assert (found[1:] > found[:-1]).all()
    assert (found[0], found[-1]) == (1.0, 63488.0)


def test_fields() -> None:
    codec = ChannelScaled(Residual(Uniform(4, 16), Dense("bfloat16")), 0.5)
    payload = codec.encode(weights(9, 70), statistics(inputs(70)))
    assert list(payload.tensors) == [
        "inner_base_scales", "inner_base_offsets", "inner_rest_values", "channel_scales", "inner_base_codes",
    ]  # fmt: skip
    assert codec.estimate_bits((9, 70)) == payload.bits
    twice = ChannelScaled(ChannelScaled(INT4, 0.5), 0.25)
    assert {"channel_scales", "inner_channel_scales"} < set(
        twice.encode(weights(9, 70), statistics(inputs(70))).tensors
    )


@pytest.mark.parametrize("exponent", [0.25, 1.0])
def test_the_inner_codec_sees_the_statistics_of_the_scaled_inputs(
    exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, curvature = inputs(48), torch.rand(10, generator=generator(2))
    x[:, 5] += 3
    known = statistics(x, output_curvature=curvature)
    other = x + torch.randn(x.shape, generator=generator(3))
    known = dataclasses.replace(known, cross=(x.double().T @ other.double() / len(x)).float())
    known = dataclasses.replace(known, token_frequency=torch.ones(10), input_curvature=torch.linspace(2, 1, 48))
    seen: list[Statistics] = []
    encode = Uniform.encode

    def spy(self: Uniform, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        assert statistics is not None
        seen.append(statistics)
        return encode(self, weight, statistics)

    monkeypatch.setattr(Uniform, "encode", spy)
    t = scales(ChannelScaled(INT4, exponent).encode(weights(10, 48), known))
    expected = statistics(x * t)
    found = seen[0]
    for name in ("hessian", "mean", "mean_abs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-5)
    cross = ((x * t).double().T @ (other * t).double() / len(x)).float()
    torch.testing.assert_close(found.cross, cross, rtol=1e-6, atol=1e-4 * float(cross.abs().max()))
    assert found.count == known.count
    assert found.output_curvature is curvature
    assert found.token_frequency is known.token_frequency
    assert known.input_curvature is not None
    torch.testing.assert_close(found.input_curvature, known.input_curvature * t * t)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("exponent", [None, 0.5])
def test_scaling_lowers_the_loss_where_inputs_have_outlier_channels(bits: int, exponent: float | None) -> None:
    weight, known, plain = weights(64, 256), statistics(inputs(256)), Uniform(bits, 128)
    scaled = loss(weight, decoded(ChannelScaled(plain, exponent), weight, known), known)
    assert scaled < 0.7 * loss(weight, decoded(plain, weight, known), known)


@pytest.mark.parametrize(
    "inner",
    [Uniform(4, 32), Uniform(3, 128, symmetric=True), Uniform(4, 32, search=True), Uniform(3, 64, rounding=Gptq()),
     Rotated(Uniform(4, 64))],
    ids=["int4", "int3-sym", "search", "gptq", "rotated"],
)  # fmt: skip
@pytest.mark.parametrize("outliers", [0, 1, 8])
@pytest.mark.parametrize("curvature", [False, True])
def test_the_search_never_loses_to_no_scaling(inner: Codec, outliers: int, curvature: bool) -> None:
    weight, known = weights(24, 96), statistics(inputs(96, outliers) if outliers else inputs(96, 1) / 30)
    if curvature:
        # The measure adds one percent of the mean, as all weights of rows do.
        g = torch.rand(24, generator=generator(4)) ** 8
        known = dataclasses.replace(known, output_curvature=g)
        damped = dataclasses.replace(known, output_curvature=g / g.mean() + 0.01)
    else:
        damped = known
    searched = loss(weight, decoded(ChannelScaled(inner), weight, known), damped)
    none = loss(weight, decoded(ChannelScaled(inner, 0.0), weight, known), damped)
    assert searched <= none * (1 + 1e-6)
    coarse = min(loss(weight, decoded(ChannelScaled(inner, e / 5), weight, known), damped) for e in range(6))
    assert searched <= coarse * (1 + 1e-6)


def test_exponent_zero_is_the_inner_codec() -> None:
    weight, known = weights(9, 70), statistics(inputs(70))
    assert torch.equal(decoded(ChannelScaled(INT4, 0.0), weight, known), decoded(INT4, weight, known))


@pytest.mark.parametrize("exponent", [None, 0.5, 1.0])
@pytest.mark.parametrize("known", ["hessian", "mean_abs"])
def test_channels_that_were_never_active_keep_finite_scales(exponent: float | None, known: str) -> None:
    x = inputs(64)
    x[:, ::3] = 0
    weight, full = weights(20, 64), statistics(x)
    partial = dataclasses.replace(full, **{"mean_abs" if known == "hessian" else "hessian": None})
    back = decoded(ChannelScaled(Uniform(8, 64), exponent), weight, partial)
    assert back.isfinite().all()
    # One percent of the mean at least: an error a few hundred times what the others have, of 2^-8 of the range.
    assert (back - weight).abs().max() < 0.5


@pytest.mark.parametrize("exponent", [None, 0.5, 1.0])
def test_inputs_without_any_activity_are_not_scaled(exponent: float | None) -> None:
    weight = weights(5, 40)
    for known in (
        Statistics(hessian=torch.zeros(40, 40), mean_abs=torch.zeros(40)),
        Statistics(mean_abs=torch.zeros(40)),
        Statistics(hessian=torch.zeros(40, 40)),
    ):
        assert torch.equal(decoded(ChannelScaled(INT4, exponent), weight, known), INT4.decode(INT4.encode(weight)))


@pytest.mark.parametrize("exponent", [None, 1.0])
def test_activities_of_all_magnitudes(exponent: float | None) -> None:
    mean_abs = torch.logspace(-38, 38, 77)
    weight = weights(5, 77)
    payload = ChannelScaled(INT4, exponent).encode(weight, Statistics(mean_abs=mean_abs))
    assert ChannelScaled(INT4, exponent).decode(payload).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_damaged_statistics_are_refused(bad: float) -> None:
    weight, known = weights(5, 40), statistics(inputs(40))
    assert known.hessian is not None
    assert known.mean_abs is not None
    mean_abs, hessian = known.mean_abs.clone(), known.hessian.clone()
    mean_abs[3], hessian[3, 3] = bad, bad
    for damaged in (Statistics(mean_abs=mean_abs), Statistics(hessian=hessian)):
        for exponent in (None, 0.5):
            with pytest.raises(CodecError, match="negative, NaN or infinite"):
                ChannelScaled(INT4, exponent).encode(weight, damaged)
    if bad != -1.0:
        hessian = known.hessian.clone()
        hessian[3, 4] = bad
        with pytest.raises(CodecError, match="no exponent"):
            ChannelScaled(INT4).encode(weight, Statistics(hessian=hessian))


def test_statistics_of_another_weight_are_refused() -> None:
    for known in (Statistics(mean_abs=torch.ones(41)), Statistics(hessian=torch.eye(41)),
                  Statistics(mean_abs=torch.ones(40), hessian=torch.eye(41))):  # fmt: skip
        with pytest.raises(CodecError, match="40 input columns"):
            ChannelScaled(INT4, 0.5).encode(weights(5, 40), known)
    with pytest.raises(MissingStatisticsError, match=r"needs E\|x\|"):
        ChannelScaled(INT4, 0.5).encode(weights(5, 40), Statistics(mean=torch.ones(40)))
    with pytest.raises(CodecError, match="output curvature"):
        ChannelScaled(INT4).encode(weights(5, 40), statistics(inputs(40), output_curvature=torch.ones(4)))


def test_an_input_too_large_for_fp16_when_scaled() -> None:
    known = Statistics(mean_abs=torch.tensor([1e4] + [1.0] * 31))
    codec = ChannelScaled(Uniform(8, 32), 1.0)
    payload = codec.encode(weights(4, 32), known)
    x = torch.full((2, 32), 1000.0, dtype=torch.float16)
    assert (x.float() * scales(payload)).max() > 65504
    product = codec.matmul(x, codec.prepare(payload))
    assert product.isfinite().all()
    torch.testing.assert_close(product, (x.float() @ codec.decode(payload).T).half(), rtol=1e-3, atol=0.1)


def test_decoding_leaves_the_payload_alone() -> None:
    codec = ChannelScaled(Dense("float32"), 1.0)
    payload = codec.encode(weights(4, 32), statistics(inputs(32)))
    before = {name: tensor.clone() for name, tensor in payload.tensors.items()}
    codec.decode(payload)
    codec.rows(torch.tensor(0), codec.prepare(payload))
    assert all(torch.equal(tensor, before[name]) for name, tensor in payload.tensors.items())


@dataclasses.dataclass(frozen=True)
class _Unpredictable(Dense):
    """A codec whose rate is known after coding only, and whose runtime form is not its payload."""

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:  # type: ignore[override]
        return None

    def checked(self, payload: Payload) -> dict[str, Tensor]:
        return dict(payload.tensors)

    def prepare(self, payload: Payload) -> Tensor:
        return self.decode(payload)

    def matmul(self, x: Tensor, prepared: Tensor) -> Tensor:
        return x @ prepared.T

    def rows(self, indices: Tensor, prepared: Tensor) -> Tensor:  # type: ignore[override]
        return prepared[indices]


@pytest.mark.parametrize("wrap", [lambda inner: ChannelScaled(inner, 0.5), Rotated], ids=["scaled", "rotated"])
def test_an_inner_codec_of_unknown_rate(wrap: type[Rotated]) -> None:
    codec, weight = wrap(_Unpredictable("float32")), weights(6, 40)
    payload = codec.encode(weight, statistics(inputs(40)))
    assert codec.fields((6, 40)) is None
    assert codec.estimate_bits((6, 40)) is None
    torch.testing.assert_close(codec.decode(payload), weight)
    prepared = codec.prepare(payload)
    assert torch.equal(codec.rows(torch.tensor([5, 0]), prepared), codec.decode(payload)[[5, 0]])
    x = torch.randn(3, 40, generator=generator(5))
    torch.testing.assert_close(codec.matmul(x, prepared), x @ weight.T)


def test_hostile_payloads() -> None:
    codec = ChannelScaled(INT4, 0.5)
    payload = codec.encode(weights(6, 40), statistics(inputs(40)))
    own = payload.tensors["channel_scales"]
    for tensors in (
        {},
        {"channel_scales": own},
        {**payload.tensors, "scales": own},
        {**payload.tensors, "inner_inner_codes": own},
        {**payload.tensors, "channel_scales": own[:-1]},
        {**payload.tensors, "channel_scales": own.float()},
        {**payload.tensors, "channel_scales": own[None]},
    ):
        with pytest.raises(InvalidPayloadError):
            codec.decode(dataclasses.replace(payload, tensors=tensors))


def test_configurations() -> None:
    assert ChannelScaled(INT4, 1).to_json()["exponent"] == 1.0
    assert ChannelScaled(INT4).to_json()["exponent"] is None
    for bad in (-0.1, 1.1, float("nan"), "much", True):
        with pytest.raises(RecipeError, match="exponent must be a number from 0 to 1"):
            ChannelScaled(INT4, bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="inner must be a codec, got 4"):
        ChannelScaled(4)  # type: ignore[arg-type]
    config = INT4.to_json()
    for _ in range(15):
        config = {"id": "channelscaled/1", "inner": config, "exponent": 0.5}
    registry.from_json(config)
    with pytest.raises(RecipeError, match="at most 16 codecs may be inside one another, got 17"):
        registry.from_json({"id": "rotated/1", "inner": config})
    for _ in range(150):  # sums and wrappers in turns
        config = {"id": "residual/1", "base": INT4.to_json(), "rest": {"id": "rotated/1", "inner": config, "seed": 0}}
    with pytest.raises(RecipeError, match=r"at most 16 codecs|too deeply"):
        registry.from_json(config)
