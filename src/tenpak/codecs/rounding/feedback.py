"""Feedback matrices: how the error of a rounded column moves the target of the columns that are rounded after it.

With E = W - Ŵ and the damped Hessian H' = H + λI = U·Uᵀ, U upper triangular, the loss is tr(E H' Eᵀ) = ‖E U‖². Column k
of E·U holds errors up to k only, so given those before it, it is least where column k of Ŵ is nearest to ::

    uₖ = wₖ + Σ_{j<k} Eⱼ·F[k, j]        F[k, j] = U[j, k] / U[k, k]

This is Babai's nearest plane (Babai 1986) and the same as GPTQ (Frantar et al. 2022), whose update of the remaining
weights uses the Cholesky factor of H'⁻¹, which is U⁻ᵀ·U⁻¹ (equivalence: Chen et al. 2025, "The Geometry of LLM
Quantization"). Taking U itself saves both inversions: a third of the work, and better conditioned. U is the Cholesky
factor of H' with rows and columns reversed, reversed back.

The coordinate descent's matrix is F[k, j] = H'[k, j] / H'[k, k], j ≠ k: uₖ is then where the loss is least given all
the other columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.codecs.base import Statistics, require_hessian
from tenpak.errors import CodecError, SingularHessianError

__all__ = ["Feedback", "feedback"]

_MOST_DAMPING = 1.0  # a Hessian that this does not make definite is not one


@dataclass(frozen=True)
class Feedback:
    """What all rows of a weight share.

    Attributes:
        order: the columns in the order in which they are rounded, int64 ``[in]``; None for as they are.
        earlier: F of the columns before, FP32 ``[in, in]``, unit lower triangular, in that order.
        others: F of all other columns, FP32 ``[in, in]`` with a zero diagonal; None where no sweep is made.
        pivots: U[k, k]², what a squared error of u costs in column k, FP32 ``[in]`` in the Hessian's units.
        damping: λ relative to the mean diagonal, as it was needed.
    """

    order: Tensor | None
    earlier: Tensor
    others: Tensor | None
    pivots: Tensor
    damping: float

    def to(self, device: torch.device) -> Feedback:
        """The same on another device."""

        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return Feedback(
            move(self.order), self.earlier.to(device), move(self.others), self.pivots.to(device), self.damping
        )


def feedback(
    statistics: Statistics | None, columns: int, damping: float, *, by_activation: bool, sweeps: bool
) -> Feedback:
    """The feedback matrices of a weight with this many input columns, on the Hessian's device.

    Columns whose input was never active (zero diagonal) neither give nor take feedback.

    Raises:
        MissingStatisticsError: there is no Hessian.
        CodecError: it is not ``[in, in]``, not finite, or has a negative diagonal.
        SingularHessianError: it is indefinite.
    """
    hessian, mean = _scaled(statistics, columns)
    order = None
    if by_activation:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    earlier, pivots, damping = _earlier(hessian, damping)
    others = None
    if sweeps:
        others = hessian
        diagonal = others.diagonal() + damping
        others.div_(diagonal.unsqueeze(1)).fill_diagonal_(0)
    return Feedback(order, earlier, others, pivots * mean, damping)


def _scaled(statistics: Statistics | None, columns: int) -> tuple[Tensor, float]:
    """A copy of the Hessian with mean diagonal one (the identity for a zero one), dead columns cleared; that mean."""
    hessian = require_hessian("rounding gptq needs", statistics, "choose a recipe without gptq-").metric
    assert hessian is not None  # it was required
    if tuple(hessian.shape) != (columns, columns):
        raise CodecError(f"the Hessian is {tuple(hessian.shape)}, the weight has {columns} input columns")
    diagonal = hessian.diagonal().double()
    if not bool(torch.isfinite(torch.stack(torch.aminmax(hessian))).all()) or bool((diagonal < 0).any()):
        raise CodecError("the Hessian holds NaN or infinite values or a negative diagonal", hint="calibrate again")
    mean = float(diagonal.mean())
    if not mean > 0:
        return torch.eye(columns, device=hessian.device), 1.0
    # An FP32 mean may be denormal, and its reciprocal infinite; the quotient is safe.
    scaled = (hessian.double() / mean).float() if mean < 1e-30 or mean > 1e30 else (hessian / mean).float()
    dead = diagonal == 0
    if bool(dead.any()):
        scaled[dead], scaled[:, dead] = 0, 0
    return scaled, mean


def _earlier(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """F of the columns before, pivots, and the damping with which Cholesky succeeded: tenfold at each failure."""
    reverse = hessian.flip(0, 1)
    start = damping
    while True:
        lower = _cholesky(reverse, damping, torch.float32)
        if lower is None:
            lower = _cholesky(reverse, damping, torch.float64)
        if lower is not None:
            break
        if damping >= _MOST_DAMPING:
            raise SingularHessianError(
                f"the Hessian [{len(hessian)}, {len(hessian)}] is not positive definite even when damped by {damping:g}"
                f" of its mean diagonal (asked for: {start:g})",
                hint="its statistics are damaged: calibrate again, or use a recipe without gptq- for this tensor",
            )
        damping = min(10 * damping, _MOST_DAMPING)
    del reverse
    earlier = lower.mT.flip(0, 1)
    diagonal = earlier.diagonal().clone()
    return earlier.div_(diagonal.unsqueeze(1)).float(), diagonal.square().float(), damping


def _cholesky(hessian: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """The lower Cholesky factor, or None where the damped Hessian is not positive definite in this precision.

    FP32 is enough where it succeeds: its error is that of a change of the Hessian far below the damping, and losses
    were the same to four digits as with FP64, at half the memory and time.
    """
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else lower
