"""Running a model over the windows of a text, a batch of equal windows at a time.

Only the logits of scored positions are asked for (``logits_to_keep``, which every family but a few offers), so the head
of a window that slides by S runs S times, not L. Nothing outlives its batch. The logits of a batch stay below
256 MiB unless a single window's are more; what is computed from them goes in chunks of positions (``chunks``) of 64 MiB
in float64, since vocabularies reach 256 k and a log-softmax needs several copies.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenpak.calibration.text import Window, context_length, windows
from tenpak.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Batch", "Progress", "Runner", "batches", "chunks", "evaluating", "plan_windows"]

Progress = Callable[[int, int], None]
"""Called with the tokens scored so far and their total."""

_LOGITS_BYTES = 256 * 2**20
_CHUNK_BYTES = 64 * 2**20
_BATCH_TOKENS = 4096
_FEW_WINDOWS = 10


def plan_windows(
    model: PreTrainedModel, tokens: Tensor, window: int | None, stride: int | None
) -> tuple[int, int, list[Window]]:
    """Window, stride and the windows themselves, after checking that the text can be evaluated.

    Args:
        model: its configuration gives the default window.
        tokens: int64 ``[tokens]``.
        window: inputs per window; None for the model's context, at most 4096. Shortened to the text.
        stride: None for min(512, window // 2).

    Raises:
        EvaluationError: the text is too short, holds ids that the model does not know, or the arguments do not fit.
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise EvaluationError(f"tokens must be int64 [tokens], got {tokens.dtype} {tuple(tokens.shape)}")
    if len(tokens) < 2:
        raise EvaluationError(
            f"a text of {len(tokens)} tokens cannot be evaluated: the first has no context", hint="give a longer text"
        )
    vocabulary = model.config.get_text_config().vocab_size
    low, high = (int(v) for v in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary:
        raise EvaluationError(
            f"the text holds token {high if high >= vocabulary else low}, the model knows 0 … {vocabulary - 1}",
            hint="use the tokenizer that came with the model",
        )
    length = min(context_length(model.config) if window is None else window, len(tokens) - 1)
    if window is not None and window < 1:
        raise EvaluationError(f"a window of {window} tokens is not possible", hint="give at least 1")
    step = max(1, min(512, length // 2)) if stride is None else stride
    if step < 1 or (window is not None and step > window):
        raise EvaluationError(
            f"stride {step} does not fit window {window}: tokens would be skipped",
            hint="give a stride of 1 … window, or none",
        )
    step = min(step, length)
    planned = list(windows(len(tokens), length, step))
    if len(planned) < _FEW_WINDOWS:
        warnings.warn(
            f"the text of {len(tokens)} tokens gives only {len(planned)} windows: "
            "the figures are noisy and their standard errors unreliable; give a longer text",
            stacklevel=3,
        )
    return length, step, planned


@dataclass(frozen=True)
class Batch:
    """Equal windows that go through a model together.

    Attributes:
        inputs: int64 ``[windows, length]``.
        targets: int64 ``[windows, scored]``, the tokens that the last ``scored`` positions predict.
    """

    inputs: Tensor
    targets: Tensor


def batches(tokens: Tensor, planned: list[Window], row_bytes: int) -> Iterator[Batch]:
    """The windows in order, in batches of equal length and equally many scored targets.

    Args:
        tokens: int64 ``[tokens]``.
        planned: the windows.
        row_bytes: bytes of the logits of one position.
    """
    for (length, scored), group in groupby(planned, key=lambda w: (w.stop - w.start, w.scored)):
        equal = list(group)
        size = max(1, min(_BATCH_TOKENS // length, _LOGITS_BYTES // (scored * row_bytes)))
        for begin in range(0, len(equal), size):
            part = equal[begin : begin + size]
            yield Batch(
                torch.stack([tokens[w.start : w.stop] for w in part]),
                torch.stack([tokens[w.stop + 1 - scored : w.stop + 1] for w in part]),
            )


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices of positions whose float64 logits stay below 64 MiB (one position at least)."""
    size = max(1, _CHUNK_BYTES // (8 * vocabulary))
    for begin in range(0, positions, size):
        yield slice(begin, min(begin + size, positions))


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put the models in evaluation mode without gradients, and back."""
    modes = [(model, model.training) for model in models]
    try:
        for model in models:
            model.train(False)
        with torch.inference_mode():
            yield
    finally:
        for model, training in modes:
            model.train(training)


class Runner:
    """A model with a clock: gives logits of scored positions and counts what that took.

    Args:
        model: a causal language model.
        role: how errors name it, e.g. ``"the original"``.
    """

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        self.model = model
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.name = f"{role} ({name})"
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._read = 0
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Input tokens (the overlap of windows included) per second of forward passes; scoring is not counted."""
        return self._read / max(self._seconds, 1e-9)

    def __call__(self, batch: Batch) -> Tensor:
        """Logits of the scored positions in the model's dtype, ``[windows x scored, vocabulary]``."""
        scored = batch.targets.shape[1]
        inputs = batch.inputs.to(self.model.device)
        options = {"logits_to_keep": scored} if self._keeps else {}
        self._synchronize()
        start = time.perf_counter()
        logits: Tensor = self.model(input_ids=inputs, use_cache=False, **options).logits
        self._synchronize()
        self._seconds += time.perf_counter() - start
        self._read += inputs.numel()
        return logits[:, -scored:].flatten(0, 1)

    def require_finite(self, nll: Tensor) -> Tensor:
        """The negative log-likelihoods as they are.

        Raises:
            EvaluationError: one is not finite, because the model's logits are not.
        """
        if not torch.isfinite(nll).all():
            raise EvaluationError(
                f"{self.name} gives NaN or infinite logits",
                hint="load it in float32 or bfloat16; if it stays, the weights are damaged",
            )
        return nll

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
