"""FP16 fields of a payload (scales, offsets, levels, codebooks) as parameters, while codes stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tenpak.codecs.base import Payload, Tunable

__all__ = ["TunableFields", "over_columns"]

_LARGEST = 65504.0  # of FP16


class TunableFields(Tunable):
    """A weight that follows from some FP16 fields.

    Args:
        payload: of the codec.
        units: of each field that is tuned, what a change of one means, at least 0; broadcast to the field's shape.
            Where it is 0 the field stays.
        weight: the weight, FP32 ``[out, in]``, from these fields in FP32; differentiable.
    """

    def __init__(
        self, payload: Payload, units: Mapping[str, Tensor], weight: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> None:
        super().__init__()
        self._payload, self._weight = payload, weight
        self._start = {name: payload.tensors[name].float() for name in units}
        self._units = {name: unit.float().expand(self._start[name].shape) for name, unit in units.items()}
        self.changes = nn.ParameterDict({name: torch.zeros_like(start) for name, start in self._start.items()})

    def knobs(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """A change of each field, in its units."""
        return [(self.changes[name], partial(self._rounded, name)) for name in self._start]

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T``, with the weight made for it."""
        return nn.functional.linear(x, self.matrix())

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` of the weight, FP32 ``[*indices.shape, in]``."""
        return self.matrix()[indices]

    def matrix(self) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        return self._weight({name: self._value(name, self.changes[name]) for name in self._start})

    def payload(self) -> Payload:
        """The same codes with the fields as they are now."""
        fields = {name: self._value(name, self.changes[name].detach()).half() for name in self._start}
        return dataclasses.replace(self._payload, tensors={**self._payload.tensors, **fields})

    def _value(self, name: str, change: Tensor) -> Tensor:
        return torch.addcmul(self._start[name], change, self._units[name])

    def _rounded(self, name: str, change: Tensor) -> Tensor:
        start, unit = self._start[name], self._units[name]
        stored = self._value(name, change).clamp(-_LARGEST, _LARGEST).half().float()
        return torch.where(unit > 0, (stored - start) / unit, 0.0)


def over_columns(groups: Tensor, group: int | None, columns: int) -> Tensor:
    """What each group of columns has, for each of its columns: ``[rows, groups]`` to ``[rows, in]``."""
    return groups.expand(-1, columns) if group is None else groups.repeat_interleave(group, 1)[:, :columns]
