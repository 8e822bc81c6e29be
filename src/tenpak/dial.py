"""The dial: the step of the flagship codec with which a model meets a budget.

One number, ``step``, sets the rate of every tensor (``codecs.trellis``), so meeting a budget is a search over it.
Statistics of the original model are collected once. For a budget of size the search runs on rates that are cheap to
know (tensors encoded for the original model's inputs; of large models a sample of them), then on whole passes, whose
sizes are those of the files. A budget of quality is met by artifacts that are written, reloaded and measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from tenpak.allocation.budget import Budget, Trial, search
from tenpak.allocation.plan import PlanEntry, stored_rows
from tenpak.artifact.writer import predicted_bytes
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.codecs.trellis import Trellis
from tenpak.encoding import Numbered, encode_entries
from tenpak.errors import InfeasibleBudgetError
from tenpak.job import Job, replanned
from tenpak.task import Progress, Task, encode_all, numbered, statistics_of
from tenpak.work import Work

__all__ = ["Dialled", "Found", "dial", "dialled_job", "report_of", "written_bytes"]

_SLACK = 0.005  # a size within half a per cent below the budget is near enough
_QUALITY_SLACK = 0.1
_SAMPLE = 20_000_000  # weights that the first search encodes at most
_FINEST = 12.0  # bits per weight, beyond which no step is tried
_FIRST_LOSS = 0.02  # nats per token: where the search for a size starts


@dataclass(frozen=True)
class Dialled:
    """What a search needs besides the task.

    Attributes:
        task: the job at any step, see ``dialled_job``.
        budget: what is to be met.
        root: the work folder of the whole search; each step has its own within it.
        measure: writes an artifact of a pass and measures it: its KL, or increase of perplexity.
        max_shard_bytes: of weight files.
        progress: as in ``pipeline.compress``.
    """

    task: Task
    budget: Budget
    root: Work
    measure: Callable[[Task, Work], float]
    max_shard_bytes: int
    progress: Progress | None = None


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


def dial(found: Dialled, stack: ExitStack) -> tuple[Found, Work]:
    """Search for the step; the work of its pass is complete and stays open as long as ``stack``.

    Raises:
        InfeasibleBudgetError: no step meets the budget; states the nearest that can be reached.
    """
    parameters = found.task.job.plan.parameters
    passes: dict[float, tuple[Task, Work]] = {}

    def encoded(step: float) -> tuple[Task, Work]:
        if step not in passes:
            task = _at(found.task, step)
            work = stack.enter_context(found.root.inner(f"{step!r}", {"step": step}))
            encode_all(task, work, found.progress, statistics=found.root.folder / "statistics")
            passes[step] = task, work
        return passes[step]

    if found.budget.is_size:
        limit = found.budget.bytes(parameters)
        start = _first_step(found, limit)
        coded = sum(item.entry.weight.numel for item in _turned(found.task))

        def size(step: float) -> float:
            return written_bytes(*encoded(step), found.max_shard_bytes)

        def octaves(trial: Trial) -> float:
            return 8 * (trial.cost - limit * (1 - _SLACK / 2)) / coded

        trials = search(size, limit, start, slack=_SLACK, guess=octaves)
    else:
        # Nats per weight are about step²/10; perplexity grows about as its logarithm does.
        start = math.sqrt(10 * found.budget.value / parameters)
        goal = found.budget.value * (1 - _QUALITY_SLACK / 2)
        trials = search(
            lambda step: found.measure(*encoded(step)),
            found.budget.value,
            start,
            slack=_QUALITY_SLACK,
            guess=lambda trial: math.log2(goal / max(trial.cost, goal / 64)) / 2,
        )
    task, work = encoded(trials[-1].step)
    return Found(task, tuple(trials)), work


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


def _first_step(found: Dialled, limit: int) -> float:
    """A step whose size is about ``limit`` bytes, from a sample of tensors without propagation.

    Raises:
        InfeasibleBudgetError: the limit is below what the dense tensors and headers take, or beyond the finest step.
    """
    items = _turned(found.task)
    if not items:
        raise InfeasibleBudgetError(
            f"{found.budget} cannot be met: --set gives every tensor a codec of its own",
            hint="leave some tensors to the budget, or give no budget",
        )
    coded = sum(item.entry.weight.numel for item in items)
    sample = _sampled(items)
    scale = coded / sum(item.entry.weight.numel for item in sample)
    folder = found.root.folder / "statistics"
    lookup = statistics_of(found.task, folder, found.progress) if found.task.calibrated else None
    with found.root.inner("empty", {"step": None}) as empty:
        dense = written_bytes(found.task, empty, found.max_shard_bytes)
    dense -= sum(item.entry.weight.numel * DTYPE_BYTES[item.entry.weight.dtype] for item in items)

    def size(step: float) -> float:
        task = _at(found.task, step)
        chosen = {item.number for item in sample}
        with found.root.inner(f"sample-{step!r}", {"step": step}) as work:
            left = [item for item in numbered(task.job) if item.number in chosen]
            encode_entries(task.job.checkpoint, left, work, lookup)
            units = [work.get(item.number, item.entry.weight.name) for item in left]
            bits = sum(payload.bits for unit in units if unit is not None for payload in unit.payloads)
            work.remove()
        return dense + scale * bits / 8

    least, most = size(1e5), dense + coded * _FINEST / 8
    for reached, impossible in ((least, limit < least), (most, limit > most)):
        if impossible:
            raise _infeasible(found, reached)
    start = math.sqrt(10 * _FIRST_LOSS / coded) if found.task.calibrated else 0.02
    trials = search(
        size,
        limit,
        start,
        slack=2 * _SLACK,
        guess=lambda trial: 8 * (trial.cost - limit) / coded,
        most=12,
    )
    return trials[-1].step


def _infeasible(found: Dialled, reached: float) -> InfeasibleBudgetError:
    parameters = found.task.job.plan.parameters
    return InfeasibleBudgetError(
        f"{found.budget} cannot be met by this model: the nearest that can be reached is about {reached:,.0f} bytes, "
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
