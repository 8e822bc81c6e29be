"""Budgets as users write them, and the search on functions whose answer is known."""

from __future__ import annotations

import math

import pytest

from tenpak.allocation.budget import Budget, Trial, one_budget, search
from tenpak.errors import BudgetError, InfeasibleBudgetError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("10x", Budget("ratio", 10)),
        (" 12.5 X ", Budget("ratio", 12.5)),
        ("10×", Budget("ratio", 10)),
        ("3.2bpw", Budget("bpw", 3.2)),
        ("25MB", Budget("bytes", 25e6)),
        ("1.5 GiB", Budget("bytes", 1.5 * 2**30)),
        ("300kb", Budget("bytes", 300e3)),
        ("1234B", Budget("bytes", 1234)),
        ("kl=0.01", Budget("kl", 0.01)),
        ("kl=1e-06", Budget("kl", 1e-6)),
        ("ppl=1%", Budget("ppl", 0.01)),
        ("ppl=1e-7", Budget("ppl", 1e-7)),
        ("ppl = +0.5 %", Budget("ppl", 0.005)),
        ("ppl=0.02", Budget("ppl", 0.02)),
    ],
)
def test_a_budget_is_read(text: str, budget: Budget) -> None:
    parsed = Budget.parse(text)
    assert parsed.kind == budget.kind
    assert parsed.value == pytest.approx(budget.value)
    again = Budget.parse(str(parsed))
    assert again.kind == parsed.kind
    assert again.value == pytest.approx(parsed.value)


@pytest.mark.parametrize(
    "text", ["", "10", "x", "-3x", "0x", "0bpw", "10 apples", "kl=", "kl=-1", "ppl=a%", "1e3x", "25"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="not a budget") as caught:
        Budget.parse(text)
    assert "10x" in str(caught.value.hint)


def test_bytes_of_a_budget_never_exceed_it() -> None:
    assert Budget("ratio", 10).bytes(1_000_003) == 400_001
    assert Budget("bpw", 3.2).bytes(1_000_003) == 400_001
    assert Budget("bytes", 25e6).bytes(7) == 25_000_000


def test_one_budget_of_many_options() -> None:
    nothing = {"target": None, "bpw": None, "bytes": None, "kl": None, "ppl": None}
    assert one_budget(**nothing) is None
    assert one_budget(**{**nothing, "target": "10x"}) == "10x"
    assert one_budget(**{**nothing, "bpw": 3.2}) == "3.2bpw"
    assert one_budget(**{**nothing, "bytes": "25000"}) == "25000B"
    assert one_budget(**{**nothing, "bytes": "25MB"}) == "25MB"
    assert one_budget(**{**nothing, "ppl": "1%"}) == "ppl=1%"
    with pytest.raises(BudgetError, match="several"):
        one_budget(**{**nothing, "target": "10x", "bpw": 3.0})


def halving(trial: Trial) -> float:
    return (trial.cost - 3.0) / 1.0


@pytest.mark.parametrize("start", [1e-6, 1e-3, 0.1, 10.0])
def test_a_size_is_found_from_far_away(start: float) -> None:
    """Bits fall by one for each doubling of the step, but not below zero."""

    def bits(step: float) -> float:
        return math.log2(1 + (0.5 / step) ** 1.0)

    trials = search(bits, 3.0, start, slack=lambda _: 0.005, guess=halving, most=12)
    assert 3.0 * 0.995 <= trials[-1].cost <= 3.0


def test_a_loss_is_found_as_its_square() -> None:
    def guess(trial: Trial) -> float:
        return math.log2(0.0095 / trial.cost) / 2

    trials = search(lambda step: 7 * step**2.2, 0.01, 1.0, slack=lambda _: 0.1, guess=guess)
    assert 0.009 <= trials[-1].cost <= 0.01
    assert len(trials) <= 5


def test_steps_in_the_cost_leave_the_nearest_one_below() -> None:
    """Where no step is near enough the answer is the best within the limit, and it is told last."""

    def cost(step: float) -> float:
        return 10.0 if step < 1 else 4.0

    trials = search(cost, 5.0, 0.3, slack=lambda _: 0.005, guess=lambda t: t.cost - 5, most=8)
    assert trials[-1].cost == 4.0


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"nearest that was reached is 7\b"):
        search(lambda step: 7.0, 5.0, 1.0, slack=lambda _: 0.005, guess=lambda t: 1.0, most=4)
