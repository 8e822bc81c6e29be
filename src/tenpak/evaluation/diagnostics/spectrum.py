"""Singular values of a matrix as shares of its energy, at a bounded cost.

With singular values σ the energy of direction i is pᵢ = σᵢ² / Σσ², read from the eigenvalues of the Gram matrix on the
smaller side, in float64. From it

- the *effective rank* exp(-Σ pᵢ log pᵢ): n for n equal directions, 1 for a single one. It is Roy and Vetterli's (The
  Effective Rank, EUSIPCO 2007) with squared singular values, which weigh as squared errors do; theirs has plain ones
  and is larger
- the *energy curve*: the share of energy that the best approximation of rank k keeps, which is 1 minus the squared
  relative error of a round trip through a singular value decomposition cut at k

A matrix of more than 1024 × 4096 is represented by that many of its rows and columns, at equal distances: its shares
of rank say what the whole one's would, the effective rank itself is that of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SHARES", "effective_rank", "energies", "energy_curve", "sample"]

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Shares of the rank at which energy curves are given."""

_SMALLER, _LARGER = 1024, 4096


def sample(matrix: Tensor) -> Tensor:
    """Rows and columns of a matrix at equal distances, as many as are affordable; all where these are all."""
    wide = matrix.shape[0] < matrix.shape[1]
    rows, columns = (_SMALLER, _LARGER) if wide else (_LARGER, _SMALLER)
    return matrix[_spread(matrix.shape[0], rows)][:, _spread(matrix.shape[1], columns)]


def energies(matrix: Tensor) -> Tensor:
    """Shares of energy by direction, float64 ``[min(rows, columns)]``, falling; all zero for a matrix of zeros."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
    total = squares.sum()
    return squares / total if total > 0 else squares


def effective_rank(shares: Tensor) -> float:
    """The exponential of the entropy of shares of energy; 0 for a matrix of zeros."""
    present = shares[shares > 0]
    return float((-(present * present.log()).sum()).exp()) if len(present) else 0.0


def energy_curve(shares: Tensor, at: Sequence[float] = SHARES) -> tuple[tuple[float, float], ...]:
    """Share of energy in the largest directions, (share of rank, share of energy); ranks are rounded up."""
    kept = shares.cumsum(0)
    return tuple((share, float(kept[math.ceil(share * len(shares)) - 1])) for share in at)


def _spread(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()
