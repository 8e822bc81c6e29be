"""One step of decoding: what scipy makes of the models' own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from tenpak.evaluation.diagnostics.decoding import compare_step
from tenpak.evaluation.diagnostics.generation import Continued, continue_both, given_prompts


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_figures_equal_scipy(family: str, talker) -> None:
    pair = talker(family, recipe="int2:g32").open()
    prompt = given_prompts(pair, ["The cat"])[0]
    step = compare_step(pair, continue_both(pair, [prompt])[0])
    with torch.no_grad():
        p, q = (
            scipy.special.softmax(model(prompt.tokens[None]).logits[0, -1].double().numpy())
            for model in (pair.original, pair.compressed)
        )
    assert step.prompt == "The cat"
    assert step.entropy_original == pytest.approx(scipy.stats.entropy(p), rel=1e-5)
    assert step.entropy == pytest.approx(scipy.stats.entropy(q), rel=1e-5)
    assert step.kl == pytest.approx(scipy.stats.entropy(p, q), rel=1e-3)
    for found, wanted in ((step.original, p), (step.compressed, q)):
        assert [each.probability for each in found] == pytest.approx(np.sort(wanted)[::-1][:10], rel=1e-4)
        assert found[0].token == pair.tokenizer.convert_ids_to_tokens(int(wanted.argmax()))


def test_where_both_part(talker) -> None:
    pair = talker().open()
    prompt = given_prompts(pair, ["The cat"])[0]
    cat, dog, moon = (pair.tokenizer.convert_tokens_to_ids(list(word)) for word in ("cat", "dog", "cab"))
    assert compare_step(pair, Continued(prompt, cat, cat)).diverges_at is None
    assert compare_step(pair, Continued(prompt, cat, cat)).agreed == "cat"
    assert (compare_step(pair, Continued(prompt, cat, moon)).diverges_at) == 2
    assert (compare_step(pair, Continued(prompt, cat, moon)).agreed) == "ca"
    assert (compare_step(pair, Continued(prompt, cat, dog)).agreed) == ""


def test_what_is_not_finite_has_no_likeliest_tokens(talker) -> None:
    pair = talker().open()
    with torch.no_grad():
        pair.compressed.model.norm.weight[0] = math.nan
    step = compare_step(pair, continue_both(pair, given_prompts(pair, ["The cat"]))[0])
    assert step.compressed == ()
    assert len(step.original) == 10
    assert math.isnan(step.kl)
    assert math.isnan(step.entropy)
    assert math.isfinite(step.entropy_original)


def test_blanks_and_halves_of_characters_are_legible(tinystories) -> None:
    from tenpak.evaluation.diagnostics.decoding import _spelled
    from tenpak.evaluation.evaluate import load_tokenizer

    tokenizer = load_tokenizer(tinystories)
    token = tokenizer(" with", add_special_tokens=False)["input_ids"]
    assert _spelled(tokenizer, token[0]) == " with"[: len(_spelled(tokenizer, token[0]))]
    assert _spelled(tokenizer, token[0]).startswith(" ")
    names = [_spelled(tokenizer, number) for number in range(300)]
    assert all(names)
    assert not any("\N{REPLACEMENT CHARACTER}" in name for name in names)
