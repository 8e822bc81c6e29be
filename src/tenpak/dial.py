"""The dial: the step of the flagship codec with which a model meets a budget.

One number, ``step``, sets the rate of every tensor (``codecs.trellis``), so meeting a budget is a search over it.
Statistics of the original model are collected once. For a budget of size the search runs on rates that are cheap to
know (tensors encoded for the original model's inputs; of large models a sample of them), then on whole passes, whose
sizes are those of the files. The pass that fits is tuned (``recovery``), which adds a little. A budget of quality is
met by artifacts that are tuned, written, reloaded and measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tenpak.allocation.budget import Budget, Trial
from tenpak.allocation.budget import search as find
from tenpak.allocation.plan import PlanEntry, stored_rows
from tenpak.artifact.writer import predicted_bytes
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.codecs.trellis import Trellis
from tenpak.encoding import Numbered, encode_entries
from tenpak.errors import InfeasibleBudgetError
from tenpak.job import Job, replanned
from tenpak.recovery import recover
from tenpak.task import Progress, Task, encode_all, numbered, statistics_of
from tenpak.work import Work

__all__ = ["Found", "Search", "dial", "dialled_job", "report_of", "written_bytes"]

_SLACK = 0.005  # a size within half a per cent below the budget is near enough
_QUALITY_SLACK = 0.1
_SAMPLE = 20_000_000  # weights that the first search encodes at most
_FINEST = 12.0  # bits per weight, beyond which no step is tried
_TUNED_BITS = 2  # that tuning adds for each row and column, to begin with
_ROUNDS = 3
_FIRST_LOSS = 0.02  # nats per token: where the search for a size starts


@dataclass(frozen=True)
class Search:
    """What a search works with.

    Attributes:
        task: the job at any step, see ``dialled_job``.
        root: the work folder of the whole search; each step has its own within it.
        measure: writes an artifact of a pass and measures it: its KL, or increase of perplexity.
        steps: of tuning; 0 for none.
        max_shard_bytes: of weight files.
        progress: as in ``pipeline.compress``.
    """

    task: Task
    root: Work
    measure: Callable[[Task, Work], float]
    steps: int
    max_shard_bytes: int
    progress: Progress | None = None

    def encoded(self, step: float, stack: ExitStack) -> tuple[Task, Work]:
        """The task at a step, and the work of its pass, which stays open as long as ``stack``."""
        task = _at(self.task, step)
        work = stack.enter_context(self.root.inner(f"{step!r}", {"step": step}))
        encode_all(task, work, self.progress, statistics=self.root.folder / "statistics")
        return task, work

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
    """The answer: the task at its step, and the trials that led to it."""

    task: Task
    trials: tuple[Trial, ...]


def dialled_job(job: Job, step: float, *, calibrated: bool) -> Job:
    """The job with the flagship codec at a step for every matrix, embeddings and head included.

    Overrides of the user still win; the recipe that is recorded does the same when given by hand.
    """
    recipe = f"trellis:{step!r}" + ("" if calibrated else ":datafree")
    kept = [entry for entry in job.overrides if not entry.startswith("*=trellis:")]
    return replanned(job, recipe, (f"*={recipe}", *kept))


def dial(search: Search, budget: Budget, stack: ExitStack) -> tuple[Found, Work]:
    """Search for the step; the work of its pass is complete and stays open as long as ``stack``.

    Raises:
        InfeasibleBudgetError: no step meets the budget; states the nearest that can be reached.
    """

    @cache
    def encoded(step: float) -> tuple[Task, Work]:
        return search.encoded(step, stack)

    @cache
    def tuned(step: float) -> tuple[Task, Work]:
        task, work = encoded(step)
        return task, search.tuned(task, work, f"{step!r}", stack)

    trials = _by_size(search, budget, encoded, tuned) if budget.is_size else _by_quality(search, budget, tuned)
    task, work = tuned(trials[-1].step)
    return Found(task, tuple(trials)), work


Pass = Callable[[float], tuple[Task, Work]]
"""Gives the work of a step's pass, and the task at that step."""


def _by_size(search: Search, budget: Budget, encoded: Pass, tuned: Pass) -> list[Trial]:
    """Trials of which the last one meets a budget of size.

    What tuning adds is known after it, so the search may take rounds; trials before the last one of a round count what
    the round before has added.
    """
    limit = budget.bytes(search.task.job.plan.parameters)
    items = _turned(search.task)
    coded = sum(item.entry.weight.numel for item in items)
    added = _TUNED_BITS * sum(sum(item.entry.weight.matrix_shape) for item in items) / 8 if search.steps else 0.0
    step = _first_step(search, budget, limit - added)
    tried: list[Trial] = []
    met: list[Trial] = []
    for _ in range(_ROUNDS):

        def size(step: float, added: float = added) -> float:
            return written_bytes(*encoded(step), search.max_shard_bytes) + added

        def octaves(trial: Trial) -> float:
            return 8 * (trial.cost - limit * (1 - _SLACK / 2)) / coded

        *others, last = find(size, limit, step, slack=_SLACK, guess=octaves)
        step = last.step
        real = Trial(step, written_bytes(*tuned(step), search.max_shard_bytes))
        tried += [*others, real]
        if real.cost <= limit:
            met.append(real)
        if limit * (1 - _SLACK) <= real.cost <= limit:
            break
        added += real.cost - last.cost
    if not met:
        raise _infeasible(search, budget, min(trial.cost for trial in tried))
    best = max(met, key=lambda trial: trial.cost)
    return [*(trial for trial in tried if trial is not best), best]


