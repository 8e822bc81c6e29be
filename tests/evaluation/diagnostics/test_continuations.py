"""Continuations: greedy as generate's, counted by hand, within the context."""

from __future__ import annotations

import pytest
import torch

from tenpak.errors import EvaluationError
from tenpak.evaluation.diagnostics.generation import (
    NEW_TOKENS,
    Continued,
    Prompt,
    compare_generation,
    continue_both,
    default_prompts,
    distinct,
    first_difference,
    given_prompts,
    repetition,
)


def test_repetition_and_distinct_bigrams() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert distinct([1]) == 1
    assert distinct([1, 2, 1, 2]) == pytest.approx(2 / 3)
    assert distinct([7] * 10) == pytest.approx(1 / 9)


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


def test_continuations_are_the_likeliest_tokens_whatever_the_models_own_settings(talker) -> None:
    pair = talker().open()
    prompt = given_prompts(pair, ["The cat sat"])[0]
    for model in (pair.original, pair.compressed):
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.no_repeat_ngram_size = 2
    both = continue_both(pair, [prompt])[0]
    for model, found in ((pair.original, both.original), (pair.compressed, both.compressed)):
        ids = prompt.tokens.tolist()
        for token in found:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert len(ids) == pair.context == NEW_TOKENS or found[-1] == pair.tokenizer.eos_token_id


def test_comparison(talker) -> None:
    pair = talker().open()
    cat, cats = (pair.tokenizer.convert_tokens_to_ids(list(text)) for text in ("cat", "catcatcat"))
    found = compare_generation(pair, [Continued(Prompt("x", torch.tensor([5])), cat, cats)])[0]
    assert (found.prompt, found.original, found.compressed) == ("x", "cat", "catcatcat")
    assert found.first_divergence == 3
    assert (found.repetition_original, found.distinct_2_original) == (0, 1)
    assert (found.repetition, found.distinct_2) == (0.5, 3 / 8)


def test_default_prompts_are_whole_words_of_the_text(talker) -> None:
    pair = talker().open()
    first, second = default_prompts(pair)
    assert first.text == "The cat sat on the mat"
    assert second.text in ("A dog ran over the", "The cat sat on the mat")
    assert all(pair.tokenizer.decode(prompt.tokens) == prompt.text for prompt in (first, second))


@pytest.mark.filterwarnings("ignore:the text of")
def test_a_text_of_two_tokens_is_a_prompt(talker, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("ab")
    prompts = default_prompts(talker().open(text=tmp_path / "short.txt"))
    assert [prompt.text for prompt in prompts] == ["ab"]


def test_prompts_that_cannot_be_used(talker) -> None:
    pair = talker().open()
    with pytest.raises(EvaluationError, match="''") as empty:
        given_prompts(pair, [""])
    with pytest.raises(EvaluationError, match="64 tokens leaves no room in a context of 64") as long:
        given_prompts(pair, ["x" * 64])
    assert empty.value.hint
    assert long.value.hint
