"""What was written once is read for ever: an artifact and what it must decode to, both committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tenpak
from tenpak.artifact.schema import FORMAT_VERSION, dump_manifest
from tenpak.codecs import registry

HERE = Path(__file__).resolve().parent
ARTIFACT = HERE / "artifact"


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(HERE / "expected.safetensors")  # a missing golden fails


def test_every_tensor_is_read_as_ever(expected: dict[str, torch.Tensor]) -> None:
    artifact = tenpak.open_artifact(ARTIFACT)
    assert artifact.manifest.format_version == FORMAT_VERSION
    read = {name: artifact.decode(name) for name in artifact.manifest.weights}
    read |= {name: artifact.read_dense(name) for name in artifact.manifest.dense}
    assert read.keys() == expected.keys()
    assert len(read) == 12
    for name, tensor in read.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_it_is_intact_and_holds_the_codecs_of_its_time() -> None:
    result = tenpak.verify(ARTIFACT)
    assert result.ok, result.problems
    manifest = tenpak.open_artifact(ARTIFACT).manifest
    held = {entry.codec["id"] for entry in manifest.weights.values()}
    assert held == {"dense/1", "normalfloat/1", "residual/1", "uniform/1"}  # younger ones have goldens of their own
    assert held < set(registry.ids())
    assert len(list(ARTIFACT.glob("*.safetensors"))) > 1
    assert dump_manifest(manifest) == (ARTIFACT / "manifest.json").read_bytes()


def test_the_model_is_what_was_read(expected: dict[str, torch.Tensor]) -> None:
    model = tenpak.load(ARTIFACT, dtype=torch.float32)
    names = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
    assert {f"{name}.weight" for name in names} == set(expected)
    for name, weight in names.items():
        assert torch.equal(weight.detach(), expected[f"{name}.weight"].float()), name


def test_it_is_small_enough_to_commit() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix in (".safetensors", ".json")) < 60_000
