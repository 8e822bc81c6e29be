"""The target that makes up for the error which the inputs bring along.

Where blocks before a weight are compressed, it is multiplied with x̂ instead of the original model's x. The matrix
whose product with x̂ is nearest to the original output W·x is W·E[x x̂ᵀ]·Ĥ⁻¹, Ĥ = E[x̂ x̂ᵀ]; as a change of W, damped ::

    W + W·(E[x x̂ᵀ] - Ĥ)·(Ĥ + λI)⁻¹        λ = damping · mean diagonal of Ĥ

it leaves W alone where x̂ = x. More generally, where d is to be added to the output W·x̂, the change is
E[d x̂ᵀ]·(Ĥ + λI)⁻¹; above, d = W·(x - x̂). A weight whose output is added to the residual stream can also make up for the
error of what it is added to. Any codec then encodes this target with the statistics of x̂. (Li et al. 2025, GPTAQ,
arXiv 2504.02692, section 3, feeds the same term back column by column; Zhang et al. 2025, Qronos, arXiv 2505.11695,
solves for it first, as here.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenpak.codecs.base import Statistics
from tenpak.errors import SingularHessianError

__all__ = ["CORRECTION_DAMPING", "corrected"]

CORRECTION_DAMPING = 0.01
_MOST_DAMPING = 1.0


def corrected(weight: Tensor, statistics: Statistics, damping: float = CORRECTION_DAMPING) -> Tensor:
    """The target for ``weight`` ``[out, in]``, FP32; the weight itself where there is neither ``cross`` nor ``shift``.

    Raises:
        SingularHessianError: the Hessian is indefinite however much it is damped, or holds NaN.
    """
    hessian, cross, shift = statistics.hessian, statistics.cross, statistics.shift
    if hessian is None or (cross is None and shift is None):
        return weight
    scale = float(hessian.diagonal().double().mean())
    if not scale > 0:
        return weight
    weight = weight.float()
    change = weight @ (cross - hessian) if shift is None and cross is not None else shift
    assert change is not None  # one of the two is there
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * scale)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
        if damping >= _MOST_DAMPING:
            raise SingularHessianError(
                f"the Hessian [{len(hessian)}, {len(hessian)}] is not positive definite even when damped",
                hint="its statistics are damaged: calibrate again",
            )
        damping = min(10 * damping, _MOST_DAMPING)
    return weight + torch.cholesky_solve(change.T, lower).T
