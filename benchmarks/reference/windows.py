"""Which windows of a held-out text occur in a corpus: a model is only measured on what it has never seen.

WikiText-2 is made of Wikipedia articles, and a corpus may hold the same articles in another dress: WikiText writes
``2 @,@ 000 people , in 1998 – 99`` for ``2,000 people, in 1998–99``. So both are reduced to their ASCII letters and
digits, in lower case, before they are compared; white space, punctuation and a tokenizer's marks count for nothing. A
window is then 50 such characters, about ten words. Every offset of the held-out text is indexed, and every offset of
the corpus looked up: two texts that share 50 characters in a row are found, wherever the row begins.

Windows are hashed as ``tenpak.calibration.overlap`` does. A table of one bit per 27-bit hash lets nearly all windows
pass without a search, as a Bloom filter does. Memory: 8 bytes per character of the held-out text, and one document of
the corpus at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenpak.calibration.overlap import Hashes, window_hashes

__all__ = ["WINDOW", "Index", "index", "overlap", "reduced", "shared"]

WINDOW = 50
_FILTER_BITS = 27
_PIECE = 1 << 20
_LETTERS = b"0123456789abcdefghijklmnopqrstuvwxyz"
_LOWER = bytes(range(256)).lower()
_DROPPED = bytes(sorted(set(range(256)) - set(_LETTERS) - set(_LETTERS.upper())))

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Index:
    """The windows of a text.

    Attributes:
        hashes: one per distinct window, ascending, uint64.
        filter: bool ``[2 ** 27]``; false where no window's hash begins with these bits.
    """

    hashes: Hashes
    filter: Flags


def reduced(text: str) -> bytes:
    """The ASCII letters and digits of ``text``, in lower case, without WikiText's ``<unk>``."""
    return text.replace("<unk>", "").encode("utf-8", "ignore").translate(_LOWER, _DROPPED)


def index(texts: Iterable[str]) -> Index:
    """The windows at every offset of ``texts``, none across two of them."""
    hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *(_hashes(reduced(text)) for text in texts)]))
    flags = np.zeros(1 << _FILTER_BITS, dtype=bool)
    flags[_head(hashes)] = True
    return Index(hashes, flags)


def shared(windows: Index, text: str) -> Hashes:
    """The distinct windows of ``text`` that are in the index, ascending; empty for a text shorter than a window."""
    letters = reduced(text)
    found = [np.zeros(0, np.uint64)]
    for start in range(0, max(len(letters) - WINDOW + 1, 0), _PIECE):
        hashes = _hashes(letters[start : start + _PIECE + WINDOW - 1])
        likely = hashes[windows.filter[_head(hashes)]]
        if len(likely) and len(windows.hashes):
            places = np.searchsorted(windows.hashes, likely).clip(max=len(windows.hashes) - 1)
            found.append(likely[windows.hashes[places] == likely])
    return np.unique(np.concatenate(found))


def overlap(corpus: Iterable[str], text: str) -> float:
    """The share of the distinct windows of ``text`` that occur in a document of ``corpus``, 0 to 1."""
    windows = index([text])
    seen = np.zeros(len(windows.hashes), dtype=bool)
    for document in corpus:
        seen[np.searchsorted(windows.hashes, shared(windows, document))] = True
    return float(seen.mean()) if len(seen) else 0.0


def _head(hashes: Hashes) -> np.ndarray[Any, np.dtype[np.int64]]:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _hashes(letters: bytes) -> Hashes:
    """Hashes of the windows at every offset, uint64 ``[max(len(letters) - 49, 0)]``."""
    if len(letters) < WINDOW:
        return np.zeros(0, dtype=np.uint64)
    return window_hashes(_MIXED[np.frombuffer(letters, dtype=np.uint8)], WINDOW)


# Characters are small numbers near each other: each stands for one drawn from 64 bits, the same in every process.
_MIXED: Hashes = np.random.default_rng(50).integers(0, 1 << 64, size=256, dtype=np.uint64)
