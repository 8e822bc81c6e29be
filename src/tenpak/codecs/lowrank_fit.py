"""Factors for ``lowrank/1``: the decomposition, the rank that a weight asks for, and what encoded factors ask for.

Names and formulas are those of ``lowrank``. Everything here is computed by one thread.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.codecs.base import Statistics, require_hessian
from tenpak.codecs.grouping import column_importance, group_sum, row_importance, row_tiles
from tenpak.errors import CodecError, MissingStatisticsError

__all__ = [
    "Target",
    "by_energy",
    "by_error",
    "factors",
    "left_statistics",
    "norm_corrected",
    "refitted",
    "right_statistics",
    "target_of",
]

_SMALL = 512  # up to this many rows or columns the decomposition is exact
_OVERSAMPLING = 32
_POWER_ITERATIONS = 8
_SEED = 0
_SLACK = 1e-9  # of an energy: sums in FP64 do not reach the whole to the last digit
_RIDGE = 1e-6  # what of B, relative to its strongest direction, is too weak for A to be fitted to


@dataclass(frozen=True)
class Target:
    """What is factored, and in which metric.

    Attributes:
        weight: FP32 ``[out, in]``.
        metric: M, FP32 ``[in, in]``, or its diagonal ``[in]``; None for the identity.
        rows: g, FP32 ``[out]``; None for ones.
    """

    weight: Tensor
    metric: Tensor | None
    rows: Tensor | None

    def times(self, thin: Tensor) -> Tensor:
        """M times ``thin``, ``[in, n]``, in its dtype."""
        return _times(self.metric, thin)


def target_of(weight: Tensor, statistics: Statistics | None, kind: str, damping: float) -> Target:
    """The target for a kind; M has the mean diagonal one before it is damped.

    Raises:
        MissingStatisticsError: the kind needs statistics that are not there.
        CodecError: the statistics do not fit the weight or are not finite.
    """
    plain = Target(weight.detach().float().contiguous(), None, None)
    if kind == "plain":
        return plain
    if kind == "magnitude":
        diagonal = weight.detach().double().abs().mean(0).square()
    else:
        column_importance(statistics, weight.shape[1], weight.device)  # refuses what does not fit
        hessian, mean_abs = (None, None) if statistics is None else (statistics.metric, statistics.mean_abs)
        if hessian is not None:
            diagonal = hessian.diagonal().double()
        elif mean_abs is not None and kind == "activation":
            diagonal = mean_abs.double().square()
        else:
            raise MissingStatisticsError(
                f"factors of kind {kind} need the Hessian E[x xᵀ] of the weight's inputs, and there is none",
                hint="calibrate on text (--calibration TEXT), or use kind plain or magnitude",
            )
        if tuple(diagonal.shape) != (weight.shape[1],) or not bool(torch.isfinite(diagonal).all()):
            raise CodecError(
                f"E|x| is {tuple(diagonal.shape)} or not finite, the weight has {weight.shape[1]} input columns",
                hint="calibrate again",
            )
    mean = float(diagonal.mean())
    if not mean > 0:  # nothing is known of the inputs, or the weight is zero
        return plain
    if kind != "whitened":
        return dataclasses.replace(plain, metric=(diagonal / mean + damping).float().to(weight.device))
    assert statistics is not None
    assert hessian is not None
    metric = (hessian.double() / mean).float().to(weight.device)
    if not bool(torch.isfinite(torch.stack(torch.aminmax(metric))).all()):
        raise CodecError("the Hessian holds NaN or infinite values", hint="calibrate again")
    metric.diagonal().add_(damping)
    return Target(plain.weight, metric, row_importance(statistics, len(weight), weight.device))


def factors(target: Target, count: int, *, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[out, count]`` and B ``[count, in]``, FP32, of least loss at every rank up to ``count``; the energies.

    Energies are the squared singular values of √g·W·M^½ in units of its largest entry, FP64, descending; where the
    decomposition is exact, all of them.
    """
    weight = target.weight
    largest = weight.abs().max()
    if not float(largest) > 0:
        left, right = weight.new_zeros(len(weight), count), weight.new_zeros(count, weight.shape[1])
        return left, right, torch.zeros(min(weight.shape), dtype=torch.float64)
    few = 4 * (count + _OVERSAMPLING) < min(weight.shape) and min(weight.shape) > _SMALL
    randomised = few and not exact
    work = weight / largest if randomised else weight.double() / largest.double()
    root = None if target.rows is None else target.rows.to(work.dtype).sqrt()[:, None]
    work = work if root is None else work * root
    vectors, energies = (_randomised if randomised else _exact)(work, target, count)
    left, right = vectors if root is None else vectors / root, (vectors.T @ work) * largest
    # Columns of A and rows of B of equal mean square: what quantizes them, or is FP16, then loses least range.
    a, b = left.square().mean(0).sqrt(), right.square().mean(1).sqrt()
    balance = torch.where(a > 0, b / a, 0.0).sqrt()
    left, right = left * balance, right * torch.where(balance > 0, 1 / balance, 0.0)[:, None]
    return left.float(), right.float(), energies


