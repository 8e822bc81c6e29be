"""Low rank against the plain singular value decomposition, the choice of ranks, refinement of sums, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tenpak.codecs import lowrank_fit, registry
from tenpak.codecs.base import Codec, Payload, Statistics
from tenpak.codecs.dense import Dense
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import (
    CodecError,
    InvalidPayloadError,
    MissingStatisticsError,
    RecipeError,
    UnsupportedShapeError,
)

FP32, INT8 = Dense("float32"), Uniform(8, None, True)
KINDS = ["plain", "magnitude", "activation", "whitened"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.02


def statistics(rows: int, columns: int) -> Statistics:
    """Correlated inputs of uneven power, uneven curvature."""
    x = torch.randn(2000, columns, generator=generator(1), dtype=torch.float64)
    x = (x @ torch.randn(columns, columns, generator=generator(2), dtype=torch.float64)) * torch.linspace(
        0.1, 3, columns
    )
    return Statistics(
        count=len(x),
        hessian=(x.T @ x / len(x)).float(),
        mean=x.mean(0).float(),
        mean_abs=x.abs().mean(0).float(),
        output_curvature=torch.rand(rows, generator=generator(3)) + 0.01,
    )


def loss(weight: Tensor, decoded: Tensor, known: Statistics) -> float:
    assert known.hessian is not None
    assert known.output_curvature is not None
    error = (weight - decoded).double()
    rows = ((error @ known.hessian.double()) * error).sum(1)
    return float((rows * known.output_curvature).sum())


def decoded(codec: Codec, weight: Tensor, known: Statistics | None = None) -> Tensor:
    return codec.decode(codec.encode(weight, known))


def rank_of(payload: Payload) -> int:
    return int(payload.tensors["rank"])


def share_left(matrix: Tensor, rank: int) -> float:
    """Share of the squared singular values beyond a rank."""
    energies = torch.linalg.svdvals(matrix.double()).square()
    return float(energies[rank:].sum() / energies.sum())


@pytest.mark.parametrize("shape", [(48, 64), (96, 64), (64, 64)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_plain_is_the_truncated_decomposition(shape: tuple[int, int], rank: int) -> None:
    weight = weights(*shape)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    found = decoded(LowRank(rank, kind="plain", factor=FP32), weight)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 64), (96, 64)])
def test_whitened_is_the_least_loss(shape: tuple[int, int]) -> None:
    weight, known = weights(*shape), statistics(*shape)
    assert known.hessian is not None
    assert known.output_curvature is not None
    # The codec adds one percent to the curvature; with no damping of the Hessian the optimum has a closed form.
    g = known.output_curvature
    known = dataclasses.replace(known, output_curvature=g - 0.01 * g.mean())
    damped = dataclasses.replace(known, output_curvature=known.output_curvature + 0.01 * known.output_curvature.mean())
    root = torch.linalg.cholesky(known.hessian.double())
    weighed = damped.output_curvature.sqrt().double()[:, None] * weight.double() @ root
    whole = loss(weight, torch.zeros_like(weight), damped)
    found = decoded(LowRank(9, factor=FP32, damping=0.0), weight, known)
    assert loss(weight, found, damped) / whole == pytest.approx(share_left(weighed, 9), rel=1e-4)


def test_what_each_kind_is_for() -> None:
    """Whitened loses least of the output, plain least of the weight."""
    weight, known = weights(64, 64), statistics(64, 64)
    found = {kind: decoded(LowRank(12, kind=kind, factor=FP32), weight, known) for kind in KINDS}
    losses = {kind: loss(weight, found[kind], known) for kind in KINDS}
    assert losses["whitened"] < 0.8 * losses["activation"] < 0.8 * losses["plain"]
    errors = {kind: float((weight - found[kind]).norm()) for kind in KINDS}
    assert min(errors, key=errors.__getitem__) == "plain"


def test_importance_by_magnitude_and_activation() -> None:
    weight, known = weights(40, 30), statistics(40, 30)
    assert known.hessian is not None
    scales = {"magnitude": weight.double().abs().mean(0), "activation": known.hessian.double().diagonal().sqrt()}
    for kind, c in scales.items():
        c = c / c.square().mean().sqrt()
        found = decoded(LowRank(6, kind=kind, factor=FP32, damping=0.0), weight, known)
        left = ((weight - found).double() * c).square().sum() / (weight.double() * c).square().sum()
        assert float(left) == pytest.approx(share_left(weight.double() * c, 6), rel=1e-4)
    by_size = LowRank(6, kind="activation", factor=FP32).encode(weight, Statistics(mean_abs=known.mean_abs))
    assert rank_of(by_size) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_randomised_is_nearly_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(700, 600) @ torch.diag(torch.linspace(2, 0.1, 600)) @ weights(600, 600, 5)
    known = statistics(700, 600)
    codec = LowRank(16, kind=kind, factor=FP32)
    monkeypatch.setattr(lowrank_fit, "_SMALL", 10_000)
    exact = decoded(codec, weight, known)
    monkeypatch.setattr(lowrank_fit, "_SMALL", 100)
    found = decoded(codec, weight, known)
    assert not torch.equal(found, exact)
    if kind == "plain":
        assert float((weight - found).norm()) < 1.002 * float((weight - exact).norm())
    assert loss(weight, found, known) < 1.01 * loss(weight, exact, known)


# The choice of the rank ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [1e-6, 0.2, 0.9, 0.999, 1.0])
def test_rank_by_energy_is_the_smallest(energy: float) -> None:
    weight = weights(50, 40)
    rank = rank_of(LowRank(energy=energy, kind="plain", factor=FP32).encode(weight))
    assert 1 - share_left(weight, rank) >= energy - 1e-9
    assert rank == 1 or 1 - share_left(weight, rank - 1) < energy - 1e-9


def test_all_energy_of_a_matrix_of_rank_three() -> None:
    weight = weights(50, 3) @ weights(3, 40)
    assert rank_of(LowRank(energy=1.0, kind="plain").encode(weight)) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0.1, 0.5, 0.95])
def test_rank_by_error_is_the_smallest(kind: str, limit: float) -> None:
    weight, known = weights(50, 40), statistics(50, 40)
    codec = LowRank(error=limit, kind=kind, factor=FP32)
    assert codec.needs_statistics
    rank = rank_of(codec.encode(weight, known))
    whole = loss(weight, torch.zeros_like(weight), known)

    def error(rank: int) -> float:
        return math.sqrt(loss(weight, decoded(LowRank(rank, kind=kind, factor=FP32), weight, known), known) / whole)

    assert error(rank) <= limit * 1.01  # the curvature is damped by one percent
    assert rank == 1 or error(rank - 1) > limit * 0.99


def test_rank_by_error_needs_the_hessian() -> None:
    for known in (None, Statistics(mean_abs=torch.ones(40))):
        with pytest.raises(MissingStatisticsError, match="error of the output"):
            LowRank(error=0.1, kind="plain").encode(weights(50, 40), known)


@pytest.mark.parametrize("factor", [FP32, INT8, Uniform(4, 32), Residual(INT8, Uniform(2, 8))], ids=lambda f: f.id)
@pytest.mark.parametrize("bpw", [0.5, 2.0, 7.3])
def test_rank_by_size_is_the_largest(factor: Codec, bpw: float) -> None:
    codec, shape = LowRank(bpw=bpw, kind="plain", factor=factor), (120, 90)
    payload = codec.encode(weights(*shape))
    assert payload.bits == codec.estimate_bits(shape)
    larger = LowRank(rank_of(payload) + 1, kind="plain", factor=factor).estimate_bits(shape)
    assert larger is not None
    assert larger > bpw * 120 * 90
    assert payload.bits <= bpw * 120 * 90 or rank_of(payload) == 1


def test_ranks_stop_at_the_smaller_side() -> None:
    for codec in (LowRank(8192, kind="plain", factor=FP32), LowRank(bpw=64.0, kind="plain", factor=FP32)):
        weight = weights(12, 30)
        payload = codec.encode(weight)
        assert rank_of(payload) == 12
        torch.testing.assert_close(codec.decode(payload), weight, rtol=0, atol=3e-7)
    assert rank_of(LowRank(bpw=0.001, kind="plain").encode(weights(12, 30))) == 1


# Factors ------------------------------------------------------------------------------------------------------------


def test_fields_and_their_order() -> None:
    codec = LowRank(5, kind="plain", factor=Residual(Uniform(4, 8), Dense("float32")))
    payload = codec.encode(weights(20, 30))
    assert list(payload.tensors) == [
        "rank", "left_rest_values", "right_rest_values", "left_base_scales", "left_base_offsets", "right_base_scales",
        "right_base_offsets", "left_base_codes", "right_base_codes",
    ]  # fmt: skip
    assert codec.estimate_bits((20, 30)) == payload.bits
    assert LowRank(energy=0.5).fields((20, 30)) is None
    assert LowRank(5, factor=Trellis(1.0)).estimate_bits((20, 30)) is None


def test_the_left_factor_makes_up_for_the_error_of_the_right() -> None:
    weight, known = weights(64, 96), statistics(64, 96)
    target = lowrank_fit.target_of(weight, known, "whitened", 0.01)
    left, right, _ = lowrank_fit.factors(target, 12, exact=False)
    coarse = decoded(Uniform(2, 32), right)
    fitted = lowrank_fit.refitted(target, left, coarse)
    floor = loss(weight, left @ right, known)  # what no rounding costs
    assert loss(weight, fitted @ coarse, known) - floor < 0.8 * (loss(weight, left @ coarse, known) - floor)


def test_rounding_of_factors_uses_the_statistics_of_each() -> None:
    weight, known = weights(64, 96), statistics(64, 96)
    losses = [
        loss(weight, decoded(LowRank(12, factor=Uniform(3, 32, rounding=rounding)), weight, known), known)
        for rounding in (Gptq(), Uniform(3).rounding)
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("factor", [Trellis(0.05), Trellis(0.01, calibrated=False), Rotated(Uniform(6, 16))])
def test_any_factor(factor: Codec) -> None:
    weight, known = weights(40, 64), statistics(40, 64)
    codec = LowRank(30, factor=factor)
    payload = codec.encode(weight, known)
    found = codec.decode(payload)
    assert loss(weight, found, known) < 0.2 * loss(weight, torch.zeros_like(weight), known)
    assert torch.equal(codec.rows(torch.tensor([[3, 39]]), codec.prepare(payload)), found[torch.tensor([[3, 39]])])


@pytest.mark.parametrize("kind", KINDS)
def test_norm_correction(kind: str) -> None:
    weight, known = weights(40, 64), statistics(40, 64)
    plain = LowRank(4, kind=kind, factor=FP32)
    corrected = dataclasses.replace(plain, norm_correction=True)
    assert corrected.estimate_bits((40, 64)) == plain.estimate_bits((40, 64))
    found, before = decoded(corrected, weight, known), decoded(plain, weight, known)
    assert float(found.norm()) == pytest.approx(float(weight.norm()), rel=1e-5)
    factor = float(found.norm() / before.norm())
    torch.testing.assert_close(found, before * factor, rtol=1e-4, atol=1e-7)


def test_factors_of_magnitudes_that_fp16_does_not_hold() -> None:
    codec = LowRank(10, kind="plain", factor=Dense("float16"))
    for scale in (1e-6, 1.0, 1e6):
        weight = weights(10, 30) * scale
        torch.testing.assert_close(decoded(codec, weight), weight, rtol=0, atol=2e-4 * scale)


# Decoding -----------------------------------------------------------------------------------------------------------


def test_the_product_is_exact() -> None:
    """Against integers: the factors rounded to 20 bits, an exact sum, one rounding."""
    codec, weight = LowRank(9, kind="plain", factor=FP32), weights(13, 40)
    weight[3] *= 1e-30
    weight[:, 5] *= 1e20
    payload = codec.encode(weight)

    def integers(vector: list[float]) -> tuple[list[int], int]:
        exponent = math.frexp(max(map(abs, vector)))[1] - 20
        return [round(math.ldexp(value, -exponent)) for value in vector], exponent

    left = [integers(row) for row in payload.tensors["left_values"].tolist()]
    right = [integers(column) for column in payload.tensors["right_values"].T.tolist()]
    expected = [[math.ldexp(sum(p * q for p, q in zip(a, b, strict=True)), u + v) for b, v in right] for a, u in left]
    assert torch.equal(codec.decode(payload), torch.tensor(expected, dtype=torch.float64).float())


def test_hostile_payloads() -> None:
    codec = LowRank(energy=0.5, kind="plain", factor=INT8)
    payload = codec.encode(weights(20, 30))

    def refused(**tensors: Tensor) -> None:
        broken = dataclasses.replace(payload, tensors={**payload.tensors, **tensors})
        with pytest.raises(InvalidPayloadError):
            codec.decode(broken)
        with pytest.raises(InvalidPayloadError):
            codec.rows(torch.tensor([0]), codec.prepare(broken))

    for rank in (0, -1, 1, 20, 21, 2**31 - 1):
        refused(rank=torch.tensor([rank], dtype=torch.int32))
    refused(rank=payload.tensors["rank"].long())
    refused(rank=payload.tensors["rank"][0])
    refused(surplus=torch.zeros(1))
    refused(left_surplus=torch.zeros(1))
    for value in (float("nan"), float("inf")):
        scales = payload.tensors["left_scales"].clone()
        scales[0] = value
        refused(left_scales=scales)


def test_a_few_bytes_do_not_stand_for_terabytes() -> None:
    codec, size = LowRank(1, kind="plain", factor=Uniform(2, None, True)), 1 << 20
    tensors = {f.name: torch.zeros(f.shape, dtype=f.dtype) for f in codec.fields((size, size)) or ()}
    tensors["rank"] += 1
    with pytest.raises(InvalidPayloadError, match="bytes"):
        codec.decode(Payload(codec.to_json(), (size, size), torch.float32, tensors))
    with pytest.raises(InvalidPayloadError):
        codec.prepare(Payload(codec.to_json(), (size, size), torch.float32, {}))


def test_encoding_refuses_what_decoding_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenpak.codecs.lowrank._MOST_WEIGHTS", 1)
    with pytest.raises(UnsupportedShapeError, match="too small for a weight"):
        LowRank(1, kind="plain").encode(weights(50, 50))


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 12),
        torch.full((8, 12), 3.0),
        weights(1, 12),
        weights(8, 1).repeat(1, 12),
        weights(8, 2) @ weights(2, 12),
    ],
    ids=["zero", "constant", "row", "equal columns", "rank 2"],
)
@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 1.0}, {"error": 1e-3}, {"bpw": 32.0}])
def test_degenerate_weights(kind: str, weight: Tensor, options: dict[str, Any]) -> None:
    codec = LowRank(**options, kind=kind, factor=FP32)
    known = statistics(len(weight), 12)
    payload = codec.encode(weight, known)
    torch.testing.assert_close(codec.decode(payload), weight, rtol=1e-4, atol=1e-6)
    if "energy" in options:
        assert rank_of(payload) == max(1, int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5)))


@pytest.mark.parametrize("kind", ["activation", "whitened"])
def test_degenerate_hessians(kind: str) -> None:
    weight, x = weights(10, 30), torch.randn(3, 30, generator=generator(4))
    outer = x.T @ x
    indefinite = torch.diag(torch.cat((torch.ones(29), torch.tensor([0.0]))))
    indefinite[0, 1] = indefinite[1, 0] = 5.0
    for hessian in (outer, torch.zeros(30, 30), outer * 1e-37, outer * 1e36, indefinite):
        for damping in (0.0, 0.01):
            codec = LowRank(10, kind=kind, factor=FP32, damping=damping)
            found = decoded(codec, weight, Statistics(hessian=hessian, output_curvature=torch.zeros(10)))
            torch.testing.assert_close(found, weight, rtol=0, atol=1e-5)


def test_a_singular_hessian_costs_nothing_where_inputs_go() -> None:
    weight, x = weights(20, 30), torch.randn(4, 30, generator=generator(4))
    found = decoded(LowRank(4, factor=FP32, damping=0.0), weight, Statistics(hessian=x.T @ x))
    torch.testing.assert_close(found @ x.T, weight @ x.T, rtol=0, atol=1e-4)


def test_damaged_statistics_are_refused() -> None:
    weight = weights(5, 40)
    hessian = torch.eye(40)
    hessian[3, 4] = float("nan")
    with pytest.raises(CodecError, match="NaN or infinite"):
        LowRank(2).encode(weight, Statistics(hessian=hessian))
    with pytest.raises(CodecError, match="negative, NaN or infinite"):
        LowRank(2, kind="activation").encode(weight, Statistics(hessian=-torch.eye(40)))
    for known in (Statistics(hessian=torch.eye(41)), Statistics(mean_abs=torch.ones(41))):
        with pytest.raises(CodecError, match="40 input columns"):
            LowRank(2, kind="activation").encode(weight, known)
    with pytest.raises(CodecError, match="output curvature"):
        LowRank(2).encode(weight, Statistics(hessian=torch.eye(40), output_curvature=torch.ones(4)))
    with pytest.raises(MissingStatisticsError, match="kind whitened need the Hessian"):
        LowRank(2).encode(weight, Statistics(mean_abs=torch.ones(40)))


def test_configurations() -> None:
    assert LowRank(4).to_json() == {
        "id": "lowrank/1", "rank": 4, "kind": "whitened", "factor": Dense("float16").to_json(), "damping": 0.01,
    }  # fmt: skip
    assert registry.from_json({"id": "lowrank/1", "energy": 1}) == LowRank(energy=1.0)
    for options, message in (
        ({}, "exactly one of rank, energy, bpw and error must be given, got none"),
        ({"rank": 4, "bpw": 2.0}, "got rank and bpw"),
        ({"rank": 0}, "rank must be an integer from 1 to 8192"),
        ({"rank": 4.0}, "rank must be an integer"),
        ({"energy": 0.0}, "energy must be a number"),
        ({"energy": 1.1}, "energy must be a number"),
        ({"energy": float("nan")}, "energy must be a number"),
        ({"error": 0}, "error must be a number"),
        ({"bpw": 0}, "bpw must be a number"),
        ({"rank": 4, "kind": "white"}, "kind must be one of plain, magnitude, activation, whitened"),
        ({"rank": 4, "factor": 8}, "factor must be a codec, got 8"),
        ({"rank": 4, "damping": -1}, "damping must be a number from 0 to 1"),
        ({"rank": 4, "norm_correction": 1}, "norm_correction must be true or false"),
        ({"bpw": 2.0, "factor": Trellis(1.0)}, "bpw needs a factor of fixed rate"),
        ({"rank": 4, "factor": Rotated(LowRank(2))}, "of low rank again"),
    ):
        with pytest.raises(RecipeError, match=message):
            LowRank(**options)


# Refinement of sums -------------------------------------------------------------------------------------------------


SUMS = [
    (LowRank(6, factor=INT8), Uniform(2, 32, rounding=Gptq())),
    (Uniform(3, 32, rounding=Gptq()), LowRank(6, factor=INT8)),
    (Uniform(2, 32), Uniform(2, 32)),
    (LowRank(4, kind="plain"), Residual(Uniform(2, 32), LowRank(3, kind="plain"), iterations=2)),
]


@pytest.mark.parametrize(("base", "rest"), SUMS, ids=["caldera", "quantizer first", "quantizers", "nested"])
def test_refinement_never_loses(base: Codec, rest: Codec) -> None:
    weight, known = weights(64, 96), statistics(64, 96)
    g = known.output_curvature
    assert g is not None
    damped = dataclasses.replace(known, output_curvature=g + 0.01 * g.mean())
    losses = [loss(weight, decoded(Residual(base, rest, count), weight, known), damped) for count in range(5)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))
    assert Residual(base, rest, 4).estimate_bits((64, 96)) == Residual(base, rest).estimate_bits((64, 96))


def test_caldera_gains() -> None:
    weight, known = weights(64, 96), statistics(64, 96)
    base, rest = SUMS[0]
    once, refined = (loss(weight, decoded(Residual(base, rest, count), weight, known), known) for count in (0, 10))
    assert refined < 0.97 * once


def test_refinement_without_statistics_is_of_the_weight_itself() -> None:
    weight = weights(64, 96)
    base, rest = LowRank(6, kind="plain"), Uniform(2, 32)
    errors = [float((weight - decoded(Residual(base, rest, count), weight)).norm()) for count in (0, 10)]
    assert errors[1] < errors[0]


def test_a_sum_multiplies_without_decoding_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(64, 96)
    codec = Residual(Uniform(4, 32), Residual(LowRank(6, kind="plain"), Uniform(2, 32)))
    payload, x = codec.encode(weight), torch.randn(3, 96, generator=generator(5))
    expected, prepared = x @ codec.decode(payload).T, codec.prepare(payload)
    monkeypatch.setattr(LowRank, "decode", lambda *_: pytest.fail("decoded"))
    torch.testing.assert_close(codec.matmul(x, prepared), expected)
    assert not Residual(Uniform(4, 32), Uniform(2, 32)).multiplies_cheaply


def test_refinement_is_left_out_where_there_is_none() -> None:
    plain = Residual(*SUMS[2])
    assert "iterations" not in plain.to_json()
    assert registry.from_json({**plain.to_json(), "iterations": 0}) == plain
    assert registry.from_json(Residual(*SUMS[2], 3).to_json()) == Residual(*SUMS[2], 3)
    for bad in (-1, 21, 1.0, True):
        with pytest.raises(RecipeError, match="iterations must be an integer from 0 to 20"):
            Residual(*SUMS[2], bad)


@pytest.mark.parametrize("weight", [torch.zeros(8, 40), torch.full((8, 40), 0.25), weights(1, 40), weights(40, 1)])
def test_refinement_of_degenerate_weights(weight: Tensor) -> None:
    codec = Residual(LowRank(2, factor=INT8), Uniform(4, 16), 5)
    found = decoded(codec, weight, Statistics(hessian=torch.eye(weight.shape[1])))
    assert (found - weight).abs().max() <= 0.02 * weight.abs().max()


def test_refinement_refuses_statistics_of_another_weight() -> None:
    with pytest.raises(CodecError, match="40 input columns"):
        Residual(Uniform(2, 32), Uniform(2, 32), 1).encode(weights(5, 40), Statistics(hessian=torch.eye(41)))
