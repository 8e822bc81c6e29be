"""Weights, and what calibration may know of them, for tests of several codecs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Statistics
from tenpak.errors import CodecError, MissingStatisticsError


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=random(seed)) * 0.02


def known(rows: int, columns: int) -> Statistics:
    """Inputs whose neighbours correlate and whose power differs, outputs of which some matter ten times as much."""
    index = torch.arange(columns)
    size = torch.sin(index * 1.7).exp()
    hessian = 0.9 ** (index[:, None] - index).abs() * size[:, None] * size
    return Statistics(hessian=hessian, output_curvature=torch.randn(rows, generator=random(3)).exp())


def loss(weight: Tensor, codec: Codec, statistics: Statistics) -> float:
    """Σ g·(E H Eᵀ)."""
    assert statistics.hessian is not None
    assert statistics.output_curvature is not None
    error = (weight - codec.decode(codec.encode(weight, statistics))).double()
    return float(statistics.output_curvature.double() @ (error @ statistics.hessian.double() * error).sum(1))


def refuses_unfit_statistics(codec: Codec, weight: Tensor) -> None:
    """Of an importance that needs the Hessian: says what else there is without one, and takes no broken one."""
    columns = weight.shape[1]
    for missing in (None, Statistics(mean_abs=torch.ones(columns))):
        with pytest.raises(MissingStatisticsError) as caught:
            codec.encode(weight, missing)
        assert "magnitude" in str(caught.value.hint)
    for hessian in (torch.eye(columns - 1), -torch.eye(columns), torch.full((columns, columns), math.nan)):
        with pytest.raises(CodecError):
            codec.encode(weight, Statistics(hessian=hessian))
