"""One step of decoding side by side: what each model would say next after the same prompt, and where they part.

p of the original and q of the compressed model over the token that follows the prompt: the ten likeliest tokens of
each, the entropies -Σ p log p in nats, KL(p ‖ q); and how far both go on with the same tokens when each takes its
likeliest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenpak.evaluation.diagnostics.generation import Continued, Prompt, text_of
from tenpak.evaluation.diagnostics.pair import Pair
from tenpak.evaluation.windowing import evaluating

__all__ = ["Candidate", "Step", "compare_step"]

_TOP = 10
# Tokenizers mark a leading blank in the token's own name; decoding a single token may lose it.
_BLANKS = ("▁", "Ġ")


@dataclass(frozen=True)
class Candidate:
    """A token that might come next, as text, and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """Both models after one prompt. Figures are NaN where the logits are not finite.

    Attributes:
        prompt: the prompt.
        original: the original's likeliest tokens.
        compressed: the compressed model's.
        entropy_original: of the original's distribution, nats.
        entropy: of the compressed model's.
        kl: of both, nats.
        diverges_at: how many tokens both add, greedily, before the first that differs; None where all are the same.
        agreed: those tokens as text.
    """

    prompt: str
    original: tuple[Candidate, ...]
    compressed: tuple[Candidate, ...]
    entropy_original: float
    entropy: float
    kl: float
    diverges_at: int | None
    agreed: str


def compare_step(pair: Pair, continued: Continued) -> Step:
    """Both models' next token after a prompt, and how long their continuations agree."""
    prompt = continued.prompt
    with evaluating(pair.original, pair.compressed):
        log_p, log_q = (_next(model, prompt) for model in (pair.original, pair.compressed))
    return Step(
        prompt=prompt.text,
        original=_likeliest(log_p, pair.tokenizer),
        compressed=_likeliest(log_q, pair.tokenizer),
        entropy_original=_entropy(log_p),
        entropy=_entropy(log_q),
        kl=float(torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum()),
        diverges_at=continued.first_divergence,
        agreed=text_of(pair.tokenizer, continued.original[: continued.first_divergence]),
    )


def _next(model: Any, prompt: Prompt) -> Tensor:
    """Log-probabilities of the token after a prompt, float64 ``[vocabulary]``."""
    logits: Tensor = model(input_ids=prompt.tokens[None].to(model.device), use_cache=False).logits
    return logits[0, -1].double().log_softmax(dim=-1).cpu()


def _entropy(log_p: Tensor) -> float:
    return float(-torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum())


def _likeliest(log_p: Tensor, tokenizer: Any) -> tuple[Candidate, ...]:
    if torch.isnan(log_p).any():
        return ()
    values, ids = log_p.topk(min(_TOP, len(log_p)))
    return tuple(
        Candidate(_spelled(tokenizer, token), value)
        for token, value in zip(ids.tolist(), values.exp().tolist(), strict=True)
    )


def _spelled(tokenizer: Any, token: int) -> str:
    """A token as a reader would write it; its name in the vocabulary where it is not text by itself."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token]))
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return name
    return " " + text if name.startswith(_BLANKS) and not text.startswith(" ") else text
