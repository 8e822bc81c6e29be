"""A profile and a budget to a plan: rules narrow the candidates, the solver chooses among what is left.

Budgets of size count what the files will hold: payloads, what stays dense, and headers, whose length depends a little
on what is chosen, so the solver is asked again until the files fit. Budgets of quality limit the predicted loss; that a
plan keeps what was predicted is for a measurement to say.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenpak.allocation.budget import Budget
from tenpak.allocation.plan import matches
from tenpak.allocation.profile import Option, Profile, ProfiledTensor
from tenpak.allocation.saved_plan import PlannedTensor, SavedPlan
from tenpak.allocation.solver import Solution, solve
from tenpak.artifact.schema import CODES_SUFFIX
from tenpak.artifact.writer import MAX_SHARD_BYTES, predicted_bytes
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.codecs.trellis import Trellis
from tenpak.errors import AllocationError, InfeasibleBudgetError
from tenpak.recipes import parse

__all__ = ["DENSE", "Rules", "allocate", "files_bytes", "finest", "smallest"]

DENSE = "dense"
_ROUNDS = 6


@dataclass(frozen=True)
class Rules:
    """What a plan must respect; patterns are those of ``--set``.

    Attributes:
        pins: (pattern, recipe): nothing else for these tensors.
        bans: (pattern, recipe): not this one.
        least: (pattern, bits): never below so many bits per weight.
        fused: queries, keys and values of a block share a recipe, and so do gate and up, as engines fuse them.
    """

    pins: tuple[tuple[str, str], ...] = ()
    bans: tuple[tuple[str, str], ...] = ()
    least: tuple[tuple[str, float], ...] = ()
    fused: bool = False

    @property
    def patterns(self) -> list[str]:
        """All patterns."""
        return [pattern for rules in (self.pins, self.bans, self.least) for pattern, _ in rules]


def allocate(
    profile: Profile, budget: Budget, rules: Rules | None = None, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> SavedPlan:
    """The plan with the least predicted loss within a budget of size, or the least bytes within one of quality.

    Args:
        profile: what candidates take and cost.
        budget: of size, or of quality: KL, or an increase of perplexity, taken for e^KL - 1.
        rules: what the plan must respect.
        max_shard_bytes: weight files are split above this size.

    Raises:
        InfeasibleBudgetError: no choice meets the budget; states the nearest that does, and its plan in short.
        AllocationError: rules contradict each other or the profile, or the profile has no candidates.
    """
    groups = _grouped(profile, rules or Rules())
    if not groups:
        raise AllocationError("the profile holds no tensor with candidates", hint="profile the model again")
    if budget.is_size:
        return _by_size(profile, groups, budget, max_shard_bytes)
    return _by_loss(profile, groups, budget, max_shard_bytes)


def smallest(profile: Profile, rules: Rules | None = None, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Size of the weight files of the smallest plan there is. Raises AllocationError as ``allocate`` does."""
    return files_bytes(profile, _least(_grouped(profile, rules or Rules()), 0), max_shard_bytes)


def finest(profile: Profile, rules: Rules | None = None, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Size of the weight files of the plan that is predicted to lose least. Raises as ``smallest`` does."""
    return files_bytes(profile, _least(_grouped(profile, rules or Rules()), 1), max_shard_bytes)


def files_bytes(profile: Profile, chosen: Mapping[str, Option], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Size of the weight files with these options; tensors that are not named stay dense."""
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    narrow = any(isinstance(parse(recipe), Trellis) for recipe in {option.recipe for option in chosen.values()})
    for tensor in profile.tensors:
        option = chosen.get(tensor.name)
        if option is None or option.recipe == DENSE:
            if narrow and tensor.narrowed is not None:
                size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.narrowed]
                rows.append((tensor.name, tensor.narrowed, tensor.shape, size))
            else:
                rows.append((tensor.name, tensor.dtype, tensor.shape, tensor.bytes))
        else:
            rows.append((tensor.name + CODES_SUFFIX, "U8", (option.bytes,), option.bytes))
    return predicted_bytes(rows, max_shard_bytes)


