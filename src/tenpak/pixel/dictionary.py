"""The dictionary's file, and a dictionary made for some tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tenpak.codecs.patterns import PatternDictionary, to_blocks
from tenpak.errors import CodecError
from tenpak.pixel.config import PIXELConfig
from tenpak.pixel.files import About, damaged, read_file, write_file

__all__ = ["learned_dictionary", "load_dictionary", "save_dictionary"]

_BLOCKS_PER_PATTERN = 64  # what clustering looks at


class _About(About):
    format: Literal["tenpak-pixel-dictionary/1"]
    size: Annotated[int, Field(ge=2, le=32)]
    max_patterns: Annotated[int, Field(ge=1, le=1 << 16)]
    base: Annotated[int, Field(ge=0, le=1 << 16)]
    next_id: Annotated[int, Field(ge=0, lt=1 << 62)]


def save_dictionary(dictionary: PatternDictionary, path: str | Path) -> None:
    """Write a dictionary as a safetensors file: patterns that are not made by code, ids, uses.

    Raises:
        ArtifactError: it cannot be written.
    """
    ids = dictionary.ids
    tensors = {
        "patterns": dictionary.found,
        "ids": torch.tensor([pattern for pattern in ids if pattern >= dictionary.base], dtype=torch.int64),
        "uses": torch.tensor([dictionary.uses(pattern) for pattern in ids], dtype=torch.int64),
    }
    about = _About(
        format="tenpak-pixel-dictionary/1",
        size=dictionary.size,
        max_patterns=dictionary.max_patterns,
        base=dictionary.base,
        next_id=dictionary.next_id,
    )
    write_file(path, tensors, about)


def load_dictionary(path: str | Path) -> PatternDictionary:
    """Read what ``save_dictionary`` wrote.

    Raises:
        CorruptArtifactError: it is no such file, or was changed since it was written.
    """
    tensors, about = read_file(path, _About)
    found = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    if found != {"patterns": (torch.float16, 3), "ids": (torch.int64, 1), "uses": (torch.int64, 1)}:
        raise damaged(path, f"it holds {', '.join(found) or 'nothing'}")
    patterns = dict(zip(tensors["ids"].tolist(), tensors["patterns"], strict=False))
    if not len(patterns) == len(tensors["ids"]) == len(tensors["patterns"]):
        raise damaged(path, "its ids are not those of its patterns")
    try:
        return PatternDictionary.restored(
            about.size, about.max_patterns, about.base, patterns, tensors["uses"].tolist(), about.next_id
        )
    except CodecError as error:
        raise damaged(path, str(error)) from error


def learned_dictionary(weights: Iterable[Tensor], config: PIXELConfig) -> PatternDictionary:
    """A dictionary of what is made by code and of patterns that recur in matrices, each seen relative to its size.

    Args:
        weights: finite matrices ``[out, in]``; from each some blocks are drawn, in proportion to its size.
        config: sizes, and whether to look for patterns at all.
    """
    size = config.pattern_size
    base = min(2 * size * size, config.max_patterns // 2)  # half of it at least for what is found
    dictionary = PatternDictionary(size, config.max_patterns, base if config.discover else None)
    matrices = list(weights)
    if not config.discover or not matrices:
        return dictionary
    wanted = config.max_patterns - base
    total = sum(math.prod(-(-extent // size) for extent in matrix.shape) for matrix in matrices)
    share = min(1.0, _BLOCKS_PER_PATTERN * wanted / total)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = []
    for matrix in matrices:
        blocks = to_blocks(matrix.detach(), size).cpu()
        chosen = torch.randperm(len(blocks), generator=generator)[: math.ceil(share * len(blocks))]
        largest = float(matrix.detach().abs().amax())
        relative = blocks[chosen] / (largest or 1.0)
        drawn.append(relative / relative.square().mean().sqrt().clamp_min(1e-30))
    pooled = torch.cat(drawn).view(-1, size, size)
    dictionary.discover(pooled.flatten(0, 1), wanted, config.seed)
    return dictionary
