"""Products with weights that stay integers: where the compiled core does them, and in what dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from tenpak.kernels import core

__all__ = ["fits", "product"]


def fits(x: Tensor, levels: Tensor) -> bool:
    """Whether ``product`` takes these: both on the processor, ``x`` of at most 32 bits, and no gradient asked for."""
    single = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return single and x.is_cpu and levels.is_cpu and not (x.requires_grad and torch.is_grad_enabled())


def product(x: Tensor, levels: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """``x @ W.T`` for ``x`` of shape ``[..., in]``, computed in FP32, in the dtype of ``x``; see ``core.product``."""
    flat = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
    return core.product(flat, levels, row_scale, column_scale).view(*x.shape[:-1], len(levels)).to(x.dtype)
