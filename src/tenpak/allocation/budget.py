"""What a user allows a model to cost, in bytes or in quality, and the search for the one number that reaches it.

A search is over the logarithm of that number (``knobs``), along which sizes and losses are monotonic. It is pure
arithmetic: what a value costs is asked of a function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tenpak.errors import BudgetError, InfeasibleBudgetError

__all__ = ["Budget", "Trial", "one_budget", "search"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_LOSS = r"((?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)"  # may be tiny
_LARGEST_MOVE = 12.0  # octaves of the step at once


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes:
        kind: of what: ``"bytes"`` of the weight files, ``"ratio"`` to FP32, ``"bpw"`` over all parameters, ``"kl"`` in
            nats per token, or ``"ppl"``: the relative increase of perplexity.
        value: how much.
    """

    kind: Literal["bytes", "ratio", "bpw", "kl", "ppl"]
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from ``10x``, ``3.2bpw``, ``25MB`` (or kB, GB, MiB …), ``kl=0.01`` or ``ppl=1%``.

        Raises:
            BudgetError: the text is none of these, or not positive.
        """
        words = text.strip().lower()
        found = None
        if match := re.fullmatch(_NUMBER + r"\s*[x×]", words):
            found = cls("ratio", float(match[1]))
        elif match := re.fullmatch(_NUMBER + r"\s*bpw", words):
            found = cls("bpw", float(match[1]))
        elif match := re.fullmatch(_NUMBER + r"\s*([kmg]i?)?b(?:ytes)?", words):
            found = cls("bytes", float(match[1]) * _UNITS[match[2] or ""])
        elif match := re.fullmatch(r"kl\s*=\s*" + _LOSS, words):
            found = cls("kl", float(match[1]))
        elif match := re.fullmatch(r"ppl\s*=\s*\+?" + _LOSS + r"\s*(%?)", words):
            found = cls("ppl", float(match[1]) / (100 if match[2] else 1))
        if found is None or not found.value > 0:
            raise BudgetError(
                f"{text!r} is not a budget", hint="a budget looks like 10x, 3.2bpw, 25MB, kl=0.01 or ppl=1%"
            )
        return found

    @property
    def is_size(self) -> bool:
        """Whether it limits the size; otherwise it limits the loss, which must be measured."""
        return self.kind in ("bytes", "ratio", "bpw")

    def bytes(self, parameters: int) -> int:
        """What a budget of size allows for the weight files of a model."""
        if self.kind == "ratio":
            return math.floor(4 * parameters / self.value)
        return math.floor(self.value * parameters / 8) if self.kind == "bpw" else math.floor(self.value)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        if self.kind == "bytes":
            return f"{self.value:.0f}B"
        if self.kind == "ppl":
            return f"ppl={100 * self.value:.6g}%"
        return f"kl={self.value:g}" if self.kind == "kl" else f"{self.value:g}{'x' if self.kind == 'ratio' else 'bpw'}"


def one_budget(**given: str | float | None) -> str | None:
    """The one budget among options of which each says its kind; None where none is given.

    Args:
        given: ``target`` (``"10x"``), ``bpw``, ``bytes`` (``"25MB"``), ``kl``, ``ppl`` (``"1%"``).

    Raises:
        BudgetError: there is more than one.
    """
    words = {"target": "{}", "bpw": "{}bpw", "bytes": "{}", "kl": "kl={}", "ppl": "ppl={}"}
    found = [words[kind].format(value) for kind, value in given.items() if value is not None]
    if len(found) > 1:
        raise BudgetError(f"there are several budgets: {' and '.join(found)}", hint="keep one of them")
    if found and given.get("bytes") is not None and found[0].isdigit():
        return found[0] + "B"
    return found[0] if found else None


@dataclass(frozen=True)
class Trial:
    """A value that was tried, and what it cost: bytes, KL or increase of perplexity."""

    value: float
    cost: float


def search(
    cost: Callable[[float], float],
    limit: float,
    start: float,
    *,
    slack: Callable[[Trial], float],
    guess: Callable[[Trial], float],
    most: int = 8,
) -> list[Trial]:
    """Find a value whose cost is at most ``limit`` and at least ``limit``·(1 - slack); all trials, the answer last.

    Args:
        cost: what a value costs; monotonic, as far as discrete choices allow.
        limit: never exceeded by the answer.
        start: first value.
        slack: how far below the limit is near enough, a fraction, by what the trial tells.
        guess: from a first trial, log2 of the factor by which to change the value; later the secant knows better.
        most: trials at most; the nearest one below the limit is the answer then.

    Raises:
        InfeasibleBudgetError: none of the trials is within the limit; the nearest one is told.
    """
    trials: list[Trial] = []
    value = start
    for _ in range(most):
        trials.append(Trial(value, cost(value)))
        near = slack(trials[-1])
        if limit * (1 - near) <= trials[-1].cost <= limit:
            return trials
        value = _next(trials, limit * (1 - near / 2), guess)
        if any(math.isclose(value, trial.value, rel_tol=1e-6) for trial in trials):
            break
    within = [trial for trial in trials if trial.cost <= limit]
    if not within:
        nearest = min(trials, key=lambda trial: trial.cost)
        raise InfeasibleBudgetError(
            f"the budget {limit:g} cannot be met: the nearest that was reached is {nearest.cost:g}",
            hint="allow more than that",
        )
    best = max(within, key=lambda trial: trial.cost)
    return [*(trial for trial in trials if trial is not best), best]


def _next(trials: list[Trial], goal: float, guess: Callable[[Trial], float]) -> float:
    """The secant through the trials nearest to the goal from both sides, or nearest at all."""
    last = trials[-1]
    move = guess(last)
    if len(trials) > 1:
        above = [t for t in trials if t.cost > goal]
        below = [t for t in trials if t.cost <= goal]
        if above and below:
            a, b = min(above, key=lambda t: t.cost), max(below, key=lambda t: t.cost)
        else:
            a, b = sorted(trials, key=lambda t: abs(math.log(max(t.cost, 1e-12) / goal)))[:2]
        high, low = math.log(max(a.cost, 1e-12)), math.log(max(b.cost, 1e-12))
        if high != low:
            part = (math.log(goal) - low) / (high - low)
            place = math.log2(b.value) + part * (math.log2(a.value) - math.log2(b.value))
            move = place - math.log2(last.value)
    return last.value * 2 ** min(max(move, -_LARGEST_MOVE), _LARGEST_MOVE)
