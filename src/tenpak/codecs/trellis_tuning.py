"""The scales of ``trellis/1`` as parameters, which the fine parts b and d of the stream then hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tenpak.codecs.base import Payload, Tunable
from tenpak.codecs.trellis_stream import Coded, write

__all__ = ["TunableTrellis"]

# Places beyond a level's bits: finer scales change the loss by less than a hundredth, and each place costs a bit.
_PLACES = 3
_MOST_CHANGE = 0.5  # of a scale


class TunableTrellis(Tunable):
    """A weight of ``trellis/1``: levels stay, relative changes of row and column scales are parameters.

    Args:
        payload: of the codec.
        coded: what its stream says.
    """

    levels: Tensor
    row_scale: Tensor
    column_scale: Tensor

    def __init__(self, payload: Payload, coded: Coded) -> None:
        super().__init__()
        empty = torch.zeros(0, dtype=torch.int32)
        bits = 8 * len(payload.tensors["stream"]) / coded.levels.numel()
        tuned_before = len(coded.row_delta) > 0
        places = coded.places if tuned_before else min(max(math.ceil(bits) + _PLACES, 4), 12)
        self._payload = payload
        self._coded = dataclasses.replace(coded, row_delta=empty, column_delta=empty, places=places)
        self.register_buffer("levels", coded.levels.float())
        self.register_buffer("row_scale", self._coded.row_scale)
        self.register_buffer("column_scale", self._coded.column_scale)
        self.row = nn.Parameter(coded.row_scale / self.row_scale - 1)
        self.column = nn.Parameter(coded.column_scale / self.column_scale - 1)

    def knobs(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """Relative changes of the scales of rows and of columns."""
        return [(self.row, self._rounded), (self.column, self._rounded)]

    def _rounded(self, value: Tensor) -> Tensor:
        """To binary places of the fine part; no scale changes by more than half."""
        unit = 2**self._coded.places
        return value.clamp(-_MOST_CHANGE, _MOST_CHANGE).mul(unit).round_().div_(unit)

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T``; the gradients of scales are sums over tokens, so no gradient of the weight's size is made."""
        product = nn.functional.linear(x * (self.column_scale * (1 + self.column)), self.levels)
        return product * (self.row_scale * (1 + self.row))

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` of the weight, FP32 ``[*indices.shape, in]``."""
        scale = (self.row_scale * (1 + self.row))[indices].unsqueeze(-1)
        return self.levels[indices] * scale * (self.column_scale * (1 + self.column))

    def matrix(self) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        return self.rows(torch.arange(len(self.levels)))

    def payload(self) -> Payload:
        """The same levels with the fine parts as they are now."""
        row, column = (self._integers(value.detach()) for value in (self.row, self.column))
        coded = self._coded
        if bool(row.any() or column.any()):
            coded = dataclasses.replace(coded, row_delta=row, column_delta=column)
        return dataclasses.replace(self._payload, tensors={"stream": write(coded)})

    def _integers(self, value: Tensor) -> Tensor:
        return self._rounded(value).mul(2**self._coded.places).round_().to(torch.int32)
