"""Stacked experts: both layouts of a checkpoint (one tensor per expert, one per layer), and codecs that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import Case, MakeCase, logits
from safetensors.torch import load_file

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.nn.modules import StackedWeight


def stacks(model: torch.nn.Module) -> list[StackedWeight]:
    return [module for module in model.modules() if isinstance(module, StackedWeight)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_every_expert_is_compressed_and_decodes_to_its_own_rows(family: str, case: MakeCase, tmp_path: Path) -> None:
    made = case(family)
    reference = made.reference(tmp_path / "dense")
    model = tenpak.load(made.artifact)
    found = {path: module for path, module in model.named_modules() if isinstance(module, StackedWeight)}
    assert len(found) == 4  # two per layer
    for path, stack in found.items():
        expected = reference.get_parameter(path)
        assert len(stack) == 4
        assert torch.equal(stack.dense(), expected)
        assert torch.equal(stack[2], expected[2])
        assert torch.equal(stack[torch.tensor([0, 3])], expected[[0, 3]])
        assert stack.shape == expected.shape
        assert torch.equal(torch.transpose(stack, 1, 2), expected.transpose(1, 2))


def test_experts_of_one_layer_may_take_different_codecs(case: MakeCase, tmp_path: Path) -> None:
    made = case("mixtral", overrides=("*.experts.1.*=int8:row", "*.w2.weight=nf4:g32"))
    weights = open_artifact(made.artifact).manifest.weights
    experts = {name: entry.codec["id"] for name, entry in weights.items() if ".experts.1." in name}
    assert {codec for name, codec in experts.items() if ".w2." in name} == {"normalfloat/1"}
    assert {codec for name, codec in experts.items() if ".w2." not in name} == {"uniform/1"}
    expected = logits(made.reference(tmp_path / "dense"))
    for runtime in ("memory", "speed"):
        found = logits(tenpak.load(made.artifact, runtime=runtime))
        assert (found - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


def test_dense_experts_beside_compressed_attention(case: MakeCase, tmp_path: Path) -> None:
    made = case("qwen3_moe", overrides=("*.experts.*=dense",))
    model = tenpak.load(made.artifact)
    assert not stacks(model)
    expected = logits(made.reference(tmp_path / "dense"))
    assert (logits(model) - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(
        torch.equal(again[name], tensor)
        for name, tensor in load_file(made.source / "model.safetensors").items()
        if ".experts." in name
    )


def test_speed_keeps_whole_stacks_and_still_saves(case: MakeCase, tmp_path: Path) -> None:
    made: Case = case("mixtral")
    model = tenpak.load(made.artifact, runtime="speed")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made.artifact / "model.safetensors").read_bytes()
