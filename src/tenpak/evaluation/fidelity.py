"""How near a compressed model stays to its original, token by token, on a text.

For each scored position with the original's logits z (probabilities p) and the compressed model's ẑ (q):

- KL(p || q) = Σ_v p_v (log p_v - log q_v), nats; its mean over tokens is the loss that compression is judged by: unlike
  perplexity it cannot be lowered by luck, is zero only for equal models, and has far less sampling noise
- top-1: whether argmax z = argmax ẑ
- cosine of z and ẑ, and the mean of (z - ẑ)² over the vocabulary
- both perplexities, and their relative increase ppl/ppl_original - 1, as a fraction

Both models read the same windows in one pass; the logits of a batch are dropped before the next, so any text fits.
All of it is computed in float64 in chunks of positions, because the terms of a small KL nearly cancel. Standard errors
are by paired bootstrap over windows (``statistics``).

Source: KL and top-1 as llama.cpp's perplexity tool reports them ("--kl-divergence"); Dutta et al., Accuracy is Not All
You Need, arXiv 2407.09141, on why distances to the original say more than accuracy does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tenpak.errors import EvaluationError
from tenpak.evaluation.perplexity import dtype_name, exp
from tenpak.evaluation.statistics import Array, bootstrap
from tenpak.evaluation.windowing import Batch, Progress, Runner, batches, chunks, evaluating, plan_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Fidelity", "fidelity"]

_NAMES = ("nll_original", "nll", "kl", "top1", "cosine", "mse")


@dataclass(frozen=True)
class Fidelity:
    """A compressed model against its original. Standard errors (``_se``) are None with a single window.

    Attributes:
        ppl_original: perplexity per token of the original.
        ppl_original_se: its standard error.
        ppl: perplexity per token of the compressed model.
        ppl_se: its standard error.
        ppl_increase: ppl / ppl_original - 1, a fraction.
        ppl_increase_se: its standard error, paired.
        kl: mean KL(original || compressed) in nats per token.
        kl_se: its standard error.
        top1: fraction of tokens where both models' likeliest next token is the same.
        top1_se: its standard error.
        logits_cosine: mean over tokens of the cosine of both models' logits.
        logits_mse: mean squared difference of the logits.
        tokens: tokens scored.
        window: inputs per window.
        stride: distance between windows.
        dtype: the dtype that the original computed in, e.g. ``"float32"``.
        tokens_per_second_original: input tokens per second of the original's forward passes, overlap counted.
        tokens_per_second: the same of the compressed model.
    """

    ppl_original: float
    ppl_original_se: float | None
    ppl: float
    ppl_se: float | None
    ppl_increase: float
    ppl_increase_se: float | None
    kl: float
    kl_se: float | None
    top1: float
    top1_se: float | None
    logits_cosine: float
    logits_mse: float
    tokens: int
    window: int
    stride: int
    dtype: str
    tokens_per_second_original: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def fidelity(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fidelity:
    """Compare ``compressed`` with ``original`` on ``tokens``.

    Args:
        original: the reference; its context gives the default window.
        compressed: a model of the same vocabulary; may be on another device and of another dtype.
        tokens: int64 ``[tokens]``, at least 2.
        window: inputs per window; by default the original's context, at most 4096; never longer than the text.
        stride: by default min(512, window // 2); equal to ``window`` for disjoint windows.
        resamples: bootstrap draws for the standard errors.
        seed: of the bootstrap.
        progress: called with the tokens scored so far and their total after each batch.

    Raises:
        EvaluationError: the vocabularies differ, the text is too short or does not fit the models, logits are not
            finite (the message names whose), or window and stride do not fit each other.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (original, compressed)]
    if sizes[0] != sizes[1]:
        raise _vocabularies_differ(*sizes)
    length, step, planned = plan_windows(original, tokens, window, stride)
    runners = Runner(original, "the original"), Runner(compressed, "the compressed model")
    # Both models' logits live at once; each gets its half of the room.
    row_bytes = sizes[0] * (original.dtype.itemsize + compressed.dtype.itemsize)
    rows: list[Tensor] = []
    done = 0
    with evaluating(original, compressed):
        for batch in batches(tokens, planned, row_bytes):
            rows.append(_compare(*runners, batch).cpu())
            done += batch.targets.numel()
            if progress:
                progress(done, len(tokens) - 1)
    table = torch.cat(rows, dim=1).numpy()
    sums = {name: table[i] for i, name in enumerate(_NAMES)}
    sums["tokens"] = np.array([w.scored for w in planned], dtype=np.float64)
    errors = bootstrap(sums, _figures, resamples=resamples, seed=seed)
    mean = {name: float(sums[name].sum() / done) for name in _NAMES}
    return Fidelity(
        ppl_original=exp(mean["nll_original"]),
        ppl_original_se=errors["ppl_original"],
        ppl=exp(mean["nll"]),
        ppl_se=errors["ppl"],
        ppl_increase=exp(mean["nll"] - mean["nll_original"]) - 1.0,
        ppl_increase_se=errors["ppl_increase"],
        kl=mean["kl"],
        kl_se=errors["kl"],
        top1=mean["top1"],
        top1_se=errors["top1"],
        logits_cosine=mean["cosine"],
        logits_mse=mean["mse"],
        tokens=done,
        window=length,
        stride=step,
        dtype=dtype_name(original),
        tokens_per_second_original=runners[0].tokens_per_second,
        tokens_per_second=runners[1].tokens_per_second,
    )


