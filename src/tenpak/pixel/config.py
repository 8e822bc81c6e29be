"""How PIXEL compresses: sizes of patterns and dictionary, what follows them, and how much memory all of it may hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from tenpak.codecs.base import Codec
from tenpak.codecs.nesting import require_alone
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.validation import require_bool, require_integer
from tenpak.errors import RecipeError
from tenpak.recipes import parse

__all__ = ["CACHE_BYTES", "DICTIONARY_BYTES", "PIXELConfig"]

DICTIONARY_BYTES = 100_000_000
CACHE_BYTES = 200_000_000

_OWNER = "PIXELConfig"


@dataclass(frozen=True)
class PIXELConfig:
    """What ``PIXELCompressor`` does.

    Attributes:
        pattern_size: of the square blocks, 2 to 32.
        max_patterns: that the dictionary holds, those included that are made by code: 2 to 65,536, and no more than
            take 100 MB in memory.
        terms: patterns per block, 1 to 8.
        scales: recipe of the scales of blocks; it cannot use statistics.
        residual: recipe of what patterns leave, which needs no statistics, or None for patterns alone (which no
            language model survives).
        discover: look for patterns in the tensors; otherwise those made by code are all.
        min_weights: tensors of fewer weights stay as they are.
        cache_bytes: that synthesized weights may take, at most 200,000,000.
        seed: of the search for patterns.

    Raises:
        RecipeError: a field is of the wrong type or out of range, or a recipe cannot be understood or used.
    """

    pattern_size: int = 4
    max_patterns: int = 256
    terms: int = 1
    scales: str = "int8:row"
    residual: str | None = "int4:g32"
    discover: bool = True
    min_weights: int = 1024
    cache_bytes: int = CACHE_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer(_OWNER, "pattern_size", self.pattern_size, 2, 32)
        largest = min(1 << 16, DICTIONARY_BYTES // (4 * self.pattern_size**2))
        require_integer(_OWNER, "max_patterns", self.max_patterns, 2, largest)
        require_bool(_OWNER, "discover", self.discover)
        require_integer(_OWNER, "min_weights", self.min_weights, 1, 1 << 62)
        require_integer(_OWNER, "cache_bytes", self.cache_bytes, 0, CACHE_BYTES)
        Pattern(self.pattern_size, 0, 1, self.terms, self.scales_codec, seed=self.seed)  # checks them
        if self.rest is not None and self.rest.needs_statistics:
            raise RecipeError(
                f"{_OWNER}: residual {self.residual} needs statistics, which there are none of",
                hint="use GPTQStyleCompressor, or a recipe such as int4:g32",
            )

    @classmethod
    def for_small_model(cls, **changes: Any) -> Self:
        """For models of up to some ten million weights: small patterns, a small dictionary. ``changes`` are fields."""
        return cls(**changes)

    @classmethod
    def for_large_model(cls, **changes: Any) -> Self:
        """For larger models: blocks of 8 × 8, whose patterns cost 0.3 bits per weight. ``changes`` are fields."""
        return dataclasses.replace(cls(pattern_size=8, max_patterns=1024), **changes)

    @property
    def rest(self) -> Codec | None:
        """The codec of what patterns leave."""
        rest = None if self.residual is None else parse(self.residual)
        if rest is not None:
            require_alone(rest, f"{_OWNER}: residual")
        return rest

    @property
    def scales_codec(self) -> Codec:
        """The codec of scales."""
        scales = parse(self.scales)
        if scales is None:
            raise RecipeError(f"{_OWNER}: scales cannot be dense", hint="write fp16, or int8:row")
        return scales
