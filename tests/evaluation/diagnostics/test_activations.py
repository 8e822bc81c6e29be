"""Blocks compared: against figures made by hand, in every family, with a culprit planted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from families import FAMILIES
from torch import nn

from tenpak.errors import EvaluationError
from tenpak.evaluation import windowing
from tenpak.evaluation.diagnostics.activations import Layer, compare_activations, exploded, find_culprit

FINE = Layer("b.0", 0, 0.99, 1.0, 0.1, 0.1, 5.0, 5.0, 0.0, 0.0)


def hidden_states(model: nn.Module, pair) -> list[torch.Tensor]:
    """The states that transformers itself hands out, ``[windows, tokens, width]``, but for the last, shorter window."""
    rows = torch.stack([pair.tokens[w.start : w.stop] for w in pair.windows])
    with torch.no_grad():
        return [states.double() for states in model(rows, output_hidden_states=True, use_cache=False).hidden_states]


def test_every_figure_is_what_numpy_makes_of_transformers_hidden_states(talker, monkeypatch) -> None:
    monkeypatch.setattr(windowing, "_BATCH_TOKENS", 96)  # three windows at a time
    pair = talker(recipe="int2:g32", num_hidden_layers=3).open(tokens=32 * 15 + 1, window=32)
    found = compare_activations(pair)
    assert [layer.name for layer in found.layers] == [f"model.layers.{depth}" for depth in range(3)]
    assert found.embedding == "model.embed_tokens"
    h, h_hat = hidden_states(pair.original, pair), hidden_states(pair.compressed, pair)
    assert found.embedding_error == pytest.approx(float(((h_hat[0] - h[0]).norm(dim=-1) / h[0].norm(dim=-1)).mean()))
    for layer in found.layers[:-1]:  # transformers gives the last one after the final norm
        a, b = h[layer.depth + 1], h_hat[layer.depth + 1]
        norms = a.norm(dim=-1), b.norm(dim=-1)
        close = {"rel": 1e-5}
        assert layer.cosine == pytest.approx(float(((a * b).sum(-1) / norms[0] / norms[1]).mean()), **close)
        assert layer.norm_ratio == pytest.approx(float((norms[1] / norms[0]).mean()), **close)
        assert layer.relative_error == pytest.approx(float(((b - a).norm(dim=-1) / norms[0]).mean()), **close)
        for states, peak, share in (
            (a, layer.peak_original, layer.outliers_original),
            (b, layer.peak, layer.outliers),
        ):
            unit = states.square().mean(dim=(1, 2), keepdim=True).sqrt()
            assert peak == pytest.approx(float((states.abs() / unit).max()), **close)
            assert share == float((states.abs() > 6 * unit).double().mean())


def test_a_blocks_own_error_is_that_on_the_originals_input(talker) -> None:
    """With one block compressed, its own error is all there is, and later blocks add none."""
    pair = talker(recipe="dense", overrides=("model.layers.1.*=int2:g32", "embed*=dense", "lm_head*=dense"),
                  num_hidden_layers=4).open()  # fmt: skip
    layers = compare_activations(pair).layers
    assert layers[0].relative_error == layers[0].own_error == 0
    assert layers[1].own_error == pytest.approx(layers[1].relative_error, rel=1e-9)
    assert layers[1].own_error > 0.01
    assert layers[2].own_error == layers[3].own_error == 0
    assert layers[2].relative_error > 0.01


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_family_has_blocks(family: str, talker) -> None:
    pair = talker(family).open(tokens=200, window=16)
    found = compare_activations(pair)
    assert len(found.layers) == 2
    assert all(0 < layer.own_error < 1 and layer.cosine > 0.5 for layer in found.layers)
    assert 0 <= found.embedding_error < 0.1
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in pair.original.modules())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in pair.compressed.modules())


@pytest.mark.parametrize(("family", "path"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_a_ruined_block_is_named(family: str, path: str, talker) -> None:
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": 5, "num_hidden_layers": 5}
    found = compare_activations(talker(family, overrides=(f"{path}.2.*=int2:row",), **depth).open())
    assert found.culprit is not None
    assert found.culprit.layer == f"{path}.2"
    assert "times the median" in found.culprit.why


def test_nobody_is_named_where_all_are_alike(talker) -> None:
    assert compare_activations(talker(num_hidden_layers=5).open()).culprit is None


def test_a_ruined_embedding_is_named(talker) -> None:
    found = compare_activations(talker(overrides=("embed*=int2:row",), num_hidden_layers=5).open())
    assert found.culprit is not None
    assert found.culprit.layer == "model.embed_tokens"


def test_the_first_block_that_is_not_finite_is_named(talker) -> None:
    pair = talker(num_hidden_layers=4).open()
    with torch.no_grad():
        pair.compressed.model.layers[1].input_layernorm.weight[3] = math.nan
        pair.compressed.model.layers[2].input_layernorm.weight[3] = math.inf
    found = compare_activations(pair)
    assert found.culprit is not None
    assert found.culprit.layer == "model.layers.1"
    assert "NaN" in found.culprit.why
    assert [layer.finite for layer in found.layers] == [True, False, False, False]
    assert math.isfinite(found.layers[3].own_error)
    assert all(math.isnan(value) for value in (found.layers[1].peak, found.layers[1].outliers))


def test_an_original_that_is_not_finite_is_an_error(talker) -> None:
    pair = talker().open()
    with torch.no_grad():
        pair.original.model.layers[1].input_layernorm.weight[3] = math.nan
    with pytest.raises(EvaluationError, match=r"the original .* in block model\.layers\.1") as error:
        compare_activations(pair)
    assert error.value.hint


def test_an_explosion_is_told_and_one_of_the_original_is_not(talker) -> None:
    pair = talker(num_hidden_layers=4).open()
    with torch.no_grad():
        pair.compressed.model.layers[2].mlp.down_proj.bias = nn.Parameter(torch.zeros(32))
        pair.compressed.model.layers[2].mlp.down_proj.bias[7] = 1e4
    found = compare_activations(pair)
    assert exploded(found.layers[1]) is None
    assert "times the original's" in (exploded(found.layers[2]) or "")
    assert found.culprit is not None
    assert found.culprit.layer == "model.layers.2"


def test_rules_of_explosions() -> None:
    change = dataclasses.replace
    assert exploded(FINE) is None
    assert exploded(change(FINE, norm_ratio=2.1))
    assert exploded(change(FINE, norm_ratio=0.4))
    assert exploded(change(FINE, peak=25.0))
    assert exploded(change(FINE, peak=25.0, peak_original=20.0)) is None
    assert exploded(change(FINE, peak=11.0)) is None  # unlike the original's, and harmless
    assert exploded(change(FINE, relative_error=math.nan)) == "its output is not finite"


def test_rules_of_culprits() -> None:
    def blocks(*own: float) -> list[Layer]:
        return [dataclasses.replace(FINE, name=f"b.{n}", depth=n, own_error=error) for n, error in enumerate(own)]

    def name(embedding: float, *own: float) -> str | None:
        found = find_culprit("e", embedding, blocks(*own))
        return None if found is None else found.layer

    assert name(0.01, 0.1, 0.1, 0.21) == "b.2"
    assert name(0.01, 0.1, 0.1, 0.19) is None
    assert name(0.01, 0.01, 0.01, 0.04) is None  # too small to matter
    assert name(0.3, 0.1, 0.1, 0.1) == "e"
    assert name(0.01, 0.4) is None  # a single block is compared with nothing
    assert name(0.01, 0.6) == "b.0"
    assert name(0.0, 0.0, 0.0, 0.5) == "b.2"


def test_a_model_of_one_block(talker) -> None:
    found = compare_activations(talker(num_hidden_layers=1).open())
    assert len(found.layers) == 1
    assert found.culprit is None


def test_progress_counts_tokens(talker) -> None:
    calls = []
    pair = talker().open()
    compare_activations(pair, lambda *call: calls.append(call))
    assert calls[-1] == ("activations", len(pair.tokens) - 1, len(pair.tokens) - 1)
