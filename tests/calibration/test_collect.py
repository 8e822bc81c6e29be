"""Statistics of layer inputs, against the plain formulas on inputs recorded by other means."""

from __future__ import annotations

import pytest
import torch
from families import make_tiny
from transformers import AutoModelForCausalLM

from tenpak.calibration.collect import collect
from tenpak.errors import CalibrationError

TOKENS = torch.randint(3, 90, (50,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny("llama", tmp_path_factory.mktemp("collect") / "model")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def layers(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def recorded(model, name: str, window: int) -> torch.Tensor:
    """All inputs of a layer, FP64 ``[tokens, in]``."""
    rows: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0][0]))
    with torch.no_grad():
        for start in range(0, len(TOKENS), window):
            model(TOKENS[None, start : start + window])
    handle.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_statistics_are_the_formulas(model, name: str) -> None:
    found = collect(model, TOKENS, layers(model), window=16)[name]
    x = recorded(model, name, 16)
    assert found.count == len(x) == 50
    # FP32 products of some 16 tokens, summed in FP64: a few units in the last place.
    torch.testing.assert_close(found.hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)


def test_layers_that_share_their_input_share_statistics(model) -> None:
    found = collect(model, TOKENS, layers(model), window=25)
    first = "model.layers.0"
    assert found[f"{first}.self_attn.q_proj"] is found[f"{first}.self_attn.k_proj"]
    assert found[f"{first}.self_attn.k_proj"] is found[f"{first}.self_attn.v_proj"]
    assert found[f"{first}.mlp.gate_proj"] is found[f"{first}.mlp.up_proj"]
    assert found[f"{first}.self_attn.q_proj"] is not found[f"{first}.mlp.gate_proj"]
    assert found[f"{first}.self_attn.q_proj"] is not found["model.layers.1.self_attn.q_proj"]


def test_hooks_are_gone_afterwards(model) -> None:
    collect(model, TOKENS, layers(model), window=25)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_text_without_tokens_is_refused(model) -> None:
    with pytest.raises(CalibrationError, match="fewer than 2 tokens"):
        collect(model, TOKENS[:1], layers(model), window=16)


def test_an_input_that_overflows_is_named(model) -> None:
    norm = model.model.layers[1].input_layernorm
    kept = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.fill_(float("inf"))
    try:
        with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn"):
            collect(model, TOKENS, {k: v for k, v in layers(model).items() if "layers.1" in k}, window=16)
    finally:
        with torch.no_grad():
            norm.weight.copy_(kept)
