"""Which text a model reads: the one that was given, its folder's own, or one sampled from the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenpak.calibration.text import load_text

__all__ = ["Text", "choose_text"]


@dataclass(frozen=True)
class Text:
    """A text and how to call it."""

    name: str
    content: str

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
