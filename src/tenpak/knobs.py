"""The knobs that a search turns: the step of the flagship codec, and the room that an allocation may fill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tenpak.allocation.allocate import DENSE, allocate, finest, smallest
from tenpak.allocation.budget import Budget, Trial
from tenpak.allocation.budget import search as find
from tenpak.allocation.plan import stored_rows
from tenpak.allocation.profile import Profile
from tenpak.allocation.saved_plan import SavedPlan
from tenpak.artifact.writer import MAX_SHARD_BYTES, predicted_bytes
from tenpak.codecs.trellis import Trellis
from tenpak.dial import SLACK, Knob, Search, infeasible
from tenpak.encoding import Numbered, encode_entries
from tenpak.errors import InfeasibleBudgetError
from tenpak.job import Job, replanned
from tenpak.plans import overriding
from tenpak.profiling import Candidates, fixed_by, observed, profiled
from tenpak.recipes import parse
from tenpak.task import Task, counter, numbered, statistics_of

__all__ = ["Room", "Step", "dialled_job"]

_SAMPLE = 20_000_000  # weights that the first search for a step encodes at most
_FINEST = 12.0  # bits per weight, beyond which no step is tried
_TUNED_BITS = 2  # that tuning adds for each row and column, to begin with
_FIRST_LOSS = 0.02  # nats per token: where the search for a size starts


@dataclass(frozen=True)
class Step(Knob):
    """The step of the flagship codec (``codecs.trellis``), one number that sets the rate of every tensor.

    For a budget of size the search starts on rates that are cheap to know: tensors encoded for the original model's
    inputs; of large models a sample of them.

    Attributes:
        calibrated: whether there are statistics.
    """

    calibrated: bool = True

    def job(self, job: Job) -> Job:
        return dialled_job(job, 1.0, calibrated=self.calibrated)

    def at(self, task: Task, value: float) -> Task:
        return replace(task, job=dialled_job(task.job, value, calibrated=task.calibrated))

    def start(self, search: Search, budget: Budget) -> tuple[float, float]:
        if not budget.is_size:
            # Nats per weight are about step²/10; perplexity grows about as its logarithm does.
            return math.sqrt(10 * budget.value / search.task.job.plan.parameters), 0.0
        items = _turned(search.task)
        added = _TUNED_BITS * sum(sum(item.entry.weight.matrix_shape) for item in items) / 8 if search.steps else 0.0
        return self._first(search, budget, budget.bytes(search.task.job.plan.parameters) - added, items), added

    def turn(self, search: Search, trial: Trial, goal: float, *, size: bool) -> float:
        if size:
            # An octave of the step is about a bit.
            return 8 * (trial.cost - goal) / sum(item.entry.weight.numel for item in _turned(search.task))
        return math.log2(goal / max(trial.cost, goal / 64)) / 2

    def _first(self, search: Search, budget: Budget, limit: float, items: Sequence[Numbered]) -> float:
        """A step whose size is about ``limit`` bytes, from a sample of tensors without propagation.

        Raises:
            InfeasibleBudgetError: the limit is below what dense tensors and headers take, or beyond the finest step.
        """
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
        # What the step does not change; what --set gives a codec whose rate only coding can tell counts nothing yet.
        rows = stored_rows(
            search.task.job.plan,
            lambda _, entry: 0 if isinstance(entry.codec, Trellis) else entry.estimated_bits or 0,
        )
        dense = predicted_bytes(rows, search.max_shard_bytes)

        def size(step: float) -> float:
            task = self.at(search.task, step)
            chosen = {item.number for item in sample}
            with search.root.inner(f"sample-{step!r}", {"step": step}) as work:
                left = [item for item in numbered(task.job) if item.number in chosen]
                encode_entries(task.job.checkpoint, left, work, lookup, counter(left, search.progress, "searching"))
                units = [work.get(item.number, item.entry.weight.name) for item in left]
                bits = sum(payload.bits for unit in units if unit is not None for payload in unit.payloads)
                work.remove()
            return dense + scale * bits / 8

        least, most = size(1e5), dense + coded * _FINEST / 8
        for reached, impossible in ((least, limit < least), (most, limit > most)):
            if impossible:
                raise infeasible(search, budget, reached)
        start = math.sqrt(10 * _FIRST_LOSS / coded) if search.task.calibrated else 0.02
        trials = find(
            size,
            limit,
            start,
            slack=lambda _: 2 * SLACK,
            guess=lambda trial: 8 * (trial.cost - limit) / coded,
            most=12,
        )
        return trials[-1].value


@dataclass
class Room(Knob):
    """The bytes that an allocation among candidates may fill; the profile that it is made from is taken at the start.

    Attributes:
        original: the job before anything was planned for it; its overrides decide for their tensors.
        candidates: what the others may get.
    """

    original: Job
    candidates: Candidates
    _profile: Profile | None = field(default=None, init=False)
    _shard_bytes: int = field(default=MAX_SHARD_BYTES, init=False)

    def job(self, job: Job) -> Job:
        return observed(job)

    def at(self, task: Task, value: float) -> Task:
        weights = [entry.weight for entry in self.original.plan.entries]
        recipes = {tensor.name: tensor.recipe for tensor in self._plan(value).tensors}
        return replace(task, job=replanned(self.original, DENSE, overriding(weights, recipes)))

    def start(self, search: Search, budget: Budget) -> tuple[float, float]:
        fixed = fixed_by(self.original)
        self._profile = profiled(search.task, self.candidates, fixed, search.root, search.progress)
        self._shard_bytes = search.max_shard_bytes
        try:
            plan = allocate(self._profile, budget, max_shard_bytes=self._shard_bytes)
        except InfeasibleBudgetError:
            if budget.is_size:
                raise
            # What the best plan loses is only predicted; measuring it decides.
            return float(finest(self._profile, max_shard_bytes=self._shard_bytes)), 0.0
        assert plan.bytes is not None  # it was made just now
        parameters = search.task.job.plan.parameters
        return float(budget.bytes(parameters) if budget.is_size else plan.bytes), 0.0

    def turn(self, search: Search, trial: Trial, goal: float, *, size: bool) -> float:
        if size:
            return math.log2(goal / trial.cost)
        bits = 8 * trial.value / search.task.job.plan.parameters
        more = math.log2(max(trial.cost, goal / 64) / goal) / 2  # a bit more is a quarter of the loss
        return math.log2(max(1 + more / bits, 0.25))

    def bytes(self, value: float, max_shard_bytes: int) -> int | None:
        plan = self._plan(value)
        weights = {entry.weight.name: entry.weight for entry in self.original.plan.entries}
        for tensor in plan.tensors:
            codec = parse(tensor.recipe)
            if codec is not None and codec.estimate_bits(weights[tensor.name].matrix_shape) is None:
                return None
        return plan.bytes

    def _plan(self, value: float) -> SavedPlan:
        """The plan that fills a room; the smallest where even that does not fit in."""
        profile, shard = self._profile, self._shard_bytes
        assert profile is not None  # a search starts before it turns
        least = smallest(profile, max_shard_bytes=shard)
        return allocate(profile, Budget("bytes", max(value, least)), max_shard_bytes=shard)


def dialled_job(job: Job, step: float, *, calibrated: bool) -> Job:
    """The job with the flagship codec at a step for every matrix, embeddings and head included.

    Overrides of the user still win; the recipe that is recorded does the same when given by hand.
    """
    recipe = f"trellis:{step!r}" + ("" if calibrated else ":datafree")
    kept = [entry for entry in job.overrides if not entry.startswith("*=trellis:")]
    return replanned(job, recipe, (f"*={recipe}", *kept))


def _turned(task: Task) -> list[Numbered]:
    """The tensors whose rate the dial sets."""
    return [item for item in numbered(task.job) if isinstance(item.entry.codec, Trellis)]


def _sampled(items: Sequence[Numbered]) -> list[Numbered]:
    """Every n-th tensor, so that they are not too many weights; of small models all."""
    total = sum(item.entry.weight.numel for item in items)
    return list(items[:: max(math.ceil(total / _SAMPLE), 1)])
