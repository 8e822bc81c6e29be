"""Meeting a budget: a search over the one number that a knob turns.

A knob (``knobs``) is the step of the flagship codec, or the room that an allocation among candidates may fill.
Statistics of the original model are collected once. A budget of size is met by whole passes, whose sizes are those of
the files; the pass that fits is tuned (``recovery``), which may add a little. A budget of quality is met by artifacts
that are tuned, written, reloaded and measured.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenpak.allocation.budget import Budget, Trial
from tenpak.allocation.budget import search as find
from tenpak.allocation.plan import PlanEntry, stored_rows
from tenpak.artifact.writer import predicted_bytes
from tenpak.errors import BudgetError, InfeasibleBudgetError
from tenpak.job import Job
from tenpak.recovery import recover
from tenpak.report.report import Report
from tenpak.task import Progress, Task, encode_all
from tenpak.work import Work, run_key

__all__ = ["SLACK", "Found", "Knob", "Measure", "Search", "dial", "infeasible", "promise", "report_of", "written_bytes"]

SLACK = 0.005  # a size within half a per cent below the budget is near enough
_QUALITY_SLACK = 0.05
_ROUNDS = 3


class Knob(ABC):
    """The one number that a search turns; sizes and losses are monotonic in it, as far as discrete choices allow."""

    @abstractmethod
    def job(self, job: Job) -> Job:
        """The job as it is calibrated, before the knob has a value."""

    @abstractmethod
    def at(self, task: Task, value: float) -> Task:
        """The task at a value."""

    @abstractmethod
    def start(self, search: Search, budget: Budget) -> tuple[float, float]:
        """A value near the budget, and for one of size the bytes that tuning may add, to begin with.

        Raises:
            InfeasibleBudgetError: no value meets the budget; states the nearest that can be reached.
        """

    @abstractmethod
    def turn(self, search: Search, trial: Trial, goal: float, *, size: bool) -> float:
        """From a first trial, log2 of the factor by which to change the value for its cost to become ``goal``."""

    def bytes(self, value: float, max_shard_bytes: int) -> int | None:
        """Exact size of the weight files at a value; None where only coding can tell."""
        return None


@dataclass(frozen=True)
class Measure:
    """A measured loss.

    Attributes:
        cost: KL, or increase of perplexity.
        error: its standard error, where there is one.
        tokens: that it was measured on.
        quality: all that was measured, as ``tenpak evaluate --json`` prints it.
        files: SHA-256 of the files that were measured, by name; files that hash the same need no second measurement.
    """

    cost: float
    error: float | None
    tokens: int
    quality: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """What a search works with.

    Attributes:
        task: the job as the knob wants it calibrated.
        root: the work folder of the whole search; each pass has its own within it.
        measure: writes an artifact of a pass and measures it: its KL, or increase of perplexity.
        steps: of tuning; 0 for none.
        max_shard_bytes: of weight files.
        progress: as in ``pipeline.compress``.
    """

    task: Task
    root: Work
    measure: Callable[[Task, Work], Measure]
    steps: int
    max_shard_bytes: int
    progress: Progress | None = None

    def encoded(self, task: Task, stack: ExitStack) -> Work:
        """The work of a pass, which stays open as long as ``stack``."""
        what = {"recipe": task.job.recipe, "overrides": list(task.job.overrides)}
        work = stack.enter_context(self.root.inner(run_key(what)[:16], what))
        encode_all(task, work, self.progress, statistics=self.root.folder / "statistics")
        return work

    def tuned(self, task: Task, units: Work, name: str, stack: ExitStack) -> Work:
        """The work of a finished pass after tuning, which stays open as long as ``stack``; as it is without steps."""
        if not self.steps:
            return units
        more = {**units.run, "tuning": self.steps}
        into = stack.enter_context(self.root.inner(f"{name}-tuned-{self.steps}", more))
        recover(task, units, into, self.steps, self.progress)
        return into


@dataclass(frozen=True)
class Found:
    """The answer: the task at its value, the trials that led to it, and what the last one was measured to be."""

    task: Task
    trials: tuple[Trial, ...]
    measure: Measure | None = None


def dial(search: Search, knob: Knob, budget: Budget, stack: ExitStack) -> tuple[Found, Work]:
    """Search for a value; the work of its pass is complete and stays open as long as ``stack``.

    Raises:
        InfeasibleBudgetError: no value meets the budget; states the nearest that can be reached.
        BudgetError: the budget is below the noise of the text that it is measured on.
    """
    # Several values may stand for one plan.
    passes: dict[tuple[str, ...], Work] = {}
    after: dict[Path, Work] = {}

    def encoded(value: float) -> tuple[Task, Work]:
        task = knob.at(search.task, value)
        key = (task.job.recipe, *task.job.overrides)
        if key not in passes:
            passes[key] = search.encoded(task, stack)
        return task, passes[key]

    def tuned(value: float) -> tuple[Task, Work]:
        task, work = encoded(value)
        if work.folder not in after:
            after[work.folder] = search.tuned(task, work, work.folder.name, stack)
        return task, after[work.folder]

    if budget.is_size:
        trials, measure = _by_size(search, knob, budget, encoded, tuned), None
    else:
        trials, measure = _by_quality(search, knob, budget, tuned)
    task, work = tuned(trials[-1].value)
    return Found(task, tuple(trials), measure), work


Pass = Callable[[float], tuple[Task, Work]]
"""Gives the work of a pass at a value, and the task at it."""


def _by_size(search: Search, knob: Knob, budget: Budget, encoded: Pass, tuned: Pass) -> list[Trial]:
    """Trials of which the last one meets a budget of size.

    What tuning adds is known after it, so the search may take rounds; trials before the last one of a round count what
    the round before has added.
    """
    limit, shard = budget.bytes(search.task.job.plan.parameters), search.max_shard_bytes
    value, added = knob.start(search, budget)
    tried: list[Trial] = []
    met: list[Trial] = []
    for _ in range(_ROUNDS):

        def size(value: float, added: float = added) -> float:
            known = knob.bytes(value, shard)
            return (written_bytes(*encoded(value), shard) if known is None else known) + added

        def turn(trial: Trial) -> float:
            return knob.turn(search, trial, limit * (1 - SLACK / 2), size=True)

        *others, last = find(size, limit, value, slack=lambda _: SLACK, guess=turn)
        value = last.value
        real = Trial(value, written_bytes(*tuned(value), shard))
        tried += [*others, real]
        if real.cost <= limit:
            met.append(real)
        if limit * (1 - SLACK) <= real.cost <= limit or real.cost == last.cost:
            break
        added += real.cost - last.cost
    if not met:
        raise infeasible(search, budget, min(trial.cost for trial in tried))
    best = max(met, key=lambda trial: trial.cost)
    return [*(trial for trial in tried if trial is not best), best]


def _by_quality(search: Search, knob: Knob, budget: Budget, tuned: Pass) -> tuple[list[Trial], Measure]:
    """Trials of which the last one meets a budget of quality, and its measure.

    From below, and near enough where the difference is within a standard error or five per cent.
    """
    found: dict[float, Measure] = {}
    known: dict[Path, Measure] = {}

    def cost(value: float) -> float:
        task, work = tuned(value)
        if work.folder not in known:
            known[work.folder] = search.measure(task, work)
            _require_audible(budget, known[work.folder])
        found[value] = known[work.folder]
        return found[value].cost

    def slack(trial: Trial) -> float:
        return min(max(_QUALITY_SLACK, (found[trial.value].error or 0.0) / budget.value), 0.5)

    def turn(trial: Trial) -> float:
        goal = budget.value * (1 - slack(trial) / 2)
        return knob.turn(search, trial, goal, size=False)

    start, _ = knob.start(search, budget)
    trials = find(cost, budget.value, start, slack=slack, guess=turn)
    return trials, found[trials[-1].value]


def _require_audible(budget: Budget, found: Measure) -> None:
    """Raise BudgetError where the text cannot tell a loss at the limit from none."""
    if found.error is not None and found.error > budget.value and found.cost < 2 * found.error:
        tokens = math.ceil(found.tokens * (2 * found.error / budget.value) ** 2)
        raise BudgetError(
            f"the budget {budget} is below the noise of the evaluation text: a loss of {found.cost:.2g} is known to "
            f"± {found.error:.2g} from its {found.tokens:,} tokens",
            hint=f"give a text of about {tokens:,} tokens, or a KL budget, which needs far less",
        )


def written_bytes(task: Task, work: Work, max_shard_bytes: int) -> int:
    """Size of the weight files that a finished pass will be written to."""

    def bits(number: int, entry: PlanEntry) -> int | None:
        unit = work.get(number, entry.weight.name)
        return None if unit is None else sum(payload.bits for payload in unit.payloads)

    return predicted_bytes(stored_rows(task.job.plan, bits), max_shard_bytes)


def infeasible(search: Search, budget: Budget, reached: float) -> InfeasibleBudgetError:
    """The error that states the nearest size that can be reached."""
    parameters = search.task.job.plan.parameters
    return InfeasibleBudgetError(
        f"{budget} cannot be met by this model: the nearest that can be reached is about {reached:,.0f} bytes, "
        f"{4 * parameters / reached:.2f}x smaller than FP32",
        hint="choose a budget on the near side of that; what stays dense counts, see `tenpak inspect`",
    )


def promise(report: Report, budget: Budget) -> dict[str, Any]:
    """What was promised and what the written artifact was measured to be: ``limit``, ``reached`` and ``kept``."""
    if budget.is_size:
        limit, reached = float(budget.bytes(report.parameters)), float(report.bytes)
    else:
        quality = report.quality or {}
        limit, reached = budget.value, quality.get("kl" if budget.kind == "kl" else "ppl_increase", math.inf)
    return {"limit": limit, "reached": reached, "kept": reached <= limit}


def report_of(found: Found, budget: Budget) -> dict[str, Any]:
    """What the report tells of a search."""
    about: dict[str, Any] = {
        "budget": str(budget),
        "trials": [{"value": trial.value, "cost": trial.cost} for trial in found.trials],
    }
    if found.measure is not None and found.measure.error:
        # To tell differences of five per cent of the budget apart.
        needed = found.measure.tokens * (found.measure.error / (_QUALITY_SLACK * budget.value)) ** 2
        about |= {
            "error": found.measure.error,
            "tokens": found.measure.tokens,
            "tokens_for_5_percent": math.ceil(needed),
        }
    return about