@dataclass(frozen=True)
class _Together:
    """Tensors that share a recipe, and for each recipe their options."""

    tensors: tuple[ProfiledTensor, ...]
    options: tuple[tuple[Option, ...], ...]

    def totals(self) -> list[tuple[float, float]]:
        """Bytes and loss of each recipe."""
        return [(float(sum(o.bytes for o in options)), math.fsum(o.loss for o in options)) for options in self.options]


def _by_size(profile: Profile, groups: Sequence[_Together], budget: Budget, shard: int) -> SavedPlan:
    limit = budget.bytes(profile.source.parameters)
    totals = [group.totals() for group in groups]
    _require_feasible(profile, groups, budget, limit, shard)
    room = float(limit)
    found: tuple[Solution, dict[str, Option], int] | None = None
    for _ in range(_ROUNDS):
        try:
            solution = solve(totals, room)
        except InfeasibleBudgetError:
            break  # headers took what was left; what fitted before, if anything, is the answer
        chosen = _chosen(groups, solution.choice)
        size = files_bytes(profile, chosen, shard)
        if size <= limit and (found is None or solution.loss < found[0].loss):
            found = solution, chosen, size
        other = limit - (size - solution.cost)  # what headers and dense tensors leave
        if other == room:
            break
        room = other
    if found is None:
        chosen = _least(groups, 0)  # fits, as was seen before
        loss = math.fsum(option.loss for option in chosen.values())
        found = Solution((), 0.0, loss, 0.0), chosen, files_bytes(profile, chosen, shard)
    solution, chosen, size = found
    return _saved(profile, budget, chosen, size, solution.loss, solution.bound)


def _by_loss(profile: Profile, groups: Sequence[_Together], budget: Budget, shard: int) -> SavedPlan:
    limit = budget.value if budget.kind == "kl" else math.log1p(budget.value)
    _require_feasible(profile, groups, budget, limit, shard)
    solution = solve([[(loss, size) for size, loss in group.totals()] for group in groups], limit)
    chosen = _chosen(groups, solution.choice)
    size = files_bytes(profile, chosen, shard)
    return _saved(profile, budget, chosen, size, solution.cost, solution.bound + size - solution.loss)


def _saved(
    profile: Profile, budget: Budget, chosen: Mapping[str, Option], size: int, loss: float, bound: float
) -> SavedPlan:
    return SavedPlan(
        source=profile.source.name,
        source_sha256=profile.source.sha256,
        budget=str(budget),
        bytes=size,
        loss=loss,
        bound=max(bound, 0.0),
        tensors=tuple(
            PlannedTensor(name=name, recipe=option.recipe, bytes=option.bytes, loss=option.loss)
            for name, option in chosen.items()
        ),
    )


def _chosen(groups: Sequence[_Together], choice: Sequence[int]) -> dict[str, Option]:
    """Tensor → its option, in the order of the groups."""
    return {
        tensor.name: option
        for group, number in zip(groups, choice, strict=True)
        for tensor, option in zip(group.tensors, group.options[number], strict=True)
    }


def _least(groups: Sequence[_Together], axis: int) -> dict[str, Option]:
    """The fewest bytes (axis 0) or the least loss (1) that there is, and the least of the other that goes with it."""
    choice = []
    for group in groups:
        pairs = [(pair[axis], pair[1 - axis]) for pair in group.totals()]
        choice.append(pairs.index(min(pairs)))
    return _chosen(groups, choice)


