"""What ``compress`` would write and need, from headers alone: the same line without reading a weight."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tenpak.allocation.budget import Budget
from tenpak.allocation.plan import PlanEntry, stored_rows
from tenpak.artifact.sizes import Sizes
from tenpak.artifact.writer import MAX_SHARD_BYTES, predicted_bytes
from tenpak.calibrating import DEFAULT_TOKENS
from tenpak.calibration.activations import SPILL_BYTES
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.source import tensor_sha256
from tenpak.encoding import unit_statistics
from tenpak.job import open_job, replanned
from tenpak.kernels.parallel import worker_count
from tenpak.knobs import dialled_job
from tenpak.policies import Policy, refuse_budget
from tenpak.recipes import PRESETS
from tenpak.recovery import DEFAULT_STEPS, memory

__all__ = ["Offer", "Prediction", "offers", "predict", "recommended"]

_BLOCK = re.compile(r"^.*?\.\d+\.")
_TARGET = "10x"  # what is recommended
_FIXED_RATE = ("gptq-int4", "int4-g32")  # for engines that read grids only, with calibration and without
_BATCH_BYTES = 256 << 20  # what a batch of windows takes on its way through a block


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
    recipe: str | None = None,
    policy: Policy | str | None = None,
    budget: str | None = None,
    overrides: Sequence[str] = (),
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    statistics: str | Path | None = None,
    propagation: str = "original",
    tuning: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Prediction:
    """What ``compress`` with these arguments would write and need, from headers alone. Raises as ``compress`` does.

    Only where a checkpoint stores a tied weight twice are the two read, to see whether they differ, and what a policy
    by sensitivity reads.
    """
    refuse_budget(policy, budget)
    job = open_job(
        source,
        recipe,
        overrides,
        policy=policy,
        statistics=statistics,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    spent = None if budget is None else Budget.parse(budget)
    if spent is not None:
        job = dialled_job(job, 1.0, calibrated=calibration != "none")
    entries = [e for e in job.plan.entries if e.weight.tied_to is None]
    known = [e.estimated_bits for e in entries if e.codec is not None]
    rows = stored_rows(job.plan, lambda _, entry: entry.estimated_bits)
    total = predicted_bytes(rows, max_shard_bytes)
    if spent is not None and spent.is_size:
        total = spent.bytes(job.plan.parameters)
    steps = tuning if tuning is not None else DEFAULT_STEPS * (spent is not None and calibration != "none")
    vocabulary = int(job.config.get_text_config().vocab_size)
    largest = max((e.weight.numel * DTYPE_BYTES[e.weight.dtype] for e in entries), default=0)
    payload = max((row[3] for row in rows), default=0)
    return Prediction(
        bytes=total,
        exact=None not in known,
        parameters=job.plan.parameters,
        checkpoint_bytes=job.checkpoint.bytes,
        # Per worker the tensor itself, its payload as fields and as one blob, and the encoder's tiles; or two models.
        memory=psutil.Process().memory_info().rss
        + max(
            worker_count() * (largest + 2 * payload + (32 << 20))
            + _calibration_memory(
                entries, calibration_tokens, _hidden_size(job.config), both=propagation == "original"
            ),
            memory(job.plan.parameters, vocabulary) if steps else 0,
        ),
        disk=2 * total + min(total, max_shard_bytes) + (1 << 20),  # finished tensors, the spool, a shard
        seconds=_trial(entries, total),
        dense={e.weight.name: e.reason for e in entries if e.codec is None},
    )


@dataclass(frozen=True)
class Offer(Sizes):
    """What a preset would make of a model.

    Attributes:
        name: of the preset.
        recipe: what it stands for.
        bytes: size of the weight files; exact unless ``exact`` is False (a codec whose rate only coding can tell).
        parameters: of the model, tied ones once.
        checkpoint_bytes: size of the source's weight files.
    """

    name: str
    recipe: str
    bytes: int
    exact: bool
    parameters: int
    checkpoint_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Sizes and ratios."""
        return {name: getattr(self, name) for name in ("bytes", "exact", "bpw", "ratio_fp32", "ratio_checkpoint")}


