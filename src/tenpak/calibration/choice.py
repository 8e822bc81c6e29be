"""Which text a model reads: the one that was given, its folder's own, or one sampled from the model itself.

And how much of it: the first tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tenpak.calibration.text import load_text, tokenize

__all__ = ["Text", "choose_text", "first_tokens"]

# Characters a token, to begin with, and tokens at the end of a piece of text that are not relied on.
_CHARACTERS, _MARGIN = 6, 64


@dataclass(frozen=True)
class Text:
    """A text and how to call it; whether it was sampled from the model itself."""

    name: str
    content: str
    sampled: bool = False

    @property
    def sha256(self) -> str:
        """Of its UTF-8 bytes, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def choose_text(given: str | Path | None, own: Path, sample: Callable[[], Text]) -> Text:
    """The text to read.

    Args:
        given: file, folder or dataset id, or None.
        own: where the model's folder may hold one.
        sample: makes one where there is neither.

    Raises:
        CalibrationError: it cannot be read or sampled.
    """
    if given is None and own.is_file():
        given = own
    if given is None:
        return sample()
    return Text(Path(given).name if Path(given).exists() else str(given), load_text(given))


def first_tokens(tokenizer: Any, content: str, count: int, vocab_size: int) -> Tensor:
    """The first tokens of a text, of which no more is tokenized than needed: that may take longer than reading them.

    Args:
        tokenizer: of the model.
        content: the text.
        count: at most so many.
        vocab_size: of the model.

    Raises:
        CalibrationError: the tokenizer does not fit the model.
    """
    length = _CHARACTERS * count
    while length < len(content):
        cut = max(content.rfind("\n", 0, length), content.rfind(" ", 0, length))
        ids = tokenize(tokenizer, content[: max(cut, 1)], vocab_size=vocab_size)
        if ids.numel() >= count + _MARGIN:  # what lies at the cut may be split in another way
            return ids[:count]
        length *= 2
    return tokenize(tokenizer, content, vocab_size=vocab_size)[:count]
