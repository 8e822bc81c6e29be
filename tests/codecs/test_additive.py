"""Additive quantization: beam search, codebooks by least squares under the Hessian, and what they are worth."""

from __future__ import annotations

import pytest
import torch
from matrices import known, loss, random, weights
from torch import Tensor

from tenpak.codecs.additive import Additive
from tenpak.codecs.codebook_fit import Fitted, Plan, fit, least_squares, loss_of
from tenpak.codecs.codebooks import cut, expand, nearest
from tenpak.codecs.rounding.feedback import feedback
from tenpak.codecs.vector import Vector
from tenpak.errors import CodecError, MissingStatisticsError, RecipeError
from tenpak.kernels import unpack


@pytest.mark.parametrize(("books", "dimension", "entries"), [(1, 2, 16), (2, 8, 64), (3, 4, 512), (4, 16, 32)])
def test_decode_is_the_formula(books: int, dimension: int, entries: int) -> None:
    codec = Additive(books, dimension, entries, calibrated=False, rounds=1)
    payload = codec.encode(weights(9, 101))
    count = -(-101 // dimension)
    codes = unpack(payload.tensors["codes"], entries.bit_length() - 1, count * books).long().view(9, count, books)
    codebooks = payload.tensors["codebooks"].float()
    total = codebooks[0][codes[..., 0]]
    for book in range(1, books):
        total = total + codebooks[book][codes[..., book]]
    expected = total.flatten(1)[:, :101] * payload.tensors["scales"].float().unsqueeze(1)
    assert torch.equal(codec.decode(payload), expected)
    assert payload.bits == 16 * 9 + 16 * codebooks.numel() + 8 * 9 * -(-count * books * (entries.bit_length() - 1) // 8)


@pytest.mark.parametrize("books", [2, 3])
def test_a_wide_beam_finds_the_nearest_sum(books: int) -> None:
    """With as many paths as there are sums nothing is left out; brute force over all sums."""
    codebooks = [weights(16, 4, seed) for seed in range(books)]
    root = torch.randn(4, 4, generator=random(9))
    metric, points = root @ root.T, weights(40, 4, 7)
    every = torch.cartesian_prod(*[torch.arange(16)] * books)
    difference = points.unsqueeze(1) - expand(every, codebooks)
    best = torch.einsum("nki,ij,nkj->nk", difference, metric, difference).amin(1)

    def distance(width: int) -> Tensor:
        error = points - expand(nearest(points, codebooks, metric, width), codebooks)
        return (error @ metric * error).sum(1)

    assert torch.allclose(distance(16 ** (books - 1)), best, rtol=1e-3, atol=1e-8)
    assert distance(1).sum() > distance(4).sum() >= best.sum() * (1 - 1e-4)


def test_search_keeps_better_codes() -> None:
    codebooks, points = [weights(16, 4, seed) for seed in range(3)], weights(200, 4, 7)
    exact = nearest(points, codebooks, None, 256)
    again = nearest(points, codebooks, None, 1, exact)
    error, best = ((points - expand(codes, codebooks)).square().sum(1) for codes in (again, exact))
    assert torch.allclose(error, best)


def test_codebooks_are_the_least_squares_solution() -> None:
    """Of the normal equations under the damped Hessian, written out: one unknown for each number of each book."""
    weight, statistics = weights(30, 14), known(30, 14)
    plan = Plan(4, 16, 2, True, 4, 0, 0)
    start = fit(weight, plan, 0.1, statistics, by_magnitude=False)
    importance = torch.rand(30, 1, generator=random(1)) + 0.5
    target, matrices = cut(weight, 4).flatten(1), loss_of(statistics, 14, 4, 0.1)
    found = start
    for _ in range(8):  # one call makes a few steps only
        found = Fitted(start.scales, least_squares(target, importance, matrices, found), start.codes)

    shared = feedback(statistics, 14, 0.1, by_activation=False, sweeps=False)
    upper = (shared.earlier * shared.pivots.sqrt().unsqueeze(1)).T.double()
    selection = torch.zeros(30, 4, 4, 2, 16, 4, dtype=torch.float64)  # of row, vector, place: book, entry, place
    for row, vector, book in torch.cartesian_prod(torch.arange(30), torch.arange(4), torch.arange(2)).tolist():
        code = int(start.codes[row, vector, book])
        selection[row, vector, range(4), book, code, range(4)] = float(start.scales[row])
    design = selection.flatten(3).flatten(1, 2)[:, :14]
    root = importance.double().sqrt().unsqueeze(2)
    design = (root * (upper.T @ design)).flatten(0, 1)
    right = (root.squeeze(2) * (weight.double() @ upper)).flatten()
    solution = torch.linalg.lstsq(design, right, driver="gelsd").solution
    least = float((design @ solution - right).square().sum())
    ours = float((design @ found.codebooks.double().flatten() - right).square().sum())
    before = float((design @ start.codebooks.double().flatten() - right).square().sum())
    assert least * (1 - 1e-6) <= ours <= least * 1.01 < before


def test_it_is_better_than_one_codebook_of_its_rate() -> None:
    weight, statistics = weights(256, 256), known(256, 256)
    additive, vector = Additive(2, 8, 64), Vector(4, 64, True, "calibrated")  # 1.5 bits and the bytes of scales
    assert additive.estimate_bits((256, 256)) < vector.estimate_bits((256, 256)) * 1.15
    assert loss(weight, additive, statistics) < loss(weight, vector, statistics)


def test_statistics_rounds_and_a_wider_beam_are_worth_their_time() -> None:
    weight, statistics = weights(96, 128), known(96, 128)
    datafree = loss(weight, Additive(2, 8, 64, calibrated=False), statistics)
    losses = [
        loss(weight, Additive(2, 8, 64, beam=beam, rounds=rounds), statistics)
        for beam, rounds in ((1, 0), (8, 0), (8, 1), (8, 6))
    ]
    assert 0.7 * datafree > losses[0] > losses[1] > losses[2] > losses[3]


@pytest.mark.parametrize("calibrated", [False, True])
def test_degenerate_weights(calibrated: bool) -> None:
    codec = Additive(2, 8, 16, calibrated)
    for weight in (torch.zeros(20, 24), torch.full((20, 24), -0.5), weights(1, 3), weights(3, 1), weights(1, 1)):
        decoded = codec.decode(codec.encode(weight, known(*weight.shape)))
        assert torch.allclose(decoded, weight, rtol=2e-3)
    weight = weights(40, 33)
    weight[3] = 0
    decoded = codec.decode(codec.encode(weight, known(40, 33)))
    assert decoded.isfinite().all()
    assert not decoded[3].any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(MissingStatisticsError, match="additive/1 needs the Hessian"):
        Additive().encode(weights(4, 32))
    with pytest.raises(CodecError, match="FP16"):
        Additive(calibrated=False).encode(torch.full((20, 8), 7e4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"books": 5}, "books must be an integer from 1 to 4, got 5"),
        ({"dimension": 3}, "dimension must"),
        ({"entries": 8}, "entries must be one of 16, 32"),
        ({"calibrated": "yes"}, "calibrated must"),
        ({"beam": 0}, "beam must be an integer from 1 to 64"),
        ({"rounds": 101}, "rounds must"),
        ({"damping": 2.0}, "damping must"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_configuration_is_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Additive(**fields)  # type: ignore[arg-type]
