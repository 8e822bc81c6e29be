"""``PIXELCompressor``: tensors as patterns of one dictionary that they share, and a quantizer for what these leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tenpak.codecs.patterns import PatternDictionary
from tenpak.errors import CodecError
from tenpak.pixel.config import PIXELConfig
from tenpak.pixel.dictionary import learned_dictionary
from tenpak.pixel.matrices import Encoder, chosen, naming, tied
from tenpak.pixel.tensors import CompressedTensors, measured

__all__ = ["PIXELCompressor"]


class PIXELCompressor:
    """Compresses tensors with patterns that they share.

    Args:
        config: how; ``PIXELConfig()`` where it is None.
        dictionary: its patterns are used, and their uses counted; where it is None, each ``compress`` makes its own.

    Raises:
        CodecError: the dictionary's patterns are not of the configuration's size.
    """

    def __init__(self, config: PIXELConfig | None = None, dictionary: PatternDictionary | None = None) -> None:
        self.config = config or PIXELConfig()
        self.dictionary = dictionary
        if dictionary is not None and dictionary.size != self.config.pattern_size:
            raise CodecError(
                f"the dictionary's patterns are of size {dictionary.size}, not {self.config.pattern_size}",
                hint=f"use PIXELConfig(pattern_size={dictionary.size}), or another dictionary",
            )

    def learn(self, tensors: Mapping[str, Tensor]) -> PatternDictionary:
        """A dictionary for these tensors, the same for the same ones.

        Raises:
            CodecError: there are none, or one of them is not finite.
        """
        return learned_dictionary(list(chosen(tensors, self.config.min_weights).values()), self.config)

    def compress(self, tensors: Mapping[str, Tensor]) -> CompressedTensors:
        """Compress floating-point tensors of two dimensions or more; what is smaller stays as it is.

        Leading dimensions (experts, kernels) count as rows.

        Raises:
            CodecError: there are no tensors, or one is not finite or out of range; the message names it.
        """
        matrices = chosen(tensors, self.config.min_weights)
        dictionary = (
            learned_dictionary(list(matrices.values()), self.config) if self.dictionary is None else self.dictionary
        )
        encoder = Encoder(dictionary, self.config.terms, self.config.scales_codec, self.config.rest)
        weights = {}
        for name, matrix in matrices.items():
            with naming(name):
                weights[name] = measured(matrix, encoder.encode(matrix), shape=tuple(tensors[name].shape))
        again = tied(tensors)
        dense = {name: tensor.detach() for name, tensor in tensors.items() if name not in weights and name not in again}
        return CompressedTensors(weights, dense, again, encoder.patterns, dictionary.ids)

    @staticmethod
    def decompress(compressed: CompressedTensors) -> dict[str, Tensor]:
        """All tensors in their own shapes and dtypes, see ``CompressedTensors.decompress``."""
        return compressed.decompress()

    @staticmethod
    def save(compressed: CompressedTensors, path: str | Path) -> None:
        """Write them, see ``CompressedTensors.save``."""
        compressed.save(path)

    @staticmethod
    def load(path: str | Path) -> CompressedTensors:
        """Read them again, see ``CompressedTensors.load``."""
        return CompressedTensors.load(path)
