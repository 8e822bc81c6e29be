"""What is to be compressed: the source opened, its tensors placed in the model, and a codec for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenpak.allocation.allocate import DENSE
from tenpak.allocation.plan import Override, Plan, make_plan
from tenpak.allocation.saved_plan import SavedPlan
from tenpak.calibration.statistics import StatisticsFolder
from tenpak.checkpoint.source import Checkpoint, open_checkpoint, tensor_sha256
from tenpak.checkpoint.structure import Weight, bind, build_meta_model, check_coverage
from tenpak.errors import RecipeError
from tenpak.plans import planned
from tenpak.policies import Policy, apply
from tenpak.recipes import parse, parse_overrides

__all__ = ["DEFAULT_RECIPE", "Job", "open_job", "replanned"]

DEFAULT_RECIPE = "int4:g32"


@dataclass(frozen=True)
class Job:
    """A checkpoint, its transformers configuration, and the plan, with recipe and overrides that it was made from."""

    checkpoint: Checkpoint
    config: Any
    plan: Plan
    recipe: str
    overrides: tuple[str, ...]


def open_job(
    source: str | Path,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    policy: Policy | str | None = None,
    plan: str | Path | None = None,
    statistics: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Job:
    """Open a model and plan its compression; reads headers only, and weights that are stored twice.

    Where no recipe is given it is ``DEFAULT_RECIPE``, the policy's own, or ``dense`` with a plan (a file). What policy
    or plan decide comes before the overrides that are given, which win; some policies read every weight, or the
    statistics (a folder), and a plan is compared with the weights that it was made for. ``progress`` is told of what a
    policy reads.

    Raises:
        RecipeError: the recipe, an override or the policy cannot be used.
        AllocationError: the plan cannot be read, or is not one for this model.
        CheckpointError: the source cannot be read or is not a decoder-only language model.
        CalibrationError: the policy needs statistics, and these cannot be used.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    if plan is not None and (recipe is not None or policy is not None):
        raise RecipeError(
            f"a plan gives every tensor a recipe and excludes a {'policy' if recipe is None else 'recipe'}",
            hint="leave out one of them; --set PATTERN=RECIPE still decides for single tensors",
        )
    saved = None if plan is None else SavedPlan.read(plan)
    if recipe is None:
        recipe = DEFAULT_RECIPE if policy is None else policy.default_recipe
        recipe = DENSE if saved is not None else recipe
    parse(recipe), parse_overrides(overrides)  # mistakes are told before anything is opened
    checkpoint = open_checkpoint(source, revision=revision)
    model = build_meta_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    weights = bind(model, checkpoint.tensors)
    check_coverage(model, weights)
    weights = tuple(_settle_tie(checkpoint, weight) for weight in weights)
    if policy is not None:
        known = None if statistics is None else StatisticsFolder(statistics)
        overrides = (*apply(policy, weights, checkpoint, recipe, known, progress), *overrides)
    if saved is not None:
        overrides = (*planned(saved, weights, checkpoint), *overrides)
    return Job(checkpoint, model.config, _planned(weights, recipe, overrides), recipe, tuple(overrides))


def replanned(job: Job, recipe: str, overrides: Sequence[str]) -> Job:
    """The same model with another recipe and other overrides. Raises as ``open_job`` does."""
    plan = _planned([entry.weight for entry in job.plan.entries], recipe, overrides)
    return replace(job, plan=plan, recipe=recipe, overrides=tuple(overrides))


def _planned(weights: Sequence[Weight], recipe: str, overrides: Sequence[str]) -> Plan:
    parsed = [Override(pattern, codec) for pattern, codec in parse_overrides(overrides)]
    return make_plan(weights, parse(recipe), parsed)


def _settle_tie(checkpoint: Checkpoint, weight: Weight) -> Weight:
    """A weight that is tied on paper but stored with other values is a parameter of its own."""
    if weight.tied_to is None:
        return weight
    same = len({tensor_sha256(checkpoint.read(name)) for name in (weight.name, weight.tied_to)}) == 1
    return weight if same else replace(weight, tied_to=None)
