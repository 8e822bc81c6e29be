"""Seeing every product with a weight, whoever makes it.

A hook on nn.Linear would miss experts that are slices of a stacked parameter, GPT-2's Conv1D, and layers that multiply
with ``self.weight`` themselves. So this looks at torch's functions instead: while an ``Observer`` is active in a
thread, each call of ``linear``, ``matmul``, ``addmm``, ``bmm`` and their kin is looked at, and an operand that lies in
the memory of a known weight makes it a product with that weight. What the other operand is along the contracted
dimension are the weight's inputs, whatever its orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Observer", "Product"]

_LINEAR = frozenset({torch.nn.functional.linear})
_PRODUCTS = frozenset(
    {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__}
)
_SUMS = frozenset({torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm})


@dataclass(frozen=True)
class Product:
    """A weight's product with its inputs.

    Attributes:
        parameter: path of the weight.
        index: which matrix of a stacked weight.
        input: ``[..., in]``.
        result: what torch's function returned; its gradient is that of the product (a bias may have been added).
        part: the product ``[..., out]`` in a tensor of the shape of ``result``.
    """

    parameter: str
    index: int
    input: Tensor
    result: Tensor
    part: Callable[[Tensor], Tensor]


class Observer(TorchFunctionMode):
    """Calls ``see`` with every product of a known weight in this thread.

    Args:
        weights: path → value; matrices, or stacks of them ``[n, rows, columns]``.
        see: called after each product, in the order in which they are made.
    """

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[Product], None]) -> None:
        super().__init__()
        self._weights = {value.untyped_storage().data_ptr(): (path, value) for path, value in weights.items()}
        self._see = see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _LINEAR:
            self._look(args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"], output, left=False)
        elif func in _PRODUCTS or func in _SUMS:
            first, second = args[-2:] if len(args) >= 2 else (None, None)
            if func is Tensor.__rmatmul__:
                first, second = second, first
            self._look(first, second, output, left=False)
            self._look(second, first, output, left=True)
        return output

    def _look(self, other: Any, operand: Any, output: Tensor, *, left: bool) -> None:
        """Report the product if ``operand`` is a known weight; ``left``: it stands to the left of ``other``."""
        if not isinstance(operand, Tensor) or not isinstance(other, Tensor) or operand.device.type == "meta":
            return
        found = self._weights.get(operand.untyped_storage().data_ptr())
        if found is None:
            return
        path, value = found
        if left:
            other = other.mT
        part: Callable[[Tensor], Tensor] = _transposed if left else _itself
        if value.ndim == 2:
            self._see(Product(path, 0, other, output, part))
        elif operand.ndim == 2:
            offset = operand.storage_offset() - value.storage_offset()
            self._see(Product(path, offset // value.stride(0), other, output, part))
        elif operand.shape[0] == value.shape[0] == other.shape[0]:
            for index in range(len(value)):
                self._see(Product(path, index, other[index], output, _Slice(index, part)))


@dataclass(frozen=True)
class _Slice:
    index: int
    part: Callable[[Tensor], Tensor]

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.part(tensor)[self.index]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT
