"""One option for every group, so that the loss is least and the cost within a limit: the multiple-choice knapsack.

Pure arithmetic; what costs and losses are is the caller's business, and either may be the one that is limited.

Bound. For any λ ≥ 0 the minimum is at least ``Σ_g min_o (loss + λ·cost) - λ·limit`` (Lagrange). At the λ where the
cheapest mixture of two options meets the limit exactly this is the optimum of the linear relaxation, found on the
groups' lower convex hulls by taking their segments in the order of what they save per cost.

Search. Going through the groups, all combinations so far that nothing else dominates are kept (dynamic programming over
real costs). One is dropped as soon as even the relaxation of what follows cannot make it better than the best solution
known; the options whose reduced cost is too high for that never enter. Where more than ``most`` remain, the best of
each range of costs are kept, and the answer is within the gap that is returned instead of exact.

The relaxation and its reduction by reduced costs: Sinha and Zoltners 1979; dynamic programming with bounds over a core:
Pisinger 1995.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tenpak.errors import InfeasibleBudgetError

__all__ = ["Solution", "solve"]

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

_WORK = 12_000_000  # combinations looked at in all, which takes about a second
_FEWEST = 400
_ROUNDING = 1e-9  # what sums of losses may differ by, relative


@dataclass(frozen=True)
class Solution:
    """An option for every group.

    Attributes:
        choice: index of the option taken, per group.
        cost: of all of them, at most the limit.
        loss: of all of them.
        bound: no choice within the limit has a lower loss.
    """

    choice: tuple[int, ...]
    cost: float
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the loss may be above the least possible, relative to it; 0 where the solution is optimal."""
        if self.loss <= self.bound:
            return 0.0
        return self.loss / self.bound - 1 if self.bound > 0 else math.inf


@dataclass(frozen=True)
class _Group:
    """The options of a group that none of its others dominates, by rising cost and falling loss."""

    index: Indices  # in the caller's group
    cost: Array
    loss: Array

    def only(self, kept: NDArray[np.bool_]) -> _Group:
        return _Group(self.index[kept], self.cost[kept], self.loss[kept])


def solve(groups: Sequence[Sequence[tuple[float, float]]], limit: float) -> Solution:
    """The least loss within a limit on the cost.

    Args:
        groups: for each group its options, (cost, loss), both finite and not negative; at least one.
        limit: of the sum of costs.

    Raises:
        InfeasibleBudgetError: even the cheapest options cost more.
        ValueError: a group has no option, or a number is not finite or negative.
    """
    kept = [_undominated(group, number) for number, group in enumerate(groups)]
    least = math.fsum(group.cost[0] for group in kept)
    if least > limit:
        raise InfeasibleBudgetError(f"a limit of {limit:g} cannot be met: the cheapest options cost {least:g}")
    price, bound = _relaxed(kept, limit)
    best = _greedy(kept, limit)
    slack = _slack(kept, price, limit)
    loss = _total(kept, best)[1]
    reduced = [_reduced(group, price) for group in kept]
    core = [group.only(r <= max(loss - bound, 0.0) + slack) for group, r in zip(kept, reduced, strict=True)]
    found, exact = _search(core, limit, price, loss)
    if found is not None:
        best = [core[g].index[o] for g, o in enumerate(found)]
    else:
        best = [kept[g].index[o] for g, o in enumerate(best)]
    cost, loss = (math.fsum(groups[g][o][axis] for g, o in enumerate(best)) for axis in (0, 1))
    return Solution(tuple(int(o) for o in best), cost, loss, loss if exact else min(max(bound, 0.0), loss))


def _undominated(options: Sequence[tuple[float, float]], number: int) -> _Group:
    values = np.asarray(options, dtype=np.float64).reshape(-1, 2)
    if not len(values):
        raise ValueError(f"group {number} has no option")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"group {number} has a cost or loss that is not finite or negative")
    order = np.lexsort((values[:, 1], values[:, 0]))
    falling = np.minimum.accumulate(values[order, 1])
    kept = order[np.append(True, values[order, 1][1:] < falling[:-1])]
    return _Group(kept, values[kept, 0], values[kept, 1])


def _hull(group: _Group) -> list[int]:
    """Options on the lower convex hull."""
    hull: list[int] = []
    for o in range(len(group.cost)):
        while len(hull) > 1 and _saves(group, hull[-2], hull[-1]) <= _saves(group, hull[-2], o):
            hull.pop()
        hull.append(o)
    return hull


def _saves(group: _Group, a: int, b: int) -> float:
    """Loss saved per cost by going from option ``a`` to ``b``."""
    return float((group.loss[a] - group.loss[b]) / (group.cost[b] - group.cost[a]))


def _segments(groups: Sequence[_Group]) -> list[tuple[float, int, int, int]]:
    """Steps along all hulls, the most worthwhile first: what one saves per cost, its group, options from and to."""
    found = []
    for g, group in enumerate(groups):
        hull = _hull(group)
        found += [(_saves(group, a, b), g, a, b) for a, b in pairwise(hull)]
    # Within a group what is saved falls, so the order is right there as well.
    return sorted(found, key=lambda segment: (-segment[0], segment[1], segment[2]))


def _relaxed(groups: Sequence[_Group], limit: float) -> tuple[float, float]:
    """The price of cost at the optimum of the relaxation, and that optimum."""
    left = limit - math.fsum(group.cost[0] for group in groups)
    price = 0.0
    for saves, g, a, b in _segments(groups):
        left -= groups[g].cost[b] - groups[g].cost[a]
        if left < 0:
            price = saves
            break
    bound = math.fsum(float((group.loss + price * group.cost).min()) for group in groups) - price * limit
    return price, bound


def _greedy(groups: Sequence[_Group], limit: float) -> list[int]:
    """A good solution: segments in the order of what they save, as far as they fit."""
    choice = [0] * len(groups)
    left = limit - math.fsum(group.cost[0] for group in groups)
    for _, g, a, b in _segments(groups):
        step = groups[g].cost[b] - groups[g].cost[a]
        if choice[g] == a and step <= left:
            choice[g], left = b, left - step
    return choice


def _reduced(group: _Group, price: float) -> Array:
    """How much worse than the best of its group each option is at this price."""
    priced = group.loss + price * group.cost
    return np.asarray(priced - priced.min())


def _total(groups: Sequence[_Group], choice: Sequence[int]) -> tuple[float, float]:
    pairs = [(float(group.cost[o]), float(group.loss[o])) for group, o in zip(groups, choice, strict=True)]
    return math.fsum(cost for cost, _ in pairs), math.fsum(loss for _, loss in pairs)


def _slack(groups: Sequence[_Group], price: float, limit: float) -> float:
    """What rounding may do to a bound: differences below it do not count."""
    size = math.fsum(float(np.abs(group.loss + price * group.cost).max()) for group in groups) + price * limit
    return _ROUNDING * size


def _search(groups: Sequence[_Group], limit: float, price: float, known: float) -> tuple[list[int] | None, bool]:
    """A choice better than the known loss, None where there is none, and whether none can be better still."""
    order = sorted(range(len(groups)), key=lambda g: -float(groups[g].cost[-1] - groups[g].cost[0]))
    ordered = [groups[g] for g in order]
    rest = _Rest.of(ordered, price)
    options = sum(len(group.cost) for group in ordered)
    most = max(_WORK // max(options, 1), _FEWEST)
    slack = _slack(ordered, price, limit)
    cost, loss, exact = np.zeros(1), np.zeros(1), True
    trail: list[tuple[Indices, Indices]] = []  # per group: the combination that one came from, and its option
    best: tuple[float, int, int] | None = None  # loss, groups decided, which combination
    for n, group in enumerate(ordered):
        costs = (cost[:, None] + group.cost).ravel()
        losses = (loss[:, None] + group.loss).ravel()
        bounds = losses + price * (costs - limit) + rest.priced[n + 1]
        kept = np.flatnonzero((costs + rest.cheapest[n + 1] <= limit) & (bounds < known + slack))
        kept = kept[_front(costs[kept], losses[kept])]
        if len(kept) > most:
            exact = False
            kept = _thinned(kept, costs, bounds, most)
        cost, loss = costs[kept], losses[kept]
        trail.append((kept // len(group.cost), kept % len(group.cost)))
        done = np.where(cost + rest.cost[n + 1] <= limit, loss + rest.loss[n + 1], math.inf)
        if len(done) and done.min() < known - slack:
            known = float(done.min())
            best = known, n, int(done.argmin())
        if not len(kept):
            break
    if best is None:
        return None, exact
    return _traced(ordered, order, trail, rest.choice, best[1], best[2]), exact


@dataclass(frozen=True)
class _Rest:
    """Of the groups from a place on: sums of priced minima, of least costs, and of what is best at the price."""

    priced: Array
    cheapest: Array
    cost: Array
    loss: Array
    choice: tuple[int, ...]

    @classmethod
    def of(cls, groups: Sequence[_Group], price: float) -> _Rest:
        choice = tuple(int((group.loss + price * group.cost).argmin()) for group in groups)

        def sums(values: list[float]) -> Array:
            return np.append(np.cumsum(np.asarray(values[::-1]))[::-1], 0.0) if values else np.zeros(1)

        return cls(
            sums([float((group.loss + price * group.cost).min()) for group in groups]),
            sums([float(group.cost[0]) for group in groups]),
            sums([float(group.cost[o]) for group, o in zip(groups, choice, strict=True)]),
            sums([float(group.loss[o]) for group, o in zip(groups, choice, strict=True)]),
            choice,
        )


def _front(costs: Array, losses: Array) -> Indices:
    """Places of combinations that no other one dominates, by rising cost."""
    order = np.lexsort((losses, costs))
    falling = np.minimum.accumulate(losses[order])
    front: Indices = order[np.append(True, losses[order][1:] < falling[:-1])[: len(order)]]
    return front


def _thinned(kept: Indices, costs: Array, bounds: Array, most: int) -> Indices:
    """Of combinations by rising cost the most promising one in each of ``most`` ranges of cost."""
    values = costs[kept]
    width = (values[-1] - values[0]) / most
    ranges = np.minimum(((values - values[0]) / width).astype(np.int64), most - 1)
    order = np.lexsort((bounds[kept], ranges))
    first = np.append(True, ranges[order][1:] != ranges[order][:-1])
    thinned: Indices = kept[order[first]]
    return thinned


def _traced(
    ordered: Sequence[_Group],
    order: Sequence[int],
    trail: Sequence[tuple[Indices, Indices]],
    rest: Sequence[int],
    last: int,
    place: int,
) -> list[int]:
    """The options of a combination after group ``last``, and of those that follow the best at the price."""
    choice = [0] * len(ordered)
    for n in range(last + 1, len(ordered)):
        choice[order[n]] = rest[n]
    for n in range(last, -1, -1):
        came, option = trail[n]
        choice[order[n]] = int(option[place])
        place = int(came[place])
    return choice
