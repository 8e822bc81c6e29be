"""How much of one text occurs in another: a quality measured on what was calibrated on would flatter.

The evaluation text is cut into windows of 100 characters, one after another; of each it is asked whether it occurs
anywhere in the calibration text, white space of any kind and length counting as one blank. Simple stories by different
hands have windows of half that length in common, a few in a hundred, and none of this one. Every offset of the
calibration text is hashed, in 64 bits: two windows that differ hardly ever have the same hash.

A hash of n characters is Σ m(cᵢ)·Bⁿ⁻¹⁻ⁱ mod 2⁶⁴, and that of 2n follows from two of n, so 100 = 64 + 32 + 4 take a few
passes of numpy: linear time. Memory is bounded: the calibration text is read in pieces, and at most so many windows of
the evaluation text are looked for, evenly spread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["WINDOW", "Hashes", "overlap", "window_hashes"]

WINDOW = 100
_MOST_WINDOWS = 200_000
_PIECE = 1 << 20
_BLANK = re.compile(r"\s+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that no character is shifted out
_MIX = np.uint64(0xBF58476D1CE4E5B9)

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def overlap(evaluation: str, calibration: str) -> float:
    """The share of ``evaluation`` that occurs in ``calibration``, 0 to 1.

    Args:
        evaluation: a text; one shorter than a window counts as a whole.
        calibration: another text.
    """
    text = _BLANK.sub(" ", evaluation).strip()
    if len(text) < WINDOW:
        return float(bool(text) and text in _BLANK.sub(" ", calibration))
    count = len(text) // WINDOW
    step = WINDOW * -(-count // _MOST_WINDOWS)
    stride = step * max(_PIECE // step, 1)
    pieces = (text[start : start + stride + WINDOW - 1] for start in range(0, len(text), stride))
    wanted, windows = np.unique(np.concatenate([_hashes(piece)[::step] for piece in pieces]), return_inverse=True)
    found = np.zeros(len(wanted), dtype=bool)
    for piece in _pieces(calibration):
        hashes = _hashes(piece)
        places = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        found[places[wanted[places] == hashes]] = True
    return float(found[windows].mean())


def _pieces(text: str) -> Iterator[str]:
    """The text with single blanks, in pieces that share all but one character of a window with the next."""
    rest = ""
    for start in range(0, len(text), _PIECE):
        piece = _BLANK.sub(" ", rest + text[start : start + _PIECE])
        yield piece
        rest = piece[-(WINDOW - 1) :]


def _hashes(text: str) -> Hashes:
    """Hashes of the windows at every offset, uint64 ``[len(text) - WINDOW + 1]``; none of a text that is shorter."""
    if len(text) < WINDOW:
        return np.zeros(0, dtype=np.uint64)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64) + np.uint64(1)
    codes *= _MIX  # characters are small numbers and near each other
    return window_hashes(codes ^ (codes >> np.uint64(29)), WINDOW)


def window_hashes(characters: Hashes, window: int) -> Hashes:
    """Hashes of the windows at every offset, uint64 ``[characters - window + 1]``.

    Args:
        characters: a number for each, uint64, at least ``window`` of them; well mixed, since hashes are linear in them.
        window: characters in a window, at least 1.
    """
    part, result = characters, None
    length, done = 1, 0  # ``part`` is of ``length`` characters, ``result`` of ``done``
    while length <= window:
        if window & length:
            result = part if result is None else _joined(part, length, result, done)
            done += length
        part, length = _joined(part, length, part, length), 2 * length
    assert result is not None  # a window has a length
    return result[: len(characters) - window + 1]


def _joined(first: Hashes, length: int, second: Hashes, more: int) -> Hashes:
    """Hashes of ``length`` characters and ``more`` after them, from those of both."""
    size = max(min(len(first), len(second) - length), 0)
    joined: Hashes = first[:size] * np.uint64(pow(_BASE, more, 1 << 64)) + second[length : length + size]
    return joined
