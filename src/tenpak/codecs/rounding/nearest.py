"""``nearest``: every weight to the nearest level of its group, ``q = argmin |w - level(q)|``.

The levels are fitted to the weights as they are. It needs no calibration and little memory: a tile of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Statistics
from tenpak.codecs.grouping import row_tiles, segments
from tenpak.codecs.rounding.base import Grids, Rounded, Rounding

__all__ = ["Nearest"]


@dataclass(frozen=True)
class Nearest(Rounding):
    """Rounding to nearest."""

    name: ClassVar[str] = "nearest"

    def round(self, weight: Tensor, grids: Grids, statistics: Statistics | None) -> Iterator[Rounded]:
        """Round tile by tile; the statistics have done their part when the codec weighs its search with them."""
        rows, columns = weight.shape
        for tile in row_tiles(rows, columns):
            block = weight[tile].float().contiguous()
            codes = torch.empty(block.shape, dtype=torch.uint8, device=weight.device)
            parameters: dict[str, list[Tensor]] = {}
            for segment in segments(columns, grids.group):
                groups = segment.view(block)
                levels = grids.fit(groups, segment)
                segment.view(codes).copy_(levels.nearest(groups))
                for field, values in levels.parameters.items():
                    parameters.setdefault(field, []).append(values)
            yield Rounded(tile, codes, {field: torch.cat(values, 1) for field, values in parameters.items()})
