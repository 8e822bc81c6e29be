"""Spectra of matrices whose singular values are known."""

from __future__ import annotations

import math

import pytest
import torch

from tenpak.evaluation.diagnostics.spectrum import effective_rank, energies, energy_curve, sample


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(values)[0]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12)])
def test_equal_directions_count_fully(shape) -> None:
    matrix = 7 * orthonormal(max(shape), 12)
    matrix = matrix if shape[0] >= shape[1] else matrix.T
    assert effective_rank(energies(matrix)) == pytest.approx(12)


def test_one_direction_counts_as_one() -> None:
    matrix = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 20))
    assert effective_rank(energies(matrix)) == pytest.approx(1, abs=1e-9)
    assert energy_curve(energies(matrix), (0.01,))[0][1] == pytest.approx(1)


def test_known_singular_values() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    matrix = orthonormal(30, 4) @ torch.diag(singular) @ orthonormal(8, 4, seed=1).T[:, :]
    shares = energies(matrix)
    expected = singular.square() / 15
    assert torch.allclose(shares[:4], expected)
    assert len(shares) == 8
    assert effective_rank(shares) == pytest.approx(math.exp(-(expected * expected.log()).sum()))
    assert energy_curve(shares, (1 / 8, 2 / 8, 0.3, 1.0)) == (
        (1 / 8, pytest.approx(9 / 15)),
        (2 / 8, pytest.approx(13 / 15)),
        (0.3, pytest.approx(14 / 15)),  # rounded up to 3 of 8
        (1.0, pytest.approx(1)),
    )


def test_an_energy_curve_is_that_of_the_truncated_decomposition() -> None:
    matrix = torch.randn(24, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    for share, kept in energy_curve(energies(matrix), (0.25, 0.5)):
        rank = math.ceil(share * 24)
        cut = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        assert 1 - kept == pytest.approx(float(((matrix - cut).norm() / matrix.norm()) ** 2))


def test_zeros_have_no_rank() -> None:
    shares = energies(torch.zeros(5, 9))
    assert effective_rank(shares) == 0
    assert energy_curve(shares, (0.5,)) == ((0.5, 0.0),)


def test_a_sample_is_bounded_and_says_what_the_whole_would() -> None:
    assert sample(torch.empty(1024, 4096)).shape == (1024, 4096)
    assert sample(torch.empty(30, 50_000)).shape == (30, 4096)
    assert sample(torch.empty(9000, 2000)).shape == (4096, 1024)
    matrix = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(3))
    part = sample(matrix)
    assert part.shape == (2048, 1024)
    whole = effective_rank(energies(matrix[:1500, :750])) / 750
    assert effective_rank(energies(part)) / 1024 == pytest.approx(whole, rel=0.01)
