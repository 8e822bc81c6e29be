"""What a rounding needs of a codec (its levels), and what a codec gets back (codes and parameters, tile by tile)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from tenpak.codecs.base import Statistics
from tenpak.codecs.grouping import Segment

__all__ = ["Column", "Grids", "Levels", "Rounded", "Rounding"]

# Rounds one column: values FP32 [rows] → their codes (any dtype that holds them) and the levels these stand for, FP32.
Column = Callable[[Tensor], tuple[Tensor, Tensor]]


class Levels(Protocol):
    """The levels of a run of groups in some rows: what a codec's parameters for them stand for."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Payload field → its values, ``[rows, groups]``."""

    def nearest(self, groups: Tensor) -> Tensor:
        """Codes of the nearest levels of ``groups``, FP32 ``[rows, groups, size]``."""

    def column(self, group: int) -> Column:
        """How a column of the ``group``-th of these groups is rounded; its values are exactly what decoding gives."""


class Grids(Protocol):
    """A codec's way to levels for weights."""

    @property
    def group(self) -> int | None:
        """Columns per group, or None for one group per row."""

    def fit(self, groups: Tensor, segment: Segment) -> Levels:
        """Levels for ``groups``, FP32 ``[rows, count, size]``, which are the columns and groups of ``segment``."""


@dataclass(frozen=True)
class Rounded:
    """Some rows of a weight, rounded.

    Attributes:
        rows: which rows.
        codes: uint8 ``[rows, in]``.
        parameters: payload field → its values, ``[rows, groups of a row]``.
    """

    rows: slice
    codes: Tensor
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rounding(ABC):
    """Base of all roundings; subclasses are frozen dataclasses with JSON-compatible fields."""

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False

    @abstractmethod
    def round(self, weight: Tensor, grids: Grids, statistics: Statistics | None) -> Iterator[Rounded]:
        """Round ``weight``, finite ``[out, in]``, in tiles of rows, in order.

        Raises:
            CalibrationError: the statistics lack what this rounding needs.
            CodecError: the statistics do not fit the weight.
        """

    def to_json(self) -> dict[str, Any]:
        """The JSON configuration: ``{"name": ..., **fields}``."""
        return {"name": self.name, **dataclasses.asdict(self)}
