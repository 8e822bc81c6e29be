"""Distillation: knobs of a compressed model turned so that its predictions come nearer to the original's.

The loss is KL(original ‖ compressed) in nats per token on windows of the calibration text, its gradient by the logits
(q - p per token) made directly, in chunks: a vocabulary may be large. Adam (Kingma and Ba 2015) with a cosine decay.
What a file cannot hold is not learnt: between steps a knob is rounded as it will be stored, while Adam goes on from
the exact value. The last windows of the text are held out; the values that did best on them win, and no progress on
them ends it.

The windows of a step are run a few at a time, one thread each, and their gradients are added in order, so the result
does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenpak.calibration.skeleton import Skeleton
from tenpak.evaluation.windowing import chunks
from tenpak.kernels.parallel import one_thread, ordered_map

__all__ = ["MOST_HELD_OUT", "STEP_TOKENS", "Knob", "Trace", "distil", "divergence", "split_windows"]

STEP_TOKENS = 2048
_PART_TOKENS = 512  # of a step run at a time
_LONGEST_WINDOW = 1024
_HELD_OUT = 1 / 16  # of the windows, at most as many tokens as these
MOST_HELD_OUT = 8192
_CHECK = 40  # steps between looks at what is held out
_PATIENCE = 3  # looks without progress
_BETAS, _EPSILON = (0.9, 0.99), 1e-10
_WARM_UP = 10


@dataclass(frozen=True)
class Knob:
    """A parameter of the compressed model.

    Attributes:
        parameter: FP32, in the model; requires a gradient.
        rounded: its value as it will be stored.
        rate: how much a step changes a value at most, about.
    """

    parameter: Tensor
    rounded: Callable[[Tensor], Tensor]
    rate: float


@dataclass(frozen=True)
class Trace:
    """What a distillation came to.

    Attributes:
        held_out: (steps done, KL in nats per token on the windows that were held out), the first one at 0 steps.
        best: steps after which the values were the best ones, which the knobs have now.
        tokens: read per step.
    """

    held_out: tuple[tuple[int, float], ...]
    best: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {"held_out": [list(point) for point in self.held_out], "best": self.best, "tokens": self.tokens}


def split_windows(tokens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Windows to learn from and windows held out, int64 ``[windows, window]``; both empty where a text has too few."""
    length = min(window, _LONGEST_WINDOW)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    held_out = min(math.ceil(len(windows) * _HELD_OUT), max(MOST_HELD_OUT // length, 1))
    if len(windows) - held_out < 1:
        return windows[:0], windows[:0]
    return windows[:-held_out], windows[-held_out:]


def distil(
    student: Skeleton,
    teacher: Skeleton,
    knobs: Sequence[Knob],
    learning: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Turn ``knobs`` of ``student`` towards ``teacher``; they are left at their best values.

    Args:
        student: the compressed model, all of it loaded.
        teacher: the original, all of it loaded.
        knobs: what is tuned.
        learning: windows to learn from, int64 ``[windows, window]``.
        held_out: windows that decide, int64 ``[windows, window]``.
        steps: at most this many, each of about 2048 tokens.
        seed: of the order of windows.
        progress: called with steps done and in all.
    """
    exact = [knob.parameter.detach().clone() for knob in knobs]
    first, second = [torch.zeros_like(value) for value in exact], [torch.zeros_like(value) for value in exact]
    order = _Order(learning, seed)
    _set(knobs, exact)
    trace = [(0, divergence(student, teacher, held_out))]
    best = 0, [value.clone() for value in exact]
    for step in range(1, steps + 1):
        gradients = _gradients(student, teacher, knobs, order.next())
        decay = min(step / _WARM_UP, 1) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        with one_thread():
            for number, (knob, gradient) in enumerate(zip(knobs, gradients, strict=True)):
                first[number].lerp_(gradient, 1 - _BETAS[0])
                second[number].lerp_(gradient.square(), 1 - _BETAS[1])
                mean = first[number] / (1 - _BETAS[0] ** step)
                deviation = (second[number] / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
                exact[number] -= decay * knob.rate * mean / deviation
            _set(knobs, exact)
        if step % _CHECK == 0 or step == steps:
            trace.append((step, divergence(student, teacher, held_out)))
            if trace[-1][1] < min(loss for _, loss in trace[:-1]):
                best = step, [value.clone() for value in exact]
            elif len([1 for at, _ in trace if at > best[0]]) >= _PATIENCE:
                break
        if progress is not None:
            progress(step, steps)
    _set(knobs, best[1])
    return Trace(tuple(trace), best[0], order.size * learning.shape[1])


def divergence(student: Skeleton, teacher: Skeleton, windows: Tensor) -> float:
    """Mean KL(teacher ‖ student) over all positions of windows, in nats."""

    def work(part: Tensor) -> float:
        with torch.no_grad():
            return _compared(teacher.run(part, None, None), student.run(part, None, None), None)

    return sum(ordered_map(work, _parts(windows))) / windows.numel()


def _gradients(student: Skeleton, teacher: Skeleton, knobs: Sequence[Knob], windows: Tensor) -> list[Tensor]:
    """Of the mean KL over the positions of windows, for each knob."""
    parameters = [knob.parameter for knob in knobs]

    def work(part: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            wanted = teacher.run(part, None, None)
        with torch.enable_grad():
            logits = student.run(part, None, None)
        _compared(wanted, logits.detach(), wanted)
        return torch.autograd.grad(logits, parameters, wanted, allow_unused=True)

    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for gradients in ordered_map(work, _parts(windows)):
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return [total / windows.numel() for total in totals]


def _compared(wanted: Tensor, found: Tensor, gradient: Tensor | None) -> float:
    """The sum of KL over positions; its gradient by the logits found goes to ``gradient``, which may be ``wanted``."""
    wanted, found = wanted.flatten(0, -2), found.flatten(0, -2)
    target = None if gradient is None else gradient.view(wanted.shape)
    total = 0.0
    for part in chunks(*wanted.shape):
        log_p, log_q = wanted[part].log_softmax(-1), found[part].log_softmax(-1)
        p = log_p.exp()
        if target is None:
            total += float((p * (log_p - log_q)).sum(dtype=torch.float64))
        else:
            torch.sub(log_q.exp_(), p, out=target[part])
    return total


def _parts(windows: Tensor) -> list[Tensor]:
    return list(torch.split(windows, max(_PART_TOKENS // windows.shape[1], 1)))


def _set(knobs: Sequence[Knob], exact: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for knob, value in zip(knobs, exact, strict=True):
            knob.parameter.copy_(knob.rounded(value))


class _Order:
    """Batches of windows, each window once before any comes again."""

    def __init__(self, windows: Tensor, seed: int) -> None:
        self.size = min(max(STEP_TOKENS // windows.shape[1], 1), len(windows))
        self._windows, self._left = windows, torch.zeros(0, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        if len(self._left) < self.size:
            self._left = torch.randperm(len(self._windows), generator=self._generator)
        chosen, self._left = self._left[: self.size], self._left[self.size :]
        return self._windows[chosen]
