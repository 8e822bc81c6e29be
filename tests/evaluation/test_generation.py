"""Text from a model: how far it is, told once for every token, and the end once, whenever it comes."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import make_tiny_talker
from transformers import GenerationConfig

from tenpak.evaluation import generation


@pytest.mark.parametrize("stops_early", [False, True])
def test_the_end_is_told_once(stops_early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_talker(tmp_path / "model")
    if stops_early:
        load = generation.load_original

        def impatient(*arguments: object, **options: object) -> object:
            loaded = load(*arguments, **options)
            # Whatever comes first is the end.
            loaded.generation_config = GenerationConfig(eos_token_id=list(range(loaded.config.vocab_size)))
            return loaded

        monkeypatch.setattr(generation, "load_original", impatient)
    steps: list[tuple[str, int, int]] = []
    generation.generate(model, "the cat", tokens=5, progress=lambda *step: steps.append(step))
    last = 1 if stops_early else 5
    assert steps[0] == ("generating", 0, 5)
    assert [step for step in steps if step[1] == step[2]] == [("generating", last, last)]
    assert len(set(steps)) == len(steps)
