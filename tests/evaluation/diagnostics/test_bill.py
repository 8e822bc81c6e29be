"""Costs of single tensors: those that ``fidelity`` measures on a model made by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tenpak.evaluation import fidelity
from tenpak.evaluation.diagnostics.bill import costliest, measure_bill
from tenpak.evaluation.diagnostics.expected import expected_costs


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_oss"])
def test_costs_are_those_of_fidelity(family: str, talker) -> None:
    pair = talker(family, recipe="int2:g32").open(window=32)
    names = list(pair.artifact.manifest.weights)
    before = {name: value.clone() for name, value in pair.original.state_dict().items()}
    bill = measure_bill(pair, dict.fromkeys(names, 1.0), len(names))
    assert set(bill.tensors) == set(names)
    options = {"window": 32, "stride": 32}
    assert bill.kl == pytest.approx(fidelity(pair.original, pair.compressed, pair.tokens, **options).kl, rel=1e-6)
    for name in names[:4]:
        changed = copy.deepcopy(pair.original)
        with torch.no_grad():
            changed.get_parameter(pair.weights[name].parameter).copy_(pair.artifact.decode(name))
        kl = fidelity(pair.original, changed, pair.tokens, **options).kl
        assert kl > 1e-9
        assert bill.tensors[name] == pytest.approx(kl, rel=1e-6)
    after = pair.original.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_whole_is_measured_where_no_tensor_is(talker) -> None:
    pair = talker(recipe="int2:g32").open()
    bill = measure_bill(pair, expected_costs(pair), 0)
    assert bill.tensors == {}
    assert bill.kl > 1e-6


def test_the_costliest_come_first_and_what_is_not_finite_before_them() -> None:
    expected = {"a": 0.1, "b": math.nan, "c": 0.3, "d": 0.2}
    assert costliest(expected, 3) == ["b", "c", "d"]
    assert costliest(expected, 9) == ["b", "c", "d", "a"]
    assert costliest(expected, 0) == []


def test_a_broken_tensor_has_no_cost_and_no_traces(talker, monkeypatch) -> None:
    pair = talker().open()
    name = "model.layers.0.mlp.up_proj.weight"
    before = pair.original.get_parameter(name).clone()
    monkeypatch.setattr(type(pair.artifact), "decode", lambda self, name: torch.full(before.shape, math.nan))
    bill = measure_bill(pair, {name: 1.0}, 1)
    assert math.isnan(bill.tensors[name])
    assert math.isfinite(bill.kl)
    assert torch.equal(pair.original.get_parameter(name), before)


def test_progress_counts_all_passes(talker) -> None:
    calls = []
    measure_bill(talker().open(), {"model.layers.0.mlp.up_proj.weight": 1.0}, 1, lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2]
