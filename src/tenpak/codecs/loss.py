"""What an error of a weight costs: the measure by which searches choose among encodings."""

from __future__ import annotations

import math

from torch import Tensor

from tenpak.codecs.grouping import group_sum, row_tiles

__all__ = ["output_loss"]


def output_loss(weight: Tensor, decoded: Tensor, metric: Tensor | None, rows: Tensor | None) -> float:
    """Σᵢ gᵢ (E H Eᵀ)ᵢᵢ of E = weight - decoded, both ``[out, in]``; infinite where it is not a number.

    Args:
        weight: in any floating-point dtype.
        decoded: FP32.
        metric: H, FP32 ``[in, in]``, or its diagonal ``[in]``; None for the identity.
        rows: g, FP32 ``[out]``; None for ones.
    """
    total = 0.0
    for tile in row_tiles(*weight.shape):
        error = weight[tile].float() - decoded[tile]
        moved = error if metric is None else error @ metric if metric.ndim == 2 else error * metric
        of_row = group_sum(moved.double().mul_(error))[:, 0]
        total += float(group_sum(of_row if rows is None else of_row * rows[tile]))
    return total if math.isfinite(total) else math.inf
