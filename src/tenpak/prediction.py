"""What ``compress`` would write and need, from headers alone: the same line without reading a weight."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tenpak.allocation.plan import PlanEntry
from tenpak.artifact.schema import CODES_SUFFIX
from tenpak.artifact.sizes import Sizes
from tenpak.artifact.writer import MAX_SHARD_BYTES, predicted_bytes
from tenpak.calibrating import DEFAULT_TOKENS
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.source import tensor_sha256
from tenpak.job import open_job
from tenpak.kernels.parallel import worker_count

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction(Sizes):
    """What compressing would write and need.

    Attributes:
        bytes: size of the weight files; exact unless ``exact`` is False (a codec whose rate only coding can tell).
        parameters: of the model, tied ones once.
        checkpoint_bytes: size of the source's weight files.
        memory: estimated peak resident memory in bytes, of which ``base`` is this process as it is now.
        disk: free bytes needed while writing.
        seconds: estimated time to encode and write, from a short trial of each codec on this machine.
        dense: tensors that stay dense, with reasons.
    """

    bytes: int
    exact: bool
    parameters: int
    checkpoint_bytes: int
    memory: int
    disk: int
    seconds: float
    dense: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        names = ("bytes", "exact", "parameters", "checkpoint_bytes", "bpw", "ratio_fp32", "ratio_checkpoint")
        numbers = {name: getattr(self, name) for name in (*names, "memory", "disk", "seconds")}
        return {**numbers, "dense": dict(self.dense)}


def predict(
    source: str | Path,
    *,
    recipe: str = "int4:g32",
    overrides: Sequence[str] = (),
    calibration_tokens: int = DEFAULT_TOKENS,
    propagation: str = "original",
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Prediction:
    """What ``compress`` with these arguments would write and need, from headers alone. Raises as ``compress`` does.

    Only where a checkpoint stores a tied weight twice are the two read, to see whether they differ.
    """
    job = open_job(source, recipe, overrides, revision=revision, trust_remote_code=trust_remote_code)
    entries = [e for e in job.plan.entries if e.weight.tied_to is None]
    rows, exact = [], True
    for entry in entries:
        weight = entry.weight
        size = weight.numel * DTYPE_BYTES[weight.dtype]
        if entry.codec is None:
            rows.append((weight.name, weight.dtype, weight.shape, size))
            continue
        bits = entry.codec.estimate_bits(weight.matrix_shape)
        exact = exact and bits is not None
        stored = size if bits is None else weight.matrices * bits // 8
        rows.append((weight.name + CODES_SUFFIX, "U8", (stored,), stored))
    total = predicted_bytes(rows, max_shard_bytes)
    largest = max((e.weight.numel * DTYPE_BYTES[e.weight.dtype] for e in entries), default=0)
    payload = max((row[3] for row in rows), default=0)
    return Prediction(
        bytes=total,
        exact=exact,
        parameters=job.plan.parameters,
        checkpoint_bytes=job.checkpoint.bytes,
        # Per worker the tensor itself, its payload as fields and as one blob, and the encoder's tiles.
        memory=psutil.Process().memory_info().rss
        + worker_count() * (largest + 2 * payload + (32 << 20))
        + _calibration_memory(entries, job.plan.parameters),
        disk=total + min(total, max_shard_bytes) + (1 << 20),
        seconds=_trial(entries, total),
        dense={e.weight.name: e.reason for e in entries if e.codec is None},
    )


def _trial(entries: Sequence[PlanEntry], total: int) -> float:
    """Seconds to encode, hash and write, extrapolated from a small matrix per codec."""
    seconds = total / 200e6  # writing and copying; an order of magnitude for a disk
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(256, 1024, generator=generator)
    started = time.perf_counter()
    tensor_sha256(sample)
    hashing = (time.perf_counter() - started) / (sample.numel() * 4)
    seconds += hashing * sum(e.weight.numel * DTYPE_BYTES[e.weight.dtype] for e in entries)
    for codec in {e.codec for e in entries if e.codec is not None}:
        codec.encode(sample[:8])  # the first call of anything in torch is slow
        started = time.perf_counter()
        codec.encode(sample)
        per_weight = (time.perf_counter() - started) / sample.numel()
        seconds += per_weight * sum(e.weight.numel for e in entries if e.codec == codec)
    return seconds


def _calibration_memory(entries: Sequence[PlanEntry], parameters: int) -> int:
    """Bytes that calibration holds: the model in FP32, and for every layer's inputs a Hessian in FP64 and in FP32."""
    widths = [e.weight.matrix_shape[1] for e in entries if e.codec is not None and e.codec.needs_statistics]
    # Layers that share an input are counted each: which do is only known once the model runs.
    return 4 * parameters + sum(12 * width * width for width in widths) if widths else 0