def _require_feasible(profile: Profile, groups: Sequence[_Together], budget: Budget, limit: float, shard: int) -> None:
    """Raise InfeasibleBudgetError where even the least that there is is beyond the limit."""
    least = _least(groups, 0 if budget.is_size else 1)
    size, loss = files_bytes(profile, least, shard), math.fsum(option.loss for option in least.values())
    if (size if budget.is_size else loss) <= limit:
        return
    plan = ", ".join(f"{recipe} for {n}" for recipe, n in Counter(o.recipe for o in least.values()).most_common())
    ratio = 4 * profile.source.parameters / size
    what = "smallest" if budget.is_size else "best"
    raise InfeasibleBudgetError(
        f"{budget} cannot be met with these candidates and rules: the {what} takes {size:,} bytes, {ratio:.2f}x "
        f"smaller than FP32, at a predicted loss of {loss:.3g} nats per token ({plan} tensors)",
        hint="choose a budget on the near side of that, or add "
        + ("smaller" if budget.is_size else "finer")
        + " candidates",
    )


# Rules ---------------------------------------------------------------------------------------------------------------


def _grouped(profile: Profile, rules: Rules) -> list[_Together]:
    """Tensors that share a recipe, with the recipes that the rules leave to all of them."""
    able = [tensor for tensor in profile.tensors if tensor.options]
    for pattern in rules.patterns:
        if not any(matches(pattern, tensor.name) for tensor in able):
            near = difflib.get_close_matches(pattern.strip("*."), [tensor.name for tensor in able], n=2, cutoff=0.3)
            hint = f"near: {', '.join(near)}" if near else f"names look like {able[0].name!r}" if able else None
            raise AllocationError(f"{pattern!r} matches no tensor of the profile that has candidates", hint=hint)
    together: dict[str, list[ProfiledTensor]] = {}
    keys = {tensor.group: tensor.fused for tensor in able if rules.fused and tensor.fused is not None}
    for tensor in able:
        together.setdefault(keys.get(tensor.group) or tensor.group, []).append(tensor)
    return [_narrowed(tensors, rules) for tensors in together.values()]


def _narrowed(tensors: Sequence[ProfiledTensor], rules: Rules) -> _Together:
    """The recipes that every one of these tensors may have."""
    pinned: dict[str, tuple[str, str]] = {}  # recipe → pattern and tensor
    left: list[str] | None = None
    for tensor in tensors:
        pins = [(pattern, recipe) for pattern, recipe in rules.pins if matches(pattern, tensor.name)]
        pinned |= {recipe: (pattern, tensor.name) for pattern, recipe in pins}
        allowed = [option.recipe for option in tensor.options if _allowed(option, tensor, rules)]
        left = allowed if left is None else [recipe for recipe in left if recipe in allowed]
    if len(pinned) > 1:
        (a, (first, name)), (b, (second, other)) = list(pinned.items())[:2]
        where = f"{name!r}" if name == other else f"{name!r} and {other!r}, which share a recipe,"
        raise AllocationError(
            f"{where} cannot be both {a} (by {first!r}) and {b} (by {second!r})", hint="keep one of the pins"
        )
    assert left is not None  # no group is empty
    recipes = [recipe for recipe in left if not pinned or recipe in pinned]
    if not recipes:
        known = ", ".join(dict.fromkeys(option.recipe for tensor in tensors for option in tensor.options))
        wanted = f"the pin {next(iter(pinned))} and " if pinned else ""
        raise AllocationError(
            f"{wanted}the rules leave no candidate for {tensors[0].name!r}"
            + (f" and the {len(tensors) - 1} tensors that share its recipe" if len(tensors) > 1 else ""),
            hint=f"it was profiled with {known}; relax a rule, or profile the recipe as well",
        )
    by_name = [{option.recipe: option for option in tensor.options} for tensor in tensors]
    return _Together(tuple(tensors), tuple(tuple(options[recipe] for options in by_name) for recipe in recipes))


def _allowed(option: Option, tensor: ProfiledTensor, rules: Rules) -> bool:
    if any(option.recipe == recipe and matches(pattern, tensor.name) for pattern, recipe in rules.bans):
        return False
    bits = 8 * option.bytes / math.prod(tensor.shape)
    return all(bits >= least for pattern, least in rules.least if matches(pattern, tensor.name))
