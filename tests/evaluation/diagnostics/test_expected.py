"""Expected costs: near the measured ones in every family, and no traces left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tenpak.evaluation.diagnostics.bill import measure_bill
from tenpak.evaluation.diagnostics.expected import expected_costs


def compared(pair, names: Callable[[str], bool]) -> tuple[np.ndarray, np.ndarray]:
    """Expected and measured costs of the tensors of these names."""
    expected = {name: cost for name, cost in expected_costs(pair).items() if names(name)}
    measured = measure_bill(pair, expected, len(expected)).tensors
    return np.array([expected[name] for name in measured]), np.array(list(measured.values()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_expected_costs_are_near_measured_ones(family: str, talker) -> None:
    expected, measured = compared(talker(family).open(window=32), lambda name: True)
    # 16 windows: single tensors are off by 35 %, their logarithms by somewhat more; the mean over many by far less.
    ratios = np.log(expected / measured)
    assert abs(ratios.mean()) < 0.5
    assert ratios.std() < 0.8
    assert spearmanr(expected, measured)[0] > 0.8


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_so_are_those_of_experts_in_the_last_block(family: str, talker) -> None:
    """Those before a router cost more: a token that changes its expert is no small error."""
    pair = talker(family).open(window=32)
    last = {name for name, weight in pair.weights.items() if weight.kind == "expert" and ".layers.1." in name}
    expected, measured = compared(pair, last.__contains__)
    assert len(expected) >= 2
    assert abs(np.log(expected / measured).mean()) < 0.8


def test_the_model_is_left_as_it_was(talker) -> None:
    pair = talker().open()
    for parameter in pair.original.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    before = {name: value.clone() for name, value in pair.original.state_dict().items()}
    state = torch.get_rng_state()
    first = expected_costs(pair)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == expected_costs(pair)
    assert all(torch.equal(value, before[name]) for name, value in pair.original.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (p.ndim == 1) for p in pair.original.parameters())
    assert not pair.original.training


def test_an_exact_tensor_is_expected_to_cost_nothing(talker) -> None:
    pair = talker(overrides=("*.up_proj=fp32",)).open()
    expected = expected_costs(pair)
    assert {name for name, cost in expected.items() if cost == 0} == {n for n in expected if "up_proj" in n}
