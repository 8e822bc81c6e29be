"""Low rank with patterns on what it leaves, and low rank with a rank that each layer's spectrum decides.

Trained weights have no low rank, and what low rank leaves is noise to patterns: both are here because users of PIXEL
know them, and lose to rounding at any size.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Payload, Statistics, require_matrix
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.validation import require_integer, require_number
from tenpak.errors import RecipeError
from tenpak.pixel.matrices import chosen, naming, tied
from tenpak.pixel.tensors import CompressedTensors, decoded, measured

__all__ = ["AdaptiveCompressor", "SVDHybridCompressor", "SVDHybridResult"]

_BYTE = Uniform(8, None, symmetric=True)
_TERMS = (1, 2, 4, 8)


@dataclass(frozen=True)
class SVDHybridResult:
    """A matrix as a product of thin factors and patterns.

    Attributes:
        compressed: the matrix, named ``weight``; it can be saved.
        svd_rank: rank of the product.
        num_patterns: how many patterns are used; 0 where low rank sufficed.
    """

    compressed: CompressedTensors
    svd_rank: int
    num_patterns: int

    @property
    def compression_ratio(self) -> float:
        """FP32 bytes of the matrix, divided by those of its file."""
        return self.compressed.compression_ratio

    @property
    def reconstruction_error(self) -> float:
        """‖W - Ŵ‖ / ‖W‖."""
        return self.compressed.reconstruction_error


class SVDHybridCompressor:
    """A truncated singular value decomposition by energy, then patterns on the remainder.

    Args:
        svd_energy_threshold: share of the squared singular values to keep, above 0 to 1.
        pattern_error_threshold: relative error ‖W - Ŵ‖ / ‖W‖ to reach, 0 to 1: with as few patterns per block (none, 1,
            2, 4, 8) as reach it, eight where nothing does.
        pattern_size: of the blocks, 2 to 32.
        seed: of the search for patterns.

    Raises:
        RecipeError: a value is out of range.
    """

    def __init__(
        self,
        svd_energy_threshold: float = 0.9,
        pattern_error_threshold: float = 0.1,
        *,
        pattern_size: int = 4,
        seed: int = 0,
    ) -> None:
        require_number("SVDHybridCompressor", "pattern_error_threshold", pattern_error_threshold, 0.0, 1.0)
        self.pattern_error_threshold = pattern_error_threshold
        self._low = LowRank(energy=svd_energy_threshold, kind="plain", factor=_BYTE)
        self._patterns = [Pattern(pattern_size, terms=terms, scales=_BYTE, seed=seed) for terms in _TERMS]

    def compress(self, weight: Tensor) -> SVDHybridResult:
        """Compress a finite matrix ``[out, in]``.

        Raises:
            CodecError: it is none.
        """
        require_matrix(weight)
        low = self._low.encode(weight)
        made, used = measured(weight, (low,)), 0
        if made.error > self.pattern_error_threshold:
            remainder = weight.detach().float() - decoded((low,))
            for codec in self._patterns:
                found = codec.encode(remainder)
                made = measured(weight, (low, found))
                used = len(torch.unique(codec.references(found)[0]))
                if made.error <= self.pattern_error_threshold:
                    break
        return SVDHybridResult(CompressedTensors({"weight": made}), _rank(low), used)

    @staticmethod
    def decompress(result: SVDHybridResult) -> Tensor:
        """The matrix, in its own dtype."""
        return result.compressed.decompress()["weight"]


class AdaptiveCompressor:
    """Low rank, whose rank each layer's spectrum decides.

    Presets: ``high_quality`` keeps 98 % of the squared singular values in factors of 8 bits, ``balanced`` 90 %,
    ``max_compression`` 60 % in factors of 4 bits.

    Args:
        preset: one of them.
        min_weights: tensors of fewer weights stay as they are.

    Raises:
        RecipeError: there is no such preset; the hint names near ones.
    """

    PRESETS: ClassVar[Mapping[str, tuple[float, Uniform]]] = {
        "high_quality": (0.98, _BYTE),
        "balanced": (0.9, _BYTE),
        "max_compression": (0.6, Uniform(4, 32, search=True)),
    }

    def __init__(self, preset: str = "balanced", *, min_weights: int = 1024) -> None:
        if preset not in self.PRESETS:
            near = difflib.get_close_matches(str(preset), self.PRESETS, n=2, cutoff=0.4)
            raise RecipeError(
                f"AdaptiveCompressor has no preset {preset!r}", hint=f"use {' or '.join(near or self.PRESETS)}"
            )
        require_integer("AdaptiveCompressor", "min_weights", min_weights, 1, 1 << 62)
        self.preset, self.min_weights = preset, min_weights

    def compress(
        self, tensors: Mapping[str, Tensor], statistics: Mapping[str, Statistics] | None = None
    ) -> CompressedTensors:
        """Compress floating-point tensors of two dimensions or more; leading ones count as rows.

        What low rank would not make smaller stays as it is, and so does what has too few weights.

        Args:
            tensors: by name.
            statistics: of inputs, by name; columns are weighted by their power where it is known.

        Raises:
            CodecError: there are no tensors, or one is not finite; the message names it.
        """
        energy, factor = self.PRESETS[self.preset]
        weights = {}
        for name, matrix in chosen(tensors, self.min_weights).items():
            known = (statistics or {}).get(name)
            codec = LowRank(energy=energy, kind="plain" if known is None else "activation", factor=factor)
            with naming(name):
                payload = codec.encode(matrix, known)
            if payload.bits < 8 * matrix.nbytes:
                weights[name] = measured(matrix, (payload,), shape=tuple(tensors[name].shape))
        again = tied(tensors)
        dense = {name: tensor.detach() for name, tensor in tensors.items() if name not in weights and name not in again}
        return CompressedTensors(weights, dense, again)

    @staticmethod
    def decompress(compressed: CompressedTensors) -> dict[str, Tensor]:
        """All tensors in their own shapes and dtypes, see ``CompressedTensors.decompress``."""
        return compressed.decompress()

    @staticmethod
    def ranks(compressed: CompressedTensors) -> dict[str, int]:
        """The rank of each tensor that was compressed."""
        return {name: _rank(weight.payloads[0]) for name, weight in compressed.weights.items()}


def _rank(payload: Payload) -> int:
    return int(payload.tensors["rank"])
