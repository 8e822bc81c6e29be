"""The solver against exhaustive search on small problems, and against its own bound on large ones."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenpak.allocation import solver
from tenpak.allocation.solver import solve
from tenpak.errors import InfeasibleBudgetError

COSTS = st.integers(0, 12).map(float)
LOSSES = st.sampled_from([0.0, 1e-9, 0.1, 0.1 + 1e-12, 0.25, 0.3, 1.0, 7.0]) | st.floats(0, 10)
GROUPS = st.lists(st.lists(st.tuples(COSTS, LOSSES), min_size=1, max_size=5), max_size=5)


def exhaustive(groups: list[list[tuple[float, float]]], limit: float) -> float | None:
    choices = itertools.product(*groups)
    losses = [math.fsum(o[1] for o in choice) for choice in choices if sum(o[0] for o in choice) <= limit]
    return min(losses, default=None)


@settings(max_examples=400, deadline=None)
@given(groups=GROUPS, limit=st.integers(0, 50).map(float))
def test_small_problems_are_solved_exactly(groups: list[list[tuple[float, float]]], limit: float) -> None:
    best = exhaustive(groups, limit)
    if best is None:
        with pytest.raises(InfeasibleBudgetError, match="cheapest options cost"):
            solve(groups, limit)
        return
    found = solve(groups, limit)
    chosen = [group[option] for group, option in zip(groups, found.choice, strict=True)]
    assert found.cost == sum(cost for cost, _ in chosen) <= limit
    assert found.loss == math.fsum(loss for _, loss in chosen)
    assert found.loss == pytest.approx(best, rel=1e-7, abs=1e-7)
    assert found.gap <= 1e-7


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, limit=st.integers(0, 50).map(float))
def test_a_thinned_search_stays_within_its_gap(groups: list[list[tuple[float, float]]], limit: float) -> None:
    """With room for two combinations only the answer may be worse than the best, but never than it says."""
    best = exhaustive(groups, limit)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "_WORK", 0)
        patch.setattr(solver, "_FEWEST", 2)
        found = solve(groups, limit)
    assert found.cost <= limit
    assert found.bound <= best + 1e-7
    assert best <= found.loss + 1e-7


def large(rough: bool) -> list[list[tuple[float, float]]]:
    """A thousand tensors with forty candidates, rates from one to eight bits."""
    random = np.random.default_rng(0)
    groups = []
    for _ in range(1000):
        size, importance = float(random.integers(1, 200)) * 65536, math.exp(2 * random.normal())
        bits = np.sort(random.uniform(1, 8, 40)) if rough else np.linspace(1, 8, 40)
        noise = random.uniform(0.7, 1.4, 40) if rough else np.ones(40)
        groups.append(
            [
                (float(int(size * b / 8)), float(1e-9 * importance * size * 4.0**-b * n))
                for b, n in zip(bits, noise, strict=True)
            ]
        )
    return groups


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("bits", [2.0, 3.5])
def test_a_thousand_tensors_take_a_moment(rough: bool, bits: float) -> None:
    groups = large(rough)
    limit = sum(group[-1][0] for group in groups) * bits / 8
    started = time.process_time()
    found = solve(groups, limit)
    assert time.process_time() - started < 2
    assert found.cost <= limit
    assert found.gap <= 1e-3


def test_what_all_fits_is_taken() -> None:
    found = solve([[(1.0, 5.0), (9.0, 0.0)], [(2.0, 0.5)]], 100.0)
    assert found.choice == (1, 0)
    assert found.gap == 0


def test_nothing_to_choose() -> None:
    assert solve([], 0.0).choice == ()


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf), (-1.0, 0.0), (0.0, -1.0)])
def test_what_is_no_cost_or_loss_is_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="group 1"):
        solve([[(1.0, 1.0)], [(1.0, 2.0), pair]], 5.0)
    with pytest.raises(ValueError, match="no option"):
        solve([[]], 5.0)
