"""The rules by which a diagnosis is put into words."""

from __future__ import annotations

import dataclasses
import math

from tenpak.evaluation.diagnostics.activations import Activations, Culprit, Layer
from tenpak.evaluation.diagnostics.bill import Bill
from tenpak.evaluation.diagnostics.generation import Generation
from tenpak.evaluation.diagnostics.verdict import NOTHING, judge
from tenpak.evaluation.diagnostics.weights import TensorFigures

LAYERS = tuple(Layer(f"b.{n}", n, 0.99, 1.0, 0.1, 0.1, 5.0, 5.0, 0.0, 0.0) for n in range(3))
QUIET = Activations("e", 0.01, LAYERS, None)
TENSOR = TensorFigures("a", (100, 80), 1, "int4:g32", 5000, 32000, 5.0, 0.1, 3.0, 0.0, 50.0, 80, ((0.5, 0.7),), False)
WEIGHTS = tuple(dataclasses.replace(TENSOR, name=name) for name in "abcdef")
EVEN = dict.fromkeys("abcdef", 0.002)
TALK = Generation("Once upon a time", "x", "y", 3, 0.1, 0.2, 0.8, 0.8)


def verdict(activations=QUIET, weights=WEIGHTS, expected=EVEN, generation=(TALK,), kl=0.012, same=True, **measured):
    bill = Bill(kl, measured, dict(expected))
    return judge(activations, weights, bill, generation, artifact_bytes=100_000, same_source=same)


def only(found: tuple[str, ...]) -> str:
    assert len(found) == 1, found
    return found[0]


def test_nothing_stands_out() -> None:
    assert verdict() == (NOTHING,)
    assert verdict(a=0.002, b=0.0055) == (NOTHING,)
    assert verdict(expected=dict.fromkeys("abcdef", 1e-5), kl=6e-5, a=1e-4) == (NOTHING,)  # all of it is tiny


def test_a_tensor_that_costs_more_per_byte_gets_more_bits() -> None:
    found = only(verdict(a=0.007))
    assert found.startswith("more bits for a: ")
    assert "0.007 nats per token, 3.5 times the median" in found
    small = dataclasses.replace(TENSOR, name="a", bytes=1000)
    assert only(verdict(weights=(small, *WEIGHTS[1:]), a=0.002)).startswith("more bits for a: ")


def test_heavy_tails_are_mentioned() -> None:
    spiky = dataclasses.replace(TENSOR, name="a", kurtosis=40.0)
    assert "kurtosis 40" in only(verdict(weights=(spiky, *WEIGHTS[1:]), a=0.007))


def test_an_expected_cost_alone_gets_no_bits() -> None:
    assert verdict(expected={**EVEN, "a": 0.01}) == (NOTHING,)


def test_a_small_tensor_that_costs_most_is_to_be_left() -> None:
    small = dataclasses.replace(TENSOR, name="a", dense_bytes=14_000)
    found = only(verdict(weights=(small, *WEIGHTS[1:]), a=0.05))
    assert found.startswith("leave a uncompressed: ")
    assert "83% of all" in found
    assert "adds 9.0% to the bytes" in found
    assert only(verdict(a=0.05)).startswith("more bits for a: ")  # leaving it would take 27 % more


def test_a_tensor_that_breaks_the_model_is_to_be_left() -> None:
    assert "a uncompressed" in only(verdict(a=math.nan))


def test_a_tensor_that_costs_next_to_nothing_can_do_with_less() -> None:
    found = only(verdict(expected={**EVEN, "c": 0.0001}))
    assert found.startswith("fewer bits would do for c: ")
    assert "5,000 bytes" in found
    thin = dataclasses.replace(TENSOR, name="c", bits_per_weight=2.5)
    assert verdict(weights=(*WEIGHTS[:2], thin, *WEIGHTS[3:]), expected={**EVEN, "c": 0.0001}) == (NOTHING,)


def test_long_lists_are_cut() -> None:
    names = [f"t{n}" for n in range(30)]
    weights = [dataclasses.replace(TENSOR, name=name) for name in names]
    expected = {name: 1e-6 if n < 12 else 0.002 for n, name in enumerate(names)}
    found = verdict(weights=weights, expected=expected)
    assert len(found) == 9
    assert found[-1] == "fewer bits would do for 4 more tensors"


def test_a_rough_whole_without_a_culprit() -> None:
    assert "the whole is rough, 0.3 nats" in only(verdict(kl=0.3))
    assert not any("rough" in sentence for sentence in verdict(kl=0.3, a=0.02))


def test_activations() -> None:
    drifting = [dataclasses.replace(layer, relative_error=0.3 * (1 + layer.depth)) for layer in LAYERS]
    found = only(verdict(Activations("e", 0.01, tuple(drifting), None)))
    assert "off by 90% of its norm; 50% is passed in b.1" in found
    blown = (LAYERS[0], dataclasses.replace(LAYERS[1], norm_ratio=40.0), LAYERS[2])
    first, second = verdict(Activations("e", 0.01, blown, Culprit("b.1", "it adds 3")))
    assert first == "the error starts in b.1: it adds 3"
    assert second.startswith("activations explode from b.1 on: ")


def test_logits_that_are_not_finite() -> None:
    assert "cannot be used" in only(verdict(kl=math.nan))


def test_a_loop_that_the_original_does_not_have() -> None:
    change = dataclasses.replace
    assert "degenerates after 'Once upon a time': 60%" in only(verdict(generation=[change(TALK, repetition=0.6)]))
    assert verdict(generation=[change(TALK, repetition=0.6, repetition_original=0.5)]) == (NOTHING,)
    long = change(TALK, prompt="word " * 30, repetition=0.9)
    assert len(only(verdict(generation=[long]))) < 160


def test_another_original() -> None:
    assert "not the checkpoint that the artifact was made from" in only(verdict(same=False))
