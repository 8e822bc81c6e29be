"""The modules by themselves: what reads ``weight``, devices and dtypes, repr, subclasses of the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import MakeCase
from torch import nn

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.nn.modules import CompressedConv1D, CompressedEmbedding, CompressedLinear, CompressedWeight, Runtime


def test_weight_is_the_decoded_tensor_in_its_own_orientation(case: MakeCase) -> None:
    for family, path, kind in (
        ("llama", "model.layers.0.mlp.up_proj", CompressedLinear),
        ("gpt2", "transformer.h.0.mlp.c_fc", CompressedConv1D),
        ("gemma2", "model.embed_tokens", CompressedEmbedding),
        ("opt", "model.decoder.embed_tokens", CompressedEmbedding),
    ):
        made = case(family)
        module = tenpak.load(made.artifact).get_submodule(path)
        assert isinstance(module, kind)
        artifact = open_artifact(made.artifact)
        assert torch.equal(module.weight, artifact.decode(module.payload.name))


def test_module_keeps_the_behaviour_of_its_class(case: MakeCase) -> None:
    """Gemma scales what it looks up."""
    embedding = tenpak.load(case("gemma2").artifact).model.embed_tokens
    assert isinstance(embedding, CompressedEmbedding)
    assert type(embedding).__mro__[1].__name__ == "Gemma2TextScaledWordEmbedding"
    tokens = torch.tensor([[3, 50]])
    assert torch.allclose(embedding(tokens), embedding.weight[tokens] * embedding.embed_scale)
    assert embedding.embed_scale != 1


def test_modules_are_still_what_they_were_to_isinstance(case: MakeCase) -> None:
    model = tenpak.load(case("llama").artifact)
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.in_features == 32
    assert model.lm_head.out_features == 96


def test_nothing_of_a_compressed_weight_is_trained_or_counted_as_a_parameter(case: MakeCase) -> None:
    model = tenpak.load(case("llama").artifact)
    compressed = set(open_artifact(case("llama").artifact).manifest.weights)
    assert not compressed & {name for name, _ in model.named_parameters()}


def test_representation_says_codec_and_rate(case: MakeCase) -> None:
    model = tenpak.load(case("llama").artifact)
    text = repr(model.model.layers[0].mlp.up_proj)
    assert "uniform/1" in text
    assert "5 bpw" in text  # int4:g32: 4 bits + (16 + 16) / 32


def test_keep_and_forget(case: MakeCase) -> None:
    model = tenpak.load(case("llama").artifact)
    weight = next(module for module in model.modules() if isinstance(module, CompressedWeight))
    x = torch.randn(3, weight.entry.shape[1], generator=torch.Generator().manual_seed(0))
    before = weight.matmul(x)
    weight.keep()
    assert weight.matrix() is weight.matrix()
    assert torch.allclose(weight.matmul(x), before, atol=1e-6)
    weight.forget()
    assert weight.matrix() is not weight.matrix()


@pytest.mark.parametrize("recipe", ["int4:g32", "int8:row", "trellis:0.02:datafree", "plain-lowrank4", "vq4x64"])
@pytest.mark.parametrize("runtime", ["memory", "speed"])
def test_inference_mode_leaves_nothing_that_other_modes_cannot_use(
    case: MakeCase, recipe: str, runtime: Runtime, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tenpak.compress(case("llama").source, out, recipe=recipe, overrides=[f"*={recipe}"])
    tokens = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = tenpak.load(out, runtime=runtime)
        inferred = model(tokens).logits
    embedded = model.get_input_embeddings()(tokens).detach().clone().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(logits, inferred.clone(), rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