def _figures(totals: Mapping[str, Array]) -> dict[str, Array]:
    mean = {name: totals[name] / totals["tokens"] for name in _NAMES}
    logs = {
        "ppl_original": mean["nll_original"],
        "ppl": mean["nll"],
        "ppl_increase": mean["nll"] - mean["nll_original"],
    }
    return {
        **{name: np.exp(np.minimum(value, 700.0)) for name, value in logs.items()},
        "kl": mean["kl"],
        "top1": mean["top1"],
    }


def _compare(original: Runner, compressed: Runner, batch: Batch) -> Tensor:
    """Sums per window of the quantities ``_NAMES``, float64 ``[6, windows]``."""
    z, z_hat = original(batch), compressed(batch)
    if z.shape != z_hat.shape:
        raise _vocabularies_differ(z.shape[-1], z_hat.shape[-1])
    targets = batch.targets.flatten().to(z.device)
    values = torch.empty(len(_NAMES), len(targets), dtype=torch.float64, device=z.device)
    for part in chunks(*z.shape):
        values[:, part] = _compare_chunk(z[part].double(), z_hat[part].to(z.device).double(), targets[part])
    original.require_finite(values[0])
    compressed.require_finite(values[1:])
    return values.view(len(_NAMES), *batch.targets.shape).sum(dim=-1)


def _compare_chunk(z: Tensor, z_hat: Tensor, targets: Tensor) -> Tensor:
    """The quantities ``_NAMES`` per position, float64 ``[6, positions]``, of logits ``[positions, vocabulary]``."""
    log_p, log_q = z.log_softmax(dim=-1), z_hat.log_softmax(dim=-1)
    target = targets[:, None]
    difference = z - z_hat
    return torch.stack(
        [
            -log_p.gather(-1, target).squeeze(-1),
            -log_q.gather(-1, target).squeeze(-1),
            (log_p.exp() * (log_p - log_q)).sum(dim=-1),
            (z.argmax(dim=-1) == z_hat.argmax(dim=-1)).double(),
            cosine_similarity(z, z_hat, dim=-1),
            (difference * difference).mean(dim=-1),
        ]
    )


def _vocabularies_differ(original: int, compressed: int) -> EvaluationError:
    return EvaluationError(
        f"the models have different vocabularies: {original} tokens in the original, {compressed} in the compressed",
        hint="compare the artifact with the model that it was made from",
    )
