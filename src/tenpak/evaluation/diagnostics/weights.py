"""What became of every compressed tensor, and what it was like: error, tails, spectrum.

Of a tensor W and its decoded counterpart Ŵ: the relative error ‖Ŵ - W‖/‖W‖; of W alone its kurtosis, E[(w - μ)⁴]/σ⁴ (3
for normal weights, larger for heavy tails), and the share of weights beyond six standard deviations, which cost a grid
its range; and the spectrum (``spectrum``), which says whether low rank would do.

Moments are those of the whole tensor; spectra are per matrix, the mean over at most eight evenly chosen experts where
several are stacked. One tensor is in memory at a time, as it is stored and decoded to FP32; float64 only in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.artifact.blob import matrix_shape
from tenpak.codecs import registry
from tenpak.evaluation.diagnostics.activations import OUTLIER
from tenpak.evaluation.diagnostics.pair import Pair, Progress
from tenpak.evaluation.diagnostics.spectrum import SHARES, effective_rank, energies, energy_curve, sample
from tenpak.recipes import format

__all__ = ["TensorFigures", "examine_weights", "figures_of"]

_PIECE = 1 << 22  # weights whose float64 copies are held at a time
_EXPERTS = 8


@dataclass(frozen=True)
class TensorFigures:
    """One compressed tensor. Figures that have no value, such as the kurtosis of a constant, are NaN.

    Attributes:
        name: in the checkpoint.
        shape: ``(out, in)`` of each of its matrices.
        matrices: how many it holds; more than one for stacked experts.
        codec: its recipe.
        bytes: of its payload.
        dense_bytes: of the tensor in the checkpoint's dtype.
        bits_per_weight: of its payload.
        relative_error: ‖Ŵ - W‖/‖W‖.
        kurtosis: of W, 3 for normal weights.
        outlier_share: share of W's weights beyond six standard deviations from their mean.
        effective_rank: of W; of a sample where ``sampled``.
        rank: the highest that could be, the smaller side of what was examined.
        energy: (share of rank, share of energy).
        sampled: whether the spectrum is that of some rows and columns.
    """

    name: str
    shape: tuple[int, int]
    matrices: int
    codec: str
    bytes: int
    dense_bytes: int
    bits_per_weight: float
    relative_error: float
    kurtosis: float
    outlier_share: float
    effective_rank: float
    rank: int
    energy: tuple[tuple[float, float], ...]
    sampled: bool

    @property
    def parameters(self) -> int:
        """How many weights it holds."""
        return self.matrices * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class _Moments:
    relative_error: float
    kurtosis: float
    outlier_share: float


def examine_weights(pair: Pair, progress: Progress | None = None) -> tuple[TensorFigures, ...]:
    """Figures of all compressed tensors, in the manifest's order.

    Raises:
        CheckpointError, CorruptArtifactError: a tensor cannot be read.
    """
    names = list(pair.artifact.manifest.weights)
    found = []
    for done, name in enumerate(names, start=1):
        found.append(figures_of(pair, name))
        if progress:
            progress("weights", done, len(names))
    return tuple(found)


def figures_of(pair: Pair, name: str) -> TensorFigures:
    """Figures of one compressed tensor. Raises as ``examine_weights`` does."""
    entry = pair.artifact.manifest.weights[name]
    weight = pair.checkpoint.read(name)
    moments = _moments(weight, pair.artifact.decode(name))
    matrices = weight if weight.ndim == 3 else weight[None]
    chosen = torch.linspace(0, len(matrices) - 1, min(len(matrices), _EXPERTS)).round().long().tolist()
    examined = [sample(matrices[index]) for index in chosen]
    shares = torch.stack([energies(matrix) for matrix in examined])
    curves = torch.tensor([energy_curve(share) for share in shares])[:, :, 1].mean(0).tolist()
    return TensorFigures(
        name=name,
        shape=matrix_shape(entry),
        matrices=len(matrices),
        codec=format(registry.from_json(entry.codec)),
        bytes=entry.bits // 8,
        dense_bytes=weight.numel() * weight.itemsize,
        bits_per_weight=entry.bits / weight.numel(),
        relative_error=moments.relative_error,
        kurtosis=moments.kurtosis,
        outlier_share=moments.outlier_share,
        effective_rank=sum(effective_rank(share) for share in shares) / len(shares),
        rank=shares.shape[1],
        energy=tuple(zip(SHARES, curves, strict=True)),
        sampled=len(examined) < len(matrices) or examined[0].shape != matrices[0].shape,
    )


def _moments(weight: Tensor, decoded: Tensor) -> _Moments:
    total, energy, error = 0.0, 0.0, 0.0
    for w, w_hat in _pieces(weight, decoded):
        total += float(w.sum())
        energy += float(w.square().sum())
        error += float((w_hat - w).square().sum())
    mean = total / weight.numel()
    second, fourth = 0.0, 0.0
    for (w,) in _pieces(weight):
        squares = (w - mean).square()
        second += float(squares.sum())
        fourth += float(squares.square().sum())
    variance = second / weight.numel()
    beyond = sum(int(((w - mean).abs() > OUTLIER * math.sqrt(variance)).sum()) for (w,) in _pieces(weight))
    constant = variance <= torch.finfo(torch.float64).eps * mean**2
    return _Moments(
        relative_error=math.sqrt(error / energy) if energy > 0 else (math.inf if error > 0 else 0.0),
        kurtosis=math.nan if constant else fourth / weight.numel() / variance**2,
        outlier_share=0.0 if constant else beyond / weight.numel(),
    )


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal pieces of tensors of one shape, in float64."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for begin in range(0, flat[0].numel(), _PIECE):
        yield tuple(part[begin : begin + _PIECE].double() for part in flat)
