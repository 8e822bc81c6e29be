"""Muon for the matrices of the layers: a step in the direction of the gradient with all singular values near one.

Momentum gathers the gradients, M ← μM + G, and the direction is that of Nesterov, G + μM. If it is U·S·Vᵀ, the step is
close to U·Vᵀ: directions that the gradient hardly shows move as far as those that rule it. Singular vectors are not
computed; five steps of a Newton-Schulz iteration on X = M/‖M‖,

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X,    (a, b, c) = (3.4445, -4.7750, 2.0315),

send every singular value but the tiniest to between 0.7 and 1.2. The coefficients trade exactness for the slope at
zero, a per step. The step is scaled by √max(1, rows/columns), so that outputs move alike whatever the shape.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon. Weight decay apart from the gradient: Loshchilov and Hutter,
arXiv 1711.05101.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices with the singular vectors of ``matrices`` and singular values near one.

    Args:
        matrices: ``[..., rows, columns]``; on a GPU the products are in BF16, elsewhere in its own dtype.
        steps: of the iteration.

    Returns:
        The same shape and dtype; zeros where a matrix is zero.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.mT  # the Gram matrix of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over matrices; matrices of one shape are orthogonalized together.

    Args:
        matrices: parameters, each 2-D.
        lr: length of a step, about the largest change of an output per unit of input.
        momentum: μ.
        weight_decay: share of a matrix that a step of rate one would take away.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the gradients are there
        """One step along the gradients; parameters without one stay."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._step(matrices, group)

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
            gathered = state["momentum"].mul_(group["momentum"]).add_(matrix.grad)
            directions.append(matrix.grad.add(gathered, alpha=group["momentum"]))
        rows, columns = matrices[0].shape
        length = group["lr"] * max(1.0, rows / columns) ** 0.5
        for matrix, direction in zip(matrices, orthogonalized(torch.stack(directions)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-length)
