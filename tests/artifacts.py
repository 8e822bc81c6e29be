"""Small artifacts without a model, and hands to tamper with: what the tests of readers and writers share."""

from __future__ import annotations

import ctypes
import hashlib
import json
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenpak.artifact.schema import FORMAT_VERSION, Manifest, Source
from tenpak.artifact.writer import MAX_SHARD_BYTES, ArtifactWriter
from tenpak.codecs import Statistics
from tenpak.recipes import parse

Change = Callable[[Any], Any]


def blank_manifest(**changes: Any) -> Manifest:
    """A manifest that lists nothing yet."""
    source = Source(name="somewhere/model", sha256="0" * 64, bytes=1, parameters=1)
    fields: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "tenpak_version": "0", "versions": {}, "source": source, "recipe": "int4:g32",
        "overrides": (), "seed": 0, "weights": {}, "dense": {}, "tied": {}, "files": {},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def matrix(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers as small as weights are."""
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "a.weight": ((8, 40), "int4:g32"),
    "b.weight": ((5, 33), "int3:g16+nf2:row"),
    "c.weight": ((3, 7), "int8:row"),
}


def add_tensors(writer: ArtifactWriter, weights: Mapping[str, tuple[tuple[int, ...], str]] = WEIGHTS) -> None:
    """Weights by recipe, and a few dense tensors."""
    for seed, (name, (shape, recipe)) in enumerate(weights.items()):
        codec = parse(recipe)
        assert codec is not None
        weight = matrix(*shape, seed=seed)
        statistics = None
        if codec.needs_statistics:
            power = 1.5 + torch.arange(shape[-1]).sin()
            statistics = Statistics(hessian=torch.diag(power.square()) + power * power[:, None], mean_abs=power)
        parts = list(weight) if weight.ndim == 3 else [weight]
        shared = codec.learn(parts)
        payloads = [codec.encode_sharing(part, shared, statistics) for part in parts]
        writer.add_weight(name, payloads, shape=shape, dtype="F32", transposed=False)
    writer.add_dense("norm.weight", torch.ones(5, dtype=torch.bfloat16), "1-D")
    writer.add_dense("mask", torch.ones(3, 3, dtype=torch.bool), "a buffer")


def write_small(folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False) -> Path:
    """A small artifact of every kind of tensor, with a tokenizer file; it belongs to no model."""
    tokenizer = folder.parent / "tokenizer.json"
    tokenizer.write_text('{"a": 1, "b": [2, 3]}\n')
    with ArtifactWriter(folder, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        add_tensors(writer)
        return writer.publish(blank_manifest(), {"model_type": "none"}, copied=[tokenizer])


# Tampering: each change gets the parsed JSON and alters it in place or returns another. ---------------------------


def canonical(content: object) -> bytes:
    """JSON as manifests have it."""
    return json.dumps(content, separators=(",", ":")).encode()


def edit_manifest(folder: Path, change: Change) -> None:
    """Change a manifest and seal it again, so that only what it says is wrong."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    del content["sha256"]
    changed = change(content)
    content = content if changed is None else changed
    path.write_bytes(canonical({**content, "sha256": hashlib.sha256(canonical(content)).hexdigest()}))


def edit_json(path: Path, change: Change) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_bytes())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: Path, header: object, data: bytes) -> None:
    """Write a safetensors file with any header: an object, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(path: Path, change: Change) -> None:
    """Change the header of a safetensors file and leave its data alone."""
    header, data = split_file(path)
    changed = change(header)
    join_file(path, header if changed is None else changed, data)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


# Memory ----------------------------------------------------------------------------------------------------------

SLACK = 1 << 30  # address space that torch and malloc may reserve without using it
RESIDENT = 64 << 20  # what refusing may take: far above parsing a header, far below any hostile size


@contextmanager
def little_memory() -> Iterator[None]:
    """Make large allocations fail, and require that what the block really used stayed small (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left must not be counted
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _status(status, "VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status(status, "VmSize") + SLACK, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = _status(status, "VmHWM") - before
    assert grown < RESIDENT, f"took {grown >> 20} MiB"


def _status(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
