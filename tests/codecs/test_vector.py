"""Vector quantization: codes are nearest, k-means is Lloyd's, and feedback and sweeps do what their formulas say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matrices import known, loss, random, weights
from torch import Tensor

from tenpak.codecs.base import Statistics
from tenpak.codecs.codebook_fit import Plan, fit
from tenpak.codecs.codebooks import cut, kmeans, nearest
from tenpak.codecs.rounding.feedback import feedback
from tenpak.codecs.vector import Vector
from tenpak.errors import CodecError, MissingStatisticsError, RecipeError, SingularHessianError
from tenpak.kernels import unpack

# What is stored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dimension", "entries"), [(2, 16), (4, 256), (8, 512), (16, 32)])
def test_decode_is_the_formula_and_codes_are_nearest(dimension: int, entries: int, scaled: bool) -> None:
    weight = weights(40, 101)
    codec = Vector(dimension, entries, scaled, rounds=0)
    payload = codec.encode(weight)
    count = -(-101 // dimension)
    codes = unpack(payload.tensors["codes"], entries.bit_length() - 1, count).long()
    codebook = payload.tensors["codebook"].float()
    scales = payload.tensors["scales"].float() if scaled else torch.ones(40)
    expected = (codebook[codes] * scales[:, None, None]).flatten(1)[:, :101]
    assert torch.equal(codec.decode(payload), expected)
    points = cut(weight, dimension) / scales[:, None, None]
    distance = (points.unsqueeze(2) - codebook).square().sum(-1)
    taken = distance.gather(2, codes.unsqueeze(2))[..., 0]
    assert torch.allclose(taken, distance.amin(2), rtol=1e-3, atol=1e-6)


def test_size() -> None:
    bits = {(4, 256): 8, (8, 65536): 16, (8, 16): 4, (16, 1024): 10}
    for (dimension, entries), code in bits.items():
        expected = 64 * (256 // dimension * code) + 16 * entries * dimension
        assert Vector(dimension, entries).estimate_bits((64, 256)) == expected
        assert Vector(dimension, entries, scaled=True).estimate_bits((64, 256)) == expected + 64 * 16


@pytest.mark.parametrize("weighting", ["equal", "magnitude", "calibrated"])
def test_fewer_vectors_than_entries_are_kept(weighting: str) -> None:
    """Each has an entry of its own; the others are zero."""
    weight = weights(5, 30).half().float()
    codec = Vector(8, 1024, weighting=weighting)
    payload = codec.encode(weight, known(5, 30))
    assert torch.equal(codec.decode(payload), weight)
    assert not payload.tensors["codebook"][20:].any()


@pytest.mark.parametrize("weighting", ["equal", "magnitude", "calibrated"])
def test_few_values_are_kept(weighting: str) -> None:
    """As many as there are entries, whatever draws were made: empty entries move to where they are missing."""
    values = torch.linspace(-1, 1, 16).half().float()
    weight = values[torch.randint(0, 16, (600, 1), generator=random(1))].expand(-1, 2).repeat(1, 8)
    codec = Vector(2, 16, weighting=weighting)
    assert torch.equal(codec.decode(codec.encode(weight, known(600, 16))), weight)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weighting", ["equal", "calibrated"])
def test_constant_and_zero_rows(weighting: str, scaled: bool) -> None:
    weight = weights(300, 36)
    weight[7], weight[11] = 0, 0.125
    codec = Vector(4, 64, scaled, weighting)
    decoded = codec.decode(codec.encode(weight, known(300, 36)))
    assert decoded.isfinite().all()
    assert decoded[7].abs().max() < (1e-9 if scaled else 0.05)
    assert torch.equal(Vector(4, 16).decode(Vector(4, 16).encode(torch.full((99, 8), 0.5))), torch.full((99, 8), 0.5))


def test_scales_keep_rows_of_different_sizes() -> None:
    weight = weights(64, 128) * torch.logspace(-3, 0, 64).unsqueeze(1)

    def error(scaled: bool) -> Tensor:
        codec = Vector(4, 64, scaled)
        difference = codec.decode(codec.encode(weight)) - weight
        return (difference.norm(dim=1) / weight.norm(dim=1)).max()

    assert error(scaled=True) < 0.7 < error(scaled=False)


# K-means -------------------------------------------------------------------------------------------------------------


def test_nearest_is_nearest_in_the_metric() -> None:
    points, codebook = weights(700, 4), weights(64, 4, seed=1)
    root = torch.randn(4, 4, generator=random(2))
    metric = root @ root.T
    difference = points[:, None] - codebook
    distance = torch.einsum("nki,ij,nkj->nk", difference, metric, difference)
    assert torch.equal(nearest(points, [codebook], metric)[:, 0], distance.argmin(1))


def test_kmeans_is_lloyds_iteration() -> None:
    points, importance = torch.randn(500, 4, generator=random(0)), torch.rand(500, generator=random(1))
    found = kmeans(points[None], importance[None], None, 16, random(5))
    x, w = points.numpy().astype(np.float64), importance.numpy().astype(np.float64)
    codebook = x[torch.randperm(500, generator=random(5))[:16].numpy()]
    for _ in range(20):
        codes = np.square(x[:, None] - codebook).sum(-1).argmin(1)
        codebook = np.stack([np.average(x[codes == k], 0, w[codes == k]) for k in range(16)])
    assert np.allclose(found.numpy(), codebook, atol=1e-5)


def test_kmeans_in_metrics_solves_for_entries() -> None:
    """At its end no small change of an entry lowers the distance."""
    points, importance = torch.randn(3, 200, 2, generator=random(0)), torch.rand(3, 200, generator=random(1))
    root = torch.randn(3, 2, 2, generator=random(2))
    metric = root @ root.mT + 0.1 * torch.eye(2)

    def distance(codebook: Tensor) -> float:
        difference = points.unsqueeze(2) - codebook
        each = torch.einsum("rnki,rij,rnkj->rnk", difference, metric, difference).amin(2)
        return float((each * importance).sum())

    found = kmeans(points, importance, metric, 16, random(0))
    assert all(distance(found) <= distance(found + 1e-2 * torch.randn(16, 2, generator=random(s))) for s in range(20))


def test_the_seed_matters_and_only_it() -> None:
    weight = weights(64, 64)
    first, again, other = (Vector(4, 16, seed=seed).encode(weight).tensors["codebook"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_magnitude_favours_long_vectors() -> None:
    weight = weights(200, 64)
    long = cut(weight, 4).norm(dim=-1) > 0.06

    def error(weighting: str) -> float:
        codec = Vector(4, 16, weighting=weighting)
        difference = codec.decode(codec.encode(weight)) - weight
        return float(cut(difference, 4)[long].square().sum())

    assert long.any()
    assert error("magnitude") < 0.95 * error("equal")


# Sharing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["equal", "calibrated"])
def test_a_shared_codebook_stays_as_it_is_learned(weighting: str) -> None:
    codec = Vector(4, 32, True, weighting, rounds=3, shared=True)
    matrices = [weights(40, 101), 20 * weights(24, 64, seed=1)]
    book = codec.learn(matrices)
    assert book["codebook"].shape == (32, 4)
    assert book["codebook"].dtype == torch.float16
    for matrix in matrices:
        payload = codec.encode_sharing(matrix, book, known(*matrix.shape))
        assert payload.shared["codebook"].equal(book["codebook"])
        assert payload.bits == codec.estimate_bits(payload.shape)
        assert payload.bits == Vector(4, 32, True).estimate_bits(payload.shape) - 16 * 32 * 4
        count = -(-payload.shape[1] // 4)
        codes = unpack(payload.tensors["codes"], 5, count).numpy().astype(int)
        expected = book["codebook"].float().numpy()[codes].reshape(len(codes), -1)[:, : payload.shape[1]]
        expected = expected * payload.tensors["scales"].float().numpy()[:, None]
        assert np.array_equal(codec.decode(payload).numpy(), expected)


def test_rows_of_any_size_count_the_same_for_what_is_learned() -> None:
    matrix = weights(60, 64)
    codec = Vector(4, 16, scaled=True, shared=True)
    once = codec.learn([matrix])["codebook"].float()
    scaled = codec.learn([matrix * torch.logspace(-2, 2, 60).unsqueeze(1)])["codebook"].float()
    assert torch.allclose(once, scaled, atol=2e-3)  # scales are rounded to FP16


def test_what_is_learned_from_is_bounded_and_of_all_matrices() -> None:
    """Each matrix has a pattern of its own; all of them are among so many vectors that only some are taken."""
    patterns = torch.eye(16)[:, :4].contiguous()
    patterns[4:] = torch.randn(12, 4, generator=random(3))
    patterns /= patterns.square().mean(1, keepdim=True).sqrt()
    codec = Vector(4, 16, scaled=True, shared=True)
    seen = 0

    def matrices() -> Iterator[Tensor]:
        nonlocal seen
        for pattern in patterns:
            seen += 1
            yield 0.02 * pattern.repeat(1000, 16)

    book = codec.learn(matrices())["codebook"].float()
    assert seen == 16
    assert torch.cdist(patterns, book).amin(1).max() < 2e-3
    assert torch.equal(book, codec.learn(matrices())["codebook"].float())


def test_rounds_with_a_shared_codebook_lower_the_loss() -> None:
    weight, statistics = weights(96, 128), known(96, 128)
    losses = [
        loss(weight, Vector(4, 64, True, "calibrated", rounds=rounds, shared=True), statistics) for rounds in (0, 1, 6)
    ]
    assert losses[0] > 1.02 * losses[1] >= losses[2]


# Feedback ------------------------------------------------------------------------------------------------------------


def fitted_codes(rounds: int, entries: int = 16) -> tuple[Tensor, Statistics, Plan]:
    return weights(6, 24), known(6, 24), Plan(4, entries, 1, False, 1, rounds, 0)


def test_feedback_chooses_what_is_best_for_what_was_chosen_before() -> None:
    """Code after code, by brute force over all entries: the loss of E·U up to this vector's last column."""
    weight, statistics, plan = fitted_codes(rounds=0)
    found = fit(weight, plan, 0.01, statistics, by_magnitude=False)
    shared = feedback(statistics, 24, 0.01, by_activation=False, sweeps=False)
    upper = (shared.earlier * shared.pivots.sqrt().unsqueeze(1)).T.double()  # H = U·Uᵀ
    entries = found.books[0].double()
    for row in range(6):
        error = torch.zeros(24, dtype=torch.float64)
        for vector in range(6):
            own = slice(4 * vector, 4 * vector + 4)
            tried = error.repeat(16, 1)
            tried[:, own] = weight[row, own].double() - entries
            losses = (tried @ upper[:, : own.stop]).square().sum(1)
            code = int(found.codes[row, vector, 0])
            assert losses[code] <= losses.min() * (1 + 1e-4)
            error = tried[code]


