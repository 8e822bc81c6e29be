"""What each tensor costs by itself: the divergence of the original with this tensor alone replaced.

For one tensor at a time, the artifact's values take its place in the original, and KL(original ‖ replaced) is measured
on the text, in nats per token, by the formula of ``fidelity``. To second order in the errors these costs add up to the
whole artifact's KL, but for the terms between tensors: where the sum is far off, errors meet, or undo each other.
Nothing else in a diagnosis says directly where bits are missing.

Measuring takes a pass over the text for every tensor, so only some are measured: those that ``expected`` expects to
cost the most. A batch of windows is read by the original once and then with every replacement in turn, so that the
original's logits need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.evaluation.diagnostics.pair import Pair, Progress, replaced_weight
from tenpak.evaluation.windowing import Batch, Runner, batches, chunks, evaluating

__all__ = ["Bill", "costliest", "measure_bill"]


@dataclass(frozen=True)
class Bill:
    """Costs in nats per token; NaN where the logits are not finite.

    Attributes:
        kl: of the whole artifact.
        tensors: of single tensors that were measured, by name.
        expected: of all tensors, from gradients.
    """

    kl: float
    tensors: dict[str, float]
    expected: dict[str, float]


def costliest(expected: Mapping[str, float], count: int) -> list[str]:
    """Names of the tensors that are expected to cost most, at most ``count``, the costliest first."""
    ranked = sorted(expected, key=lambda name: expected[name] if math.isfinite(expected[name]) else math.inf)
    return ranked[::-1][:count]


def measure_bill(pair: Pair, expected: Mapping[str, float], count: int, progress: Progress | None = None) -> Bill:
    """Measure the artifact's KL, and that of the original with the ``count`` costliest tensors alone replaced.

    The original has its own values again afterwards, bit for bit.

    Raises:
        EvaluationError: the original's logits are not finite.
        CorruptArtifactError: a tensor of the artifact cannot be read.
    """
    original, compressed = Runner(pair.original, "the original"), Runner(pair.compressed, "the compressed model")
    vocabulary = pair.original.config.get_text_config().vocab_size
    planned = list(pair.windows)
    tokens = sum(window.scored for window in planned)
    names = costliest(expected, count)
    work, done = tokens * (len(names) + 1), 0
    whole, single = 0.0, dict.fromkeys(names, 0.0)

    def advance(batch: Batch) -> None:
        nonlocal done
        done += batch.targets.numel()
        if progress:
            progress("costs", done, work)

    with evaluating(pair.original, pair.compressed):
        for batch in batches(pair.tokens, planned, 2 * vocabulary * pair.original.dtype.itemsize):
            z = original(batch)
            original.require_finite(z)
            whole += _divergence(z, compressed(batch))
            advance(batch)
            for name in names:
                with replaced_weight(pair, name):
                    z_hat = original(batch)
                single[name] += _divergence(z, z_hat)
                advance(batch)
    return Bill(whole / tokens, {name: total / tokens for name, total in single.items()}, dict(expected))


def _divergence(z: Tensor, z_hat: Tensor) -> float:
    """Σ KL(p ‖ q) over positions, of logits ``[positions, vocabulary]``."""
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for part in chunks(*z.shape):
        log_p = z[part].double().log_softmax(dim=-1)
        log_q = z_hat[part].to(z.device).double().log_softmax(dim=-1)
        total += (log_p.exp() * (log_p - log_q)).sum()
    return float(total)