def _by_quality(search: Search, budget: Budget, tuned: Pass) -> list[Trial]:
    """Trials of which the last one meets a budget of quality."""
    # Nats per weight are about step²/10; perplexity grows about as its logarithm does.
    start = math.sqrt(10 * budget.value / search.task.job.plan.parameters)
    goal = budget.value * (1 - _QUALITY_SLACK / 2)
    return find(
        lambda step: search.measure(*tuned(step)),
        budget.value,
        start,
        slack=_QUALITY_SLACK,
        guess=lambda trial: math.log2(goal / max(trial.cost, goal / 64)) / 2,
    )


def written_bytes(task: Task, work: Work, max_shard_bytes: int) -> int:
    """Size of the weight files that a finished pass will be written to."""

    def bits(number: int, entry: PlanEntry) -> int | None:
        unit = work.get(number, entry.weight.name)
        return None if unit is None else sum(payload.bits for payload in unit.payloads)

    return predicted_bytes(stored_rows(task.job.plan, bits), max_shard_bytes)


def _at(task: Task, step: float) -> Task:
    return replace(task, job=dialled_job(task.job, step, calibrated=task.calibrated))


def _turned(task: Task) -> list[Numbered]:
    """The tensors whose rate the dial sets."""
    return [item for item in numbered(task.job) if isinstance(item.entry.codec, Trellis)]


def _first_step(search: Search, budget: Budget, limit: float) -> float:
    """A step whose size is about ``limit`` bytes, from a sample of tensors without propagation.

    Raises:
        InfeasibleBudgetError: the limit is below what the dense tensors and headers take, or beyond the finest step.
    """
    items = _turned(search.task)
    if not items:
        raise InfeasibleBudgetError(
            f"{budget} cannot be met: --set gives every tensor a codec of its own",
            hint="leave some tensors to the budget, or give no budget",
        )
    coded = sum(item.entry.weight.numel for item in items)
    sample = _sampled(items)
    scale = coded / sum(item.entry.weight.numel for item in sample)
    folder = search.root.folder / "statistics"
    lookup = statistics_of(search.task, folder, search.progress) if search.task.calibrated else None
    with search.root.inner("empty", {"step": None}) as empty:
        dense = written_bytes(search.task, empty, search.max_shard_bytes)
    dense -= sum(item.entry.weight.numel * DTYPE_BYTES[item.entry.weight.dtype] for item in items)

    def size(step: float) -> float:
        task = _at(search.task, step)
        chosen = {item.number for item in sample}
        with search.root.inner(f"sample-{step!r}", {"step": step}) as work:
            left = [item for item in numbered(task.job) if item.number in chosen]
            encode_entries(task.job.checkpoint, left, work, lookup)
            units = [work.get(item.number, item.entry.weight.name) for item in left]
            bits = sum(payload.bits for unit in units if unit is not None for payload in unit.payloads)
            work.remove()
        return dense + scale * bits / 8

    least, most = size(1e5), dense + coded * _FINEST / 8
    for reached, impossible in ((least, limit < least), (most, limit > most)):
        if impossible:
            raise _infeasible(search, budget, reached)
    start = math.sqrt(10 * _FIRST_LOSS / coded) if search.task.calibrated else 0.02
    trials = find(
        size,
        limit,
        start,
        slack=2 * _SLACK,
        guess=lambda trial: 8 * (trial.cost - limit) / coded,
        most=12,
    )
    return trials[-1].step


def _infeasible(search: Search, budget: Budget, reached: float) -> InfeasibleBudgetError:
    parameters = search.task.job.plan.parameters
    return InfeasibleBudgetError(
        f"{budget} cannot be met by this model: the nearest that can be reached is about {reached:,.0f} bytes, "
        f"{4 * parameters / reached:.2f}x smaller than FP32",
        hint="choose a budget on the near side of that; what stays dense counts, see `tenpak inspect`",
    )


def _sampled(items: Sequence[Numbered]) -> list[Numbered]:
    """Every n-th tensor, so that they are not too many weights; of small models all."""
    total = sum(item.entry.weight.numel for item in items)
    return list(items[:: max(math.ceil(total / _SAMPLE), 1)])


def report_of(found: Found, budget: Budget) -> dict[str, Any]:
    """What the report tells of a search."""
    return {"budget": str(budget), "trials": [{"step": t.step, "cost": t.cost} for t in found.trials]}