def _exact(work: Tensor, target: Target, count: int) -> tuple[Tensor, Tensor]:
    """The first eigenvectors of ``work`` M ``work``ᵀ, ``[out, count]``, and all its eigenvalues but known zeros."""
    basis = None
    if work.shape[0] > work.shape[1]:
        basis, work = torch.linalg.qr(work)
    energies, vectors = torch.linalg.eigh(_symmetric(work @ target.times(work.T)))
    vectors = vectors.flip(1)[:, :count]
    return vectors if basis is None else basis @ vectors, energies.flip(0).clamp(0).cpu()


def _randomised(work: Tensor, target: Target, count: int) -> tuple[Tensor, Tensor]:
    """About the same, from a random range; only the first eigenvalues."""
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(work.shape[1], count + _OVERSAMPLING, generator=generator).to(work.device)
    basis = torch.linalg.qr(work @ target.times(start)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(work @ target.times(work.T @ basis)).Q
    inner = work.T @ basis
    energies, vectors = torch.linalg.eigh(_symmetric((inner.T @ target.times(inner)).double()))
    return basis @ vectors.flip(1)[:, :count].float(), energies.flip(0)[:count].clamp(0).cpu()


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _times(metric: Tensor | None, thin: Tensor) -> Tensor:
    if metric is None:
        return thin
    metric = metric.to(thin.device, thin.dtype)
    return metric @ thin if metric.ndim == 2 else metric[:, None] * thin


def by_energy(energies: Tensor, share: float) -> int:
    """The smallest rank that keeps this share of the energies."""
    kept = energies.cumsum(0)
    return 1 + int((kept < (share - _SLACK) * kept[-1]).sum())


def by_error(weight: Tensor, left: Tensor, right: Tensor, statistics: Statistics | None, limit: float) -> int:
    """The smallest rank whose relative error of the output is at most ``limit``; all, if none is.

    With tr(G·E·H·Eᵀ) of E = W - A·B as a sum over pairs of components, all ranks take one product.

    Raises:
        MissingStatisticsError: there is no Hessian.
    """
    needing = "the rank for an error of the output needs"
    hessian = require_hessian(needing, statistics, "give rank, energy or bpw").metric
    assert hessian is not None  # it was required
    column_importance(statistics, weight.shape[1], weight.device)  # refuses what does not fit
    rows = row_importance(statistics, len(weight), weight.device)
    a, b, w = left.double(), right.double(), weight.double()
    weighed = a if rows is None else a * rows.double()[:, None]
    moved = _times(hessian, b.T)
    shared = weighed.T @ a * (b @ moved)
    cross = ((w @ moved) * weighed).sum(0)
    of_row = (w @ hessian.to(w) * w).sum(1)
    whole = float((of_row if rows is None else of_row * rows).sum())
    # Component k adds its own term and its pairs with those before it, each twice.
    added = 2 * shared.tril(-1).sum(1) + shared.diagonal() - 2 * cross
    left_over = whole + added.cumsum(0)
    enough = (left_over <= limit**2 * whole).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(right)


def refitted(target: Target, left: Tensor, right: Tensor) -> Tensor:
    """A fitted to B as it is, FP32: A + (W - A·B) M Bᵀ (B M Bᵀ)⁺, which no other A loses less than.

    As a change of A, so that little is asked of the inverse.
    """
    moved = target.times(right.T).double()
    gram = _symmetric(right.double() @ moved)
    change = moved @ torch.linalg.pinv(gram, rtol=_RIDGE, hermitian=True)
    fitted = torch.empty_like(left)
    for tile in row_tiles(*target.weight.shape):
        start = left[tile].double()
        fitted[tile] = start + (target.weight[tile].double() - start @ right.double()) @ change
    return fitted


def norm_corrected(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A scaled so that A·B has the Frobenius norm of the weight; as it is where the product is zero."""
    a, b = left.double(), right.double()
    found = float(((a.T @ a) * (b @ b.T)).sum())
    wanted = sum(float(group_sum(group_sum(weight[tile].double().square()).T)) for tile in row_tiles(*weight.shape))
    return left * (wanted / found) ** 0.5 if found > 0 else left


def right_statistics(statistics: Statistics | None, left: Tensor) -> Statistics | None:
    """What encoding B is told: its inputs are the weight's, and its rows count by how A carries them to the output."""
    if statistics is None:
        return None
    rows = statistics.row_weight
    power = left.double().square()
    return dataclasses.replace(
        statistics,
        hessian=statistics.metric,
        output_curvature=(power if rows is None else power * rows.to(power)[:, None]).sum(0).float(),
        cross=None,
        shift=None,
        token_frequency=None,
        input_curvature=None,
    )


def left_statistics(statistics: Statistics | None, right: Tensor) -> Statistics:
    """What encoding A is told: its inputs are B x."""
    metric = None if statistics is None else statistics.metric
    hessian = right.double() @ _times(metric, right.T).double()
    count = None if statistics is None else statistics.count
    rows = None if statistics is None else statistics.row_weight
    return Statistics(count=count, hessian=_symmetric(hessian).float(), output_curvature=rows)
