"""Running sums over what weights are multiplied with, and the statistics that they make.

A *batch* of windows is summed by one thread in FP32; batches are added in FP64, in their order. So the sums do not
depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenpak.calibration.observe import Product
from tenpak.codecs.base import Statistics

__all__ = ["BatchSums", "InputSums", "Key", "Sums"]

Key = tuple[str, int]
"""A weight: the path of its parameter, and which matrix of a stack it is."""


@dataclass
class InputSums:
    """Sums over the inputs of one or more weights: count, Σ x xᵀ, Σ x, Σ |x|.

    Where they are wanted, also ``cross``, Σ x x̂ᵀ over the original model's inputs x and these, and ``shift``, Σ d x̂ᵀ
    with d what should be added to the (only) weight's output.
    """

    count: int
    outer: Tensor
    total: Tensor
    magnitude: Tensor
    cross: Tensor | None = None
    shift: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, original: Tensor | None = None) -> InputSums:
        """Of inputs ``[tokens, in]``; ``original`` are the original model's inputs for the same tokens."""
        return cls(
            len(x),
            x.T @ x,
            x.sum(0, dtype=torch.float64),
            x.abs().sum(0, dtype=torch.float64),
            None if original is None else original.T @ x,
        )

    def add(self, other: InputSums) -> None:
        """Add the sums of more inputs; the first addition turns these into FP64."""
        self.count += other.count
        self.outer = self.outer.double().add_(other.outer)
        self.total += other.total
        self.magnitude += other.magnitude
        if self.cross is not None:  # of some inputs only it would be worse than none
            self.cross = None if other.cross is None else self.cross.double().add_(other.cross)
        if self.shift is not None and other.shift is not None:
            self.shift = self.shift.double().add_(other.shift)

    def statistics(self, curvature: Tensor | None = None) -> Statistics:
        """Means over the inputs, FP32."""
        n = max(self.count, 1)
        return Statistics(
            count=self.count,
            hessian=(self.outer / n).float(),
            mean=(self.total / n).float(),
            mean_abs=(self.magnitude / n).float(),
            cross=None if self.cross is None else (self.cross / n).float(),
            shift=None if self.shift is None else (self.shift / n).float(),
            output_curvature=curvature,
        )


@dataclass
class Sums:
    """Sums of many weights; weights that received the very same tensor share theirs.

    Attributes:
        inputs: sums, one for each distinct input.
        group_of: weight → which of them.
        squares: weight → Σ (∂ℓ/∂y)², FP64 ``[out]``.
    """

    inputs: list[InputSums] = field(default_factory=list)
    group_of: dict[Key, int] = field(default_factory=dict)
    squares: dict[Key, Tensor] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add another batch's sums. A weight shares sums as it did in the first batch that it was seen in."""
        added: set[int] = set()
        for key, theirs in other.group_of.items():
            if key not in self.group_of:
                mine = next(
                    (self.group_of[k] for k, g in other.group_of.items() if g == theirs and k in self.group_of), None
                )
                if mine is None:
                    mine = len(self.inputs)
                    self.inputs.append(other.inputs[theirs])
                    added.add(theirs)
                self.group_of[key] = mine
            if theirs not in added:
                self.inputs[self.group_of[key]].add(other.inputs[theirs])
                added.add(theirs)
        for key, squares in other.squares.items():
            self.squares[key] = self.squares[key] + squares if key in self.squares else squares

    def groups(self) -> Iterator[tuple[InputSums, list[Key]]]:
        """Each distinct input with its weights, in the order in which they were first used."""
        for number, sums in enumerate(self.inputs):
            yield sums, [key for key, group in self.group_of.items() if group == number]

    def statistics(self) -> Mapping[Key, Statistics]:
        """Statistics of every weight; tensors are shared where inputs are."""
        made = [sums.statistics() for sums in self.inputs]
        found = {}
        for key, group in self.group_of.items():
            statistics = made[group]
            if key in self.squares:
                curvature = (self.squares[key] / max(statistics.count or 0, 1)).float()
                statistics = Statistics(**{**vars(statistics), "output_curvature": curvature})
            found[key] = statistics
        return found


class BatchSums:
    """Sums over the products of one batch, seen by one thread.

    Args:
        originals: weight → the original model's inputs ``[tokens, in]``, where Σ x x̂ᵀ is wanted.
    """

    def __init__(self, originals: Mapping[Key, Tensor] | None = None) -> None:
        self.sums = Sums()
        self._originals = originals
        # The last input and its group: holding it keeps its memory from being reused.
        self._last: tuple[Tensor, int] | None = None

    def see(self, product: Product) -> None:
        """Add a product's inputs, and have its output's gradient added when there is one."""
        key = product.parameter, product.index
        x = product.input.detach()
        if product.result.requires_grad:
            part = product.part  # not the product: a hook that holds its own tensor would keep the whole graph for good
            product.result.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._square(key, part(gradient))
            )
        if self._last is not None and _same(self._last[0], x) and key not in self.sums.group_of:
            self.sums.group_of[key] = self._last[1]
            return
        flat = x.reshape(-1, x.shape[-1]).float()
        original = None if self._originals is None else self._originals.get(key)
        sums = InputSums.of(flat, original if original is not None and len(original) == len(flat) else None)
        if key in self.sums.group_of:
            self.sums.inputs[self.sums.group_of[key]].add(sums)
            return
        self.sums.group_of[key] = len(self.sums.inputs)
        self.sums.inputs.append(sums)
        self._last = x, self.sums.group_of[key]

    def square(self, key: Key, squares: Tensor) -> None:
        """Add Σ (∂ℓ/∂y)², FP64 ``[out]``."""
        self.sums.squares[key] = self.sums.squares[key] + squares if key in self.sums.squares else squares

    def _square(self, key: Key, gradient: Tensor) -> None:
        self.square(key, gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0, dtype=torch.float64))


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors show the same memory in the same way."""
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape[-1] == second.shape[-1]
        and first.numel() == second.numel()
        and first.is_contiguous()
        and second.is_contiguous()
        and first.dtype == second.dtype
    )
