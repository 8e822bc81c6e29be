"""Encoding a plan: every tensor read, hashed and encoded once, several at a time, handed out in order.

Parallelism is over tensors, one thread each: the bytes cannot depend on the number of workers, and threads need not
wait for each other at every operation, which costs most where other programs use the same cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

import torch
from torch import Tensor

from tenpak.allocation.plan import Plan, PlanEntry, is_parameter
from tenpak.checkpoint.source import Checkpoint, tensor_sha256
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec, Payload, Statistics
from tenpak.errors import CalibrationError, CodecError

__all__ = ["Encoded", "encode_plan", "encode_tensor", "worker_count"]

# Each worker holds a tensor and its payload; more of them would rarely be faster and always be larger.
_MAX_WORKERS = 4


@dataclass(frozen=True)
class Encoded:
    """One tensor of the plan, encoded.

    Attributes:
        entry: what the plan says.
        sha256: of the source tensor's bytes.
        payloads: one per matrix; empty for a tensor that is not compressed.
        dense: the tensor as it was, where it stays dense; None as well for the copy of a tied weight, which is dropped.
    """

    entry: PlanEntry
    sha256: str
    payloads: tuple[Payload, ...] = ()
    dense: Tensor | None = None


def worker_count() -> int:
    """How many tensors are encoded at a time: torch's threads, at most four."""
    return min(torch.get_num_threads(), _MAX_WORKERS)


def encode_plan(
    checkpoint: Checkpoint, plan: Plan, statistics: Mapping[str, Statistics] = MappingProxyType({})
) -> Iterator[Encoded]:
    """Encode the tensors of a plan, in its order; ``statistics`` are by tensor name.

    Raises:
        CheckpointError: a tensor cannot be read.
        CodecError, CalibrationError: a weight cannot be encoded; names it.
    """
    entries = iter(plan.entries)
    pending: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(worker_count(), initializer=_use_one_thread) as pool:

        def submit(entry: PlanEntry) -> Future[Encoded]:
            return pool.submit(_encode, checkpoint, entry, statistics.get(entry.weight.name))

        try:
            pending.extend(submit(entry) for entry in islice(entries, worker_count()))
            while pending:
                encoded = pending.popleft().result()
                pending.extend(submit(entry) for entry in islice(entries, 1))
                yield encoded
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def encode_tensor(
    codec: Codec, weight: Weight, tensor: Tensor, statistics: Statistics | None = None
) -> tuple[Payload, ...]:
    """One payload per matrix of a tensor as the checkpoint stores it; ``statistics`` are those of its inputs.

    Raises:
        CodecError, CalibrationError: of the codec's own kind, naming the tensor.
    """
    matrices = tensor.unbind(0) if tensor.ndim == 3 else (tensor,)
    try:
        return tuple(codec.encode(matrix.T if weight.transposed else matrix, statistics) for matrix in matrices)
    except (CodecError, CalibrationError) as error:
        raise type(error)(f"{weight.name}: {error}", hint=error.hint) from error


def _encode(checkpoint: Checkpoint, entry: PlanEntry, statistics: Statistics | None) -> Encoded:
    weight = entry.weight
    tensor = checkpoint.read(weight.name)
    sha256 = tensor_sha256(tensor)
    if weight.tied_to is not None:
        return Encoded(entry, sha256)
    if entry.codec is not None:
        return Encoded(entry, sha256, encode_tensor(entry.codec, weight, tensor, statistics))
    if is_parameter(weight):  # masks and unused tensors may hold what they like
        _require_finite(weight.name, tensor)
    return Encoded(entry, sha256, dense=tensor)


def _require_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise CodecError(
            f"{name}: the weight holds NaN or infinite values",
            hint="the checkpoint is broken: obtain it again, or repair that tensor",
        )


def _use_one_thread() -> None:
    torch.set_num_threads(1)
