"""Collecting what a model's weights are multiplied with: one forward pass over text windows, with hooks.

For every linear layer that is asked for: E[x xᵀ] over all positions of all windows (``hessian``), E[x], E|x| and the
count. Layers that receive the very same tensor (Q, K and V; gate and up) share one set. Products are FP32 per batch,
sums over batches FP64, in a fixed order.

This needs the model and all Hessians in memory: 8 × in² bytes for each distinct input. It is the plain form that a
block-by-block collector will have to equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenpak.codecs.base import Statistics
from tenpak.errors import CalibrationError

__all__ = ["collect"]

# (tokens seen so far, tokens in all)
Progress = Callable[[int, int], None]


@dataclass
class _Sums:
    """Running sums over one input; several layers may share it."""

    count: int
    outer: Tensor
    total: Tensor
    magnitude: Tensor

    def add(self, x: Tensor) -> None:
        """Add the positions of ``x``, FP32 ``[tokens, in]``."""
        self.count += len(x)
        self.outer += (x.T @ x).double()
        self.total += x.sum(0, dtype=torch.float64)
        self.magnitude += x.abs().sum(0, dtype=torch.float64)

    def statistics(self) -> Statistics:
        n = max(self.count, 1)
        return Statistics(
            count=self.count,
            hessian=(self.outer / n).float(),
            mean=(self.total / n).float(),
            mean_abs=(self.magnitude / n).float(),
        )


def collect(
    model: Any, tokens: Tensor, modules: Mapping[str, nn.Module], *, window: int, progress: Progress | None = None
) -> dict[str, Statistics]:
    """Statistics of the inputs of ``modules`` while ``model`` reads ``tokens`` in disjoint windows.

    Args:
        model: a transformers causal language model, on any device.
        tokens: int64 ``[tokens]``; a last, shorter window is read too, unless it is the only one.
        modules: name → linear layer (or Conv1D) of the model.
        window: tokens per window.
        progress: called after each window.

    Returns:
        name → statistics, FP32 on the CPU; layers that share their input share the tensors.

    Raises:
        CalibrationError: no text, or an input that is not finite (names the layer).
    """
    if tokens.numel() < 2:
        raise CalibrationError("the calibration text has fewer than 2 tokens", hint="give a longer --calibration text")
    sums: dict[str, _Sums] = {}
    with _observed(modules, sums), torch.inference_mode():
        for start in range(0, tokens.numel(), window):
            batch = tokens[start : start + window].unsqueeze(0).to(model.device)
            model(input_ids=batch, use_cache=False)
            if progress:
                progress(min(start + window, tokens.numel()), tokens.numel())
    for name, found in sums.items():
        if not bool(torch.isfinite(found.outer).all()):
            raise CalibrationError(
                f"the input of {name} is not finite on this text", hint="the model overflows: calibrate in float32"
            )
    # By identity: what layers share stays shared.
    finished = {id(found): found.statistics() for found in sums.values()}
    return {name: finished[id(found)] for name, found in sums.items()}


@contextmanager
def _observed(modules: Mapping[str, nn.Module], sums: dict[str, _Sums]) -> Iterator[None]:
    """Let every module add its input to ``sums`` as long as the context lasts."""
    # The tensor that the last layer received, and whose sums it went to. Holding it keeps its identity from reuse.
    last: list[Any] = [None, None]

    def observe(name: str, x: Tensor) -> None:
        if x is last[0]:
            sums.setdefault(name, last[1])
            return
        flat = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        if name not in sums:
            n = flat.shape[1]
            sums[name] = _Sums(0, *(torch.zeros(s, dtype=torch.float64) for s in ((n, n), (n,), (n,))))
        sums[name].add(flat)
        last[:] = [x, sums[name]]

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: observe(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
