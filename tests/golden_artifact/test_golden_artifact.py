"""What was written once is read for ever: an artifact of each format version and what it must decode to, committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tenpak
from tenpak.artifact.schema import FORMAT_VERSION, SHARING_VERSION, dump_manifest
from tenpak.codecs import registry

HERE = Path(__file__).resolve().parent
# The codecs of each version's artifact; those that came later have goldens of their own.
CODECS = {
    FORMAT_VERSION: {"dense/1", "normalfloat/1", "residual/1", "uniform/1"},
    SHARING_VERSION: {"trellis/1", "uniform/1", "vector/1"},
}


@pytest.fixture(params=CODECS)
def version(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def artifact(version: int) -> Path:
    return HERE / f"version_{version}" / "artifact"


@pytest.fixture
def expected(version: int) -> dict[str, torch.Tensor]:
    return load_file(HERE / f"version_{version}" / "expected.safetensors")  # a missing golden fails


def test_every_tensor_is_read_as_ever(version: int, artifact: Path, expected: dict[str, torch.Tensor]) -> None:
    opened = tenpak.open_artifact(artifact)
    assert opened.manifest.format_version == version
    read = {name: opened.decode(name) for name in opened.manifest.weights}
    read |= {name: opened.read_dense(name) for name in opened.manifest.dense}
    assert read.keys() == expected.keys()
    assert len(read) == 12
    for name, tensor in read.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_it_is_intact_and_holds_the_codecs_of_its_time(version: int, artifact: Path) -> None:
    result = tenpak.verify(artifact)
    assert result.ok, result.problems
    manifest = tenpak.open_artifact(artifact).manifest
    held = {entry.codec["id"] for entry in manifest.weights.values()}
    assert held == CODECS[version]
    assert held < set(registry.ids())
    assert len(list(artifact.glob("*.safetensors"))) > 1
    assert dump_manifest(manifest) == (artifact / "manifest.json").read_bytes()


def test_what_is_shared_is_shared_as_it_was() -> None:
    manifest = tenpak.open_artifact(HERE / f"version_{SHARING_VERSION}" / "artifact").manifest
    parts = sorted(sorted(name.split(".")[-2] for name in names) for names in manifest.sharers.values())
    assert parts == [["gate_proj", "up_proj"], ["o_proj", "q_proj", "v_proj"]]


def test_the_model_is_what_was_read(artifact: Path, expected: dict[str, torch.Tensor]) -> None:
    model = tenpak.load(artifact, dtype=torch.float32)
    names = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
    assert {f"{name}.weight" for name in names} == set(expected)
    for name, weight in names.items():
        assert torch.equal(weight.detach(), expected[f"{name}.weight"].float()), name


def test_it_is_small_enough_to_commit(version: int) -> None:
    files = (HERE / f"version_{version}").rglob("*")
    assert sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".json")) < 60_000
