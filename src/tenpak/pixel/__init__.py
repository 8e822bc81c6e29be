"""PIXEL: pattern-indexed weights, under the names that its users type, over the codecs of tenpak.

>>> from tenpak.pixel import PIXELCompressor, PIXELConfig
>>> result = PIXELCompressor(PIXELConfig.for_small_model()).compress(model.state_dict())    # doctest: +SKIP
>>> result.compression_ratio, result.reconstruction_error                                   # doctest: +SKIP

Patterns are the codec ``pattern/1`` with a dictionary that tensors share; low rank is ``lowrank/1``, rounding with
compensation ``uniform/1``. Patterns lose to rounding at any size: ``docs/pixel.md`` says by how much.
"""

from __future__ import annotations

from tenpak.codecs.block_cache import BlockCache
from tenpak.codecs.patterns import PatternDictionary
from tenpak.pixel.compressor import PIXELCompressor
from tenpak.pixel.config import PIXELConfig
from tenpak.pixel.dictionary import load_dictionary, save_dictionary
from tenpak.pixel.gptq_style import GPTQStyleCompressor
from tenpak.pixel.hybrids import AdaptiveCompressor, SVDHybridCompressor, SVDHybridResult
from tenpak.pixel.modules import PatternAttention, PIXELLinear, PIXELMemory, memory_held, replace_linear_layers
from tenpak.pixel.tensors import CompressedTensor, CompressedTensors, PatternRefs

__all__ = [
    "AdaptiveCompressor",
    "BlockCache",
    "CompressedTensor",
    "CompressedTensors",
    "GPTQStyleCompressor",
    "PIXELCompressor",
    "PIXELConfig",
    "PIXELLinear",
    "PIXELMemory",
    "PatternAttention",
    "PatternDictionary",
    "PatternRefs",
    "SVDHybridCompressor",
    "SVDHybridResult",
    "load_dictionary",
    "memory_held",
    "replace_linear_layers",
    "save_dictionary",
]
