"""Overlap of texts: the hashes are those of the definition, and the share is what a plain search finds."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from tenpak.calibration import overlap as module
from tenpak.calibration.overlap import WINDOW, overlap

WORDS = (
    "moon",
    "sun",
    "sea",
    "star",
    "sat",
    "over",
    "under",
    "silver",
    "cheese",
    "round",
    "mouse",
    "hill",
    "river",
    "went",
)


def text(seed: int, words: int = 2000) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", ",", ".", str(draw.randrange(100))]) for _ in range(words))


def plain(evaluation: str, calibration: str) -> float:
    """The definition."""
    wanted, there = " ".join(evaluation.split()), " ".join(calibration.split())
    starts = range(0, len(wanted) - WINDOW + 1, WINDOW)
    return sum(wanted[start : start + WINDOW] in there for start in starts) / len(starts)


@pytest.mark.parametrize("piece", [1 << 20, 700, WINDOW])
def test_it_is_what_a_plain_search_finds(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    evaluation, other = text(1), text(2)
    mixed = other[:777] + evaluation[3000:7000] + other[777:]
    for calibration in (evaluation, other, mixed, evaluation[:5001], "é" + mixed + "🌙", ""):
        assert overlap(evaluation, calibration) == pytest.approx(plain(evaluation, calibration))
    assert overlap(evaluation, evaluation) == 1
    assert overlap(evaluation, other) == 0
    assert overlap(evaluation, mixed) == pytest.approx(4000 / len(evaluation), abs=2 * WINDOW / len(evaluation))


@pytest.mark.parametrize("piece", [1 << 20, 333])
def test_white_space_of_any_kind_is_one_blank(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    evaluation = text(3)
    draw = random.Random(0)
    spaced = "".join(draw.choice(["\n\n", " \t", "\u00a0", "   " * 200]) if c == " " else c for c in evaluation)
    assert overlap(evaluation, spaced) == 1
    assert overlap("\n" + spaced + " ", evaluation) == 1


def test_a_short_text_counts_as_a_whole() -> None:
    assert overlap("the  moon\n", "over the moon went") == 1
    assert overlap("the moon", "over the sun") == 0
    assert overlap(" ", "over the sun") == 0


def test_many_windows_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WINDOWS", 50)
    evaluation = text(4, 20_000)
    half = len(evaluation) // 2
    assert overlap(evaluation, evaluation) == 1
    assert overlap(evaluation, evaluation[:half]) == pytest.approx(0.5, abs=0.05)


def test_it_takes_little_memory() -> None:
    evaluation, calibration = text(5), text(6, 50_000) * 20
    tracemalloc.start()
    overlap(evaluation, calibration)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(calibration) > 5_000_000
    assert peak < 100 << 20  # a few arrays of a million hashes, not of all


def test_stories_by_one_hand_have_little_in_common(tinystories: Path) -> None:
    first, second = ((tinystories / "texts" / f"{name}.txt").read_text() for name in ("evaluation", "calibration"))
    assert overlap(first, second) < 0.01