def test_statistics_are_worth_half_the_loss() -> None:
    weight, statistics = weights(96, 128), known(96, 128)
    datafree, calibrated = (Vector(4, 64, weighting=w) for w in ("equal", "calibrated"))
    assert loss(weight, calibrated, statistics) < 0.5 * loss(weight, datafree, statistics)


def test_rounds_lower_the_loss() -> None:
    weight, statistics = weights(96, 128), known(96, 128)
    losses = [loss(weight, Vector(8, 64, True, "calibrated", rounds=rounds), statistics) for rounds in (0, 1, 6)]
    assert losses[0] > 1.02 * losses[1] > losses[2]


def test_without_correlations_feedback_changes_nothing() -> None:
    weight = weights(40, 64)
    plain, fed = Vector(4, 32, rounds=0), Vector(4, 32, weighting="calibrated", rounds=0)
    decoded = fed.decode(fed.encode(weight, Statistics(hessian=torch.eye(64))))
    # Rows are drawn for k-means in another order, so the codebooks differ.
    assert (decoded - weight).norm() == pytest.approx(float((plain.decode(plain.encode(weight)) - weight).norm()), 0.03)


def test_inputs_never_seen_and_outputs_that_do_not_matter() -> None:
    weight, statistics = weights(40, 64), known(40, 64)
    assert statistics.hessian is not None
    hessian = statistics.hessian.clone()
    hessian[::3], hessian[:, ::3] = 0, 0
    codec = Vector(4, 32, weighting="calibrated")
    for other in (
        replace(statistics, hessian=hessian),
        replace(statistics, hessian=torch.zeros(64, 64)),
        replace(statistics, output_curvature=torch.zeros(40)),
    ):
        decoded = codec.decode(codec.encode(weight, other))
        assert (decoded - weight).norm() < 1.5 * weight.norm()


