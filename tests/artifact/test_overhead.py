"""Sizes: in the weight files, what is not payload stays small, and every byte is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import make_tiny

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.checkpoint.header import DTYPE_BYTES

BYTES_PER_TENSOR = 160  # promised in the project's issue; a header entry of a long name takes about 130


def overhead(folder: Path) -> float:
    """Bytes of the weight files that are neither payload nor dense data, per stored tensor."""
    artifact = open_artifact(folder)
    manifest = artifact.manifest
    payload = sum(entry.bits for entry in manifest.weights.values()) // 8
    dense = 0
    for entry in manifest.dense.values():
        numel = 1
        for length in entry.shape:
            numel *= length
        dense += numel * DTYPE_BYTES[entry.dtype]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size == artifact.bytes
    return (size - payload - dense) / len(artifact.tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("limit", [4_000_000_000, 20_000])
def test_tiny_models(family: str, limit: int, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "model")
    report = tenpak.compress(tmp_path / "model", tmp_path / "artifact", max_shard_bytes=limit)
    assert 0 < overhead(tmp_path / "artifact") <= BYTES_PER_TENSOR
    assert report.bytes == open_artifact(tmp_path / "artifact").bytes


@pytest.mark.parametrize("recipe", ["int4:g32", "int4:g16+int2:g16"])
def test_bundled_model(recipe: str, tinystories: Path, tmp_path: Path) -> None:
    tenpak.compress(tinystories, tmp_path / "artifact", recipe=recipe)
    assert 0 < overhead(tmp_path / "artifact") <= BYTES_PER_TENSOR
    assert tenpak.verify(tmp_path / "artifact").ok
