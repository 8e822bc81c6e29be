"""Bytes once released decode forever: each golden file decodes to exactly the values it was written with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, golden_weight
from safetensors import safe_open

from tenpak.codecs import registry
from tenpak.codecs.base import Payload

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ALL = [pytest.param(case, id=f"{codec_id}-{case.name}") for codec_id, cases in CASES.items() for case in cases]


def path_of(case: Case) -> Path:
    return GOLDEN / case.config["id"].replace("/", "_") / f"{case.name}.safetensors"


@pytest.mark.parametrize("case", ALL)
def test_golden(case: Case) -> None:
    path = path_of(case)
    assert path.is_file(), f"no golden file {path}: write it knowingly with tests/golden/regenerate.py"
    assert path.stat().st_size < 8192
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    expected, weight = stored.pop("expected"), stored.pop("weight")
    config = json.loads(metadata["codec"])
    assert config == case.config
    order = json.loads(metadata["order"])
    tensors = {name: stored.pop(f"payload.{name}") for name in order}
    shared = {name: stored.pop(f"shared.{name}") for name in json.loads(metadata.get("shared", "[]"))}
    assert not stored
    rows, columns = json.loads(metadata["shape"])
    payload = Payload(config, (rows, columns), torch.float32, tensors, shared)
    codec = registry.from_json(config)
    assert torch.equal(codec.decode(payload), expected)
    assert torch.equal(weight, golden_weight())
    if case.portable:
        encoded = codec.encode(weight)
        assert list(encoded.tensors) == order
        for name, tensor in encoded.tensors.items():
            assert torch.equal(tensor, tensors[name]), name


def test_no_golden_without_its_case() -> None:
    known = {path_of(case) for cases in CASES.values() for case in cases}
    assert set(GOLDEN.rglob("*.safetensors")) == known
