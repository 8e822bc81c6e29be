"""Perplexity of a model on a text, by sliding or disjoint windows.

ppl = exp( -1/T * Σ_t log p(x_t | context of x_t) ), over all tokens of the text but the first, each scored once by the
window that gives it the most context so far (``tenpak.calibration.text.windows``). Weighted by tokens, not by windows.
Log-probabilities and their sum are in float64 whatever the model's dtype, which the result names, because rounding the
model to BF16 shifts perplexity as much as mild compression does.

A larger stride is cheaper and gives tokens less context: perplexities compare only at equal window and stride.
Sources: Hugging Face Transformers' guide "Perplexity of fixed-length models" (sliding window, stride 512), and the
rolling windows of EleutherAI's lm-evaluation-harness (every token predicted once; a window's last input also predicts).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tenpak.evaluation.statistics import Array, bootstrap
from tenpak.evaluation.windowing import Progress, Runner, batches, chunks, evaluating, plan_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    Attributes:
        ppl: perplexity per token.
        ppl_se: its standard error (bootstrap over windows), None with a single window.
        tokens: tokens scored.
        window: inputs per window.
        stride: distance between windows.
        dtype: the dtype that the model computed in, e.g. ``"float32"``.
        tokens_per_second: input tokens per second of forward passes, the overlap of windows counted.
    """

    ppl: float
    ppl_se: float | None
    tokens: int
    window: int
    stride: int
    dtype: str
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on ``tokens``.

    Args:
        model: a causal language model, used on its device and in its dtype.
        tokens: int64 ``[tokens]``, at least 2.
        window: inputs per window; by default the model's context, at most 4096; never longer than the text.
        stride: by default min(512, window // 2); equal to ``window`` for disjoint windows.
        resamples: bootstrap draws for the standard error.
        seed: of the bootstrap.
        progress: called with the tokens scored so far and their total after each batch.

    Raises:
        EvaluationError: the text is too short or does not fit the model, the logits are not finite, or window and
            stride do not fit each other.
    """
    length, step, planned = plan_windows(model, tokens, window, stride)
    vocabulary = model.config.get_text_config().vocab_size
    runner = Runner(model, "the model")
    sums: list[Tensor] = []
    done = 0
    with evaluating(model):
        for batch in batches(tokens, planned, vocabulary * model.dtype.itemsize):
            nll = runner.require_finite(_batch_nll(runner(batch), batch.targets))
            sums.append(nll.sum(dim=1).cpu())
            done += batch.targets.numel()
            if progress:
                progress(done, len(tokens) - 1)
    totals = {
        "nll": torch.cat(sums).numpy(),
        "tokens": np.array([w.scored for w in planned], dtype=np.float64),
    }
    errors = bootstrap(totals, _figures, resamples=resamples, seed=seed)
    return Perplexity(
        ppl=exp(totals["nll"].sum() / totals["tokens"].sum()),
        ppl_se=errors["ppl"],
        tokens=done,
        window=length,
        stride=step,
        dtype=dtype_name(model),
        tokens_per_second=runner.tokens_per_second,
    )


def exp(mean: float) -> float:
    """Perplexity of a mean negative log-likelihood, held below overflow: a ruined model is reported, not an error."""
    return math.exp(min(float(mean), 700.0))


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype that the model computes in, without ``torch.``."""
    return str(model.dtype).removeprefix("torch.")


def _figures(totals: Mapping[str, Array]) -> dict[str, Array]:
    return {"ppl": np.exp(np.minimum(totals["nll"] / totals["tokens"], 700.0))}


def _batch_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float64 ``[windows, scored]``."""
    flat = targets.flatten().to(logits.device)
    nll = torch.empty(flat.shape, dtype=torch.float64, device=logits.device)
    for part in chunks(*logits.shape):
        log_p = logits[part].double().log_softmax(dim=-1)
        nll[part] = -log_p.gather(-1, flat[part, None]).squeeze(-1)
    return nll.view(targets.shape)