# Refusals ------------------------------------------------------------------------------------------------------------


def test_bad_statistics_are_refused() -> None:
    weight, codec = weights(4, 32), Vector(weighting="calibrated")
    with pytest.raises(MissingStatisticsError, match="vector/1 needs the Hessian"):
        codec.encode(weight, Statistics(output_curvature=torch.ones(4)))
    with pytest.raises(CodecError, match="32 input columns"):
        codec.encode(weight, Statistics(hessian=torch.eye(31)))
    with pytest.raises(CodecError, match="4 output rows"):
        codec.encode(weight, Statistics(hessian=torch.eye(32), output_curvature=torch.ones(5)))
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 9.0
    with pytest.raises(SingularHessianError):
        codec.encode(weight, Statistics(hessian=indefinite))


@pytest.mark.parametrize("scaled", [False, True])
def test_beyond_fp16_is_refused(scaled: bool) -> None:
    with pytest.raises(CodecError, match="FP16"):
        Vector(4, 16, scaled).encode(torch.full((20, 8), 7e4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dimension": 5}, "dimension must be one of 2, 4, 8, 16, got 5"),
        ({"entries": 255}, "entries must be one of 16, 32, .*65536, got 255"),
        ({"entries": 1 << 17}, "entries must"),
        ({"scaled": 1}, "scaled must be true or false, got 1"),
        ({"weighting": "hessian"}, "weighting must be one of equal, magnitude, calibrated, got 'hessian'"),
        ({"rounds": -1}, "rounds must be an integer from 0 to 100, got -1"),
        ({"damping": 0}, "damping must be a number"),
        ({"seed": 1 << 32}, "seed must"),
        ({"shared": 1}, "shared must be true or false, got 1"),
        ({"shared": True}, "a shared codebook is for rows that are scaled"),
    ],
)
def test_configuration_is_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Vector(**fields)  # type: ignore[arg-type]


def test_other_codes_are_other_weights_but_never_an_error() -> None:
    """Every code is an entry, so damaged bytes decode."""
    codec = Vector(4, 256)
    payload = codec.encode(weights(8, 64))
    noise = torch.randint(0, 256, payload.tensors["codes"].shape, dtype=torch.uint8, generator=random(0))
    broken = dataclasses.replace(payload, tensors={**payload.tensors, "codes": noise})
    assert codec.decode(broken).isfinite().all()
