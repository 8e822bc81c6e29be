"""Tied embeddings and heads: one payload, stored once, whatever the checkpoint stores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from compressed import Case, MakeCase, logits
from safetensors.torch import load_file, save_file

import tenpak
from tenpak.artifact.reader import open_artifact

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_head(source: Path, folder: Path, change: float) -> Path:
    """A copy of a tied model whose checkpoint also stores the head, ``change`` away from the embedding."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING] + change
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_tied_weight_is_held_once(family: str, case: MakeCase) -> None:
    model = tenpak.load(case(family).artifact)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.payload is embedding.payload
    assert torch.equal(head.weight, embedding.weight)


def test_untied_weights_are_two(case: MakeCase) -> None:
    made = case("llama")
    assert {EMBEDDING, HEAD} <= set(open_artifact(made.artifact).manifest.weights)
    model = tenpak.load(made.artifact)
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_copy_of_a_tied_weight_is_not_stored(case: MakeCase, tmp_path: Path) -> None:
    tied = case("qwen2")
    source = with_head(tied.source, tmp_path / "source", 0.0)
    prediction = tenpak.predict(source)
    report = tenpak.compress(source, tmp_path / "artifact")
    assert report.bytes == prediction.bytes == tied.report.bytes
    assert report.parameters == prediction.parameters == tied.report.parameters
    assert open_artifact(tmp_path / "artifact").manifest.tied == {HEAD: EMBEDDING}
    assert torch.equal(logits(tenpak.load(tmp_path / "artifact")), logits(tenpak.load(tied.artifact)))


def test_tied_on_paper_but_different_is_two_weights(case: MakeCase, tmp_path: Path) -> None:
    source = with_head(case("qwen2").source, tmp_path / "source", 0.5)
    prediction = tenpak.predict(source)
    report = tenpak.compress(source, tmp_path / "artifact")
    assert report.bytes == prediction.bytes
    assert report.parameters == prediction.parameters == case("qwen2").report.parameters + 96 * 32
    made = Case(source, tmp_path / "artifact", report)
    expected = logits(made.reference(tmp_path / "dense"))
    for runtime in ("memory", "speed"):
        found = logits(tenpak.load(made.artifact, runtime=runtime))
        assert (found - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


def test_tied_weights_take_the_recipe_that_is_set_for_either_use(case: MakeCase, tmp_path: Path) -> None:
    made = case("qwen2", overrides=("embed*=int4:g32",))
    assert open_artifact(made.artifact).manifest.weights[EMBEDDING].codec["bits"] == 4
    expected = logits(made.reference(tmp_path / "dense"))
    assert (logits(tenpak.load(made.artifact)) - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


def test_dense_tied_embedding_is_still_tied(case: MakeCase, tmp_path: Path) -> None:
    made = case("qwen2", overrides=("embed*=dense",))
    model = tenpak.load(made.artifact)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tenpak.load(tmp_path / "again")), logits(model))
