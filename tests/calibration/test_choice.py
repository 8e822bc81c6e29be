"""Which text is read, and how much of it."""

from __future__ import annotations

from pathlib import Path

import torch

from tenpak.calibration.choice import first_tokens
from tenpak.calibration.text import tokenize
from tenpak.evaluation.evaluate import load_tokenizer


def test_the_first_tokens_are_those_of_the_whole_text(tinystories: Path) -> None:
    content = (tinystories / "texts" / "calibration.txt").read_text()
    tokenizer = load_tokenizer(tinystories)
    whole = tokenize(tokenizer, content)
    for count in (10, 1000, 20_000, len(whole) - 10, len(whole) + 10):
        assert torch.equal(first_tokens(tokenizer, content, count, 2048), whole[:count])
