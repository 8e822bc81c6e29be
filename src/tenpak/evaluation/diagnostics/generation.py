"""Greedy continuations of both models, and whether the compressed one starts to repeat itself.

Greedy decoding amplifies small differences, so a text that diverges says little; one that falls into a loop where the
original does not says much. Of a continuation's tokens: *repetition* is the share of 4-grams that have occurred in it
before, *distinct bigrams* the share of different ones among its bigrams (Li et al., A Diversity-Promoting Objective
Function for Neural Conversation Models, arXiv 1510.03055).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenpak.calibration.text import tokenize
from tenpak.errors import CalibrationError, EvaluationError
from tenpak.evaluation.diagnostics.pair import Pair, Progress

__all__ = [
    "NEW_TOKENS",
    "Continued",
    "Generation",
    "Prompt",
    "compare_generation",
    "continue_both",
    "default_prompts",
    "distinct",
    "first_difference",
    "given_prompts",
    "repetition",
    "text_of",
]

NEW_TOKENS = 64
"""Tokens that each model adds to a prompt, at most."""

_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens, int64 ``[tokens]``."""

    text: str
    tokens: Tensor


@dataclass(frozen=True)
class Continued:
    """A prompt and the tokens that each model adds to it."""

    prompt: Prompt
    original: list[int]
    compressed: list[int]

    @property
    def first_divergence(self) -> int | None:
        """How many tokens are the same before the first that differs; None where all are the same."""
        return first_difference(self.original, self.compressed)


@dataclass(frozen=True)
class Generation:
    """Both continuations of one prompt.

    Attributes:
        prompt: the prompt.
        original: the original's continuation.
        compressed: the compressed model's.
        first_divergence: how many tokens are the same before the first that differs; None where all are the same.
        repetition_original: share of the original's 4-grams that occurred before.
        repetition: the same of the compressed model.
        distinct_2_original: share of different bigrams among the original's.
        distinct_2: the same of the compressed model.
    """

    prompt: str
    original: str
    compressed: str
    first_divergence: int | None
    repetition_original: float
    repetition: float
    distinct_2_original: float
    distinct_2: float


def continue_both(pair: Pair, prompts: Sequence[Prompt], progress: Progress | None = None) -> tuple[Continued, ...]:
    """Continue every prompt with both models."""
    found = []
    for done, prompt in enumerate(prompts, start=1):
        found.append(
            Continued(prompt, *(_continuation(model, prompt, pair) for model in (pair.original, pair.compressed)))
        )
        if progress:
            progress("generation", done, len(prompts))
    return tuple(found)


def compare_generation(pair: Pair, continued: Sequence[Continued]) -> tuple[Generation, ...]:
    """What can be said of continuations."""
    return tuple(
        Generation(
            prompt=both.prompt.text,
            original=text_of(pair.tokenizer, both.original),
            compressed=text_of(pair.tokenizer, both.compressed),
            first_divergence=both.first_divergence,
            repetition_original=repetition(both.original),
            repetition=repetition(both.compressed),
            distinct_2_original=distinct(both.original),
            distinct_2=distinct(both.compressed),
        )
        for both in continued
    )


def given_prompts(pair: Pair, texts: Sequence[str]) -> tuple[Prompt, ...]:
    """The user's prompts.

    Raises:
        EvaluationError: one has no tokens, or fills the context.
    """
    found = []
    for text in texts:
        try:
            tokens = _tokens(pair, text)
        except CalibrationError as error:
            raise EvaluationError(f"the prompt {text!r} cannot be used: {error}", hint="give a longer --prompt") from (
                error
            )
        if len(tokens) >= pair.context:
            raise EvaluationError(
                f"a prompt of {len(tokens)} tokens leaves no room in a context of {pair.context}",
                hint="give a shorter --prompt",
            )
        found.append(Prompt(text, tokens))
    return tuple(found)


def default_prompts(pair: Pair) -> tuple[Prompt, ...]:
    """The beginning of the text that is read, and that of a line or sentence from its middle on; whole words."""
    length = max(1, min(_PROMPT_TOKENS, pair.context // 2))
    rest = text_of(pair.tokenizer, pair.tokens[len(pair.tokens) // 2 :].tolist())
    start = re.search(r"\n\s*(?=\S)|[.!?][\"”’')]*\s+(?=\S)", rest)
    beginnings = [text_of(pair.tokenizer, pair.tokens[:length].tolist())]
    if start is not None:
        beginnings.append(text_of(pair.tokenizer, _tokens(pair, rest[start.end() :])[:length].tolist()))
    # Half a word would be continued in its own way by each model.
    found = [Prompt(text, _tokens(pair, text)) for text in map(_whole_words, beginnings) if text.strip()]
    return tuple(found) or (Prompt(beginnings[0], pair.tokens[:length]),)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Where two sequences part, or None where they are the same."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that have occurred before; 0 where there are none."""
    grams = _grams(tokens, 4)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int]) -> float:
    """Share of different ones among the bigrams; 1 where there are none."""
    grams = _grams(tokens, 2)
    return len(set(grams)) / len(grams) if grams else 1.0


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, without special ones."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _continuation(model: Any, prompt: Prompt, pair: Pair) -> list[int]:
    """At most 64 tokens that a model adds to a prompt, the likeliest each time, as far as the context goes."""
    ids = prompt.tokens[None].to(model.device)
    end = pair.tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(NEW_TOKENS, pair.context - ids.shape[1]),
            pad_token_id=0 if end is None else end,
            # What a model's own generation_config.json may ask for is not greedy decoding.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def _tokens(pair: Pair, text: str) -> Tensor:
    return tokenize(pair.tokenizer, text, vocab_size=pair.original.config.get_text_config().vocab_size)


def _whole_words(text: str) -> str:
    """A text without its last word, which may be cut off; all of it where that is all."""
    return re.sub(r"\s+\S*$", "", text) or text


def _grams(tokens: Sequence[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[begin : begin + length]) for begin in range(len(tokens) - length + 1)]