def offers(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Offer, ...]:
    """What every preset would make of a model, from headers alone, in the order of ``PRESETS``.

    Args:
        source: model folder or hub id.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code from the checkpoint.

    Raises:
        CheckpointError: the source cannot be read or is not a decoder-only language model.
    """
    job = open_job(source, None, (), revision=revision, trust_remote_code=trust_remote_code)
    found = []
    for name, preset in PRESETS.items():
        plan = replanned(job, preset.recipe, ()).plan
        known = [e.estimated_bits for e in plan.entries if e.codec is not None and e.weight.tied_to is None]
        size = predicted_bytes(stored_rows(plan, lambda _, entry: entry.estimated_bits), MAX_SHARD_BYTES)
        found.append(Offer(name, preset.recipe, size, None not in known, plan.parameters, job.checkpoint.bytes))
    return tuple(found)


def recommended(source: str | Path, found: Sequence[Offer]) -> dict[str, Any]:
    """The command that suits most, and those for a fixed rate, each with the bytes of the weight files: JSON."""
    model = shlex.quote(str(source))
    fixed = [offer for name in _FIXED_RATE for offer in found if offer.name == name]
    command = f"tenpak compress {model} -o OUT"
    return {
        "command": f"{command} --target {_TARGET}",
        "bytes": Budget.parse(_TARGET).bytes(found[0].parameters),
        "fixed_rate": [{"command": f"{command} --recipe {offer.name}", "bytes": offer.bytes} for offer in fixed],
    }


def _hidden_size(config: Any) -> int:
    return int(getattr(config.get_text_config(), "hidden_size", 0) or 0)


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
        known = unit_statistics(sample.shape[1]) if codec.needs_statistics else None
        codec.encode(sample[:8], known)  # the first call of anything in torch is slow
        started = time.perf_counter()
        codec.encode(sample, known)
        per_weight = (time.perf_counter() - started) / sample.numel()
        seconds += per_weight * sum(e.weight.numel for e in entries if e.codec == codec)
    return seconds


def _calibration_memory(entries: Sequence[PlanEntry], tokens: int, hidden: int, *, both: bool) -> int:
    """Bytes that calibration holds at its peak, which is while the widest weight of a block is encoded.

    Args:
        entries: of the plan.
        tokens: of the text that are read.
        hidden: width of the hidden states.
        both: whether the original model is followed beside the compressed one.
    """
    codecs = {e.codec for e in entries if e.codec is not None and e.codec.needs_statistics}
    needing = [e.weight for e in entries if e.codec in codecs]
    if not needing:
        return 0
    blocks: dict[str, int] = {}
    for entry in entries:
        block = _BLOCK.search(entry.weight.parameter)
        key = block[0] if block else entry.weight.name
        blocks[key] = blocks.get(key, 0) + 4 * entry.weight.numel
    inputs = {w.matrix_shape[1] for w in needing}
    # Hidden states of both models, and the original's inputs of the steps of a block.
    boundaries = 2 if both else 1
    if any(e.codec.uses_curvature or e.weight.kind == "embedding" for e in entries if e.codec in codecs and e.codec):
        boundaries = max(boundaries, len(blocks))  # going back, every block is run again from where it started
    states = 4 * tokens * (boundaries * hidden + (3 * min(inputs) if both else 0))
    # Sums in FP64 and two workers' in FP32, then the Hessian as it is factored: about as much. Experts have their own.
    sums = max(8 * n * n + (4 * n * n if both else 0) + worker_count() * 6 * n * n for n in inputs)
    experts: dict[str, int] = {}
    for weight in needing:
        if weight.kind == "expert" and (weight.slot is None or weight.slot[1] == 0):
            experts.setdefault(weight.parameter, 0)
            experts[weight.parameter] += 8 * weight.matrices * weight.matrix_shape[1] ** 2
    sums += max(experts.values(), default=0)
    return max(blocks.values()) + min(states, SPILL_BYTES) + sums + _BATCH_BYTES
