"""Encoding tensors: from the checkpoint, with what calibration knows of them, to payloads.

Several tensors at a time, one thread each: see ``kernels.parallel``. Each finished tensor is kept as a unit of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenpak.allocation.plan import PlanEntry
from tenpak.checkpoint.source import TORCH_DTYPES, Checkpoint, tensor_sha256
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec, Payload, Statistics, require_matrix
from tenpak.codecs.rounding.correction import corrected
from tenpak.errors import CalibrationError, CodecError
from tenpak.kernels.parallel import one_thread, ordered_map
from tenpak.work import Unit, Work

__all__ = [
    "Lookup",
    "Numbered",
    "bias_of",
    "corrected_bias",
    "decode_tensor",
    "dense_tensor",
    "encode_entries",
    "encode_unit",
    "learn_shared",
    "require_finite",
    "stored_reader",
    "unit_statistics",
]

Lookup = Callable[[Weight], Sequence[Statistics | None]]
"""Gives the statistics of a tensor's matrices."""


@dataclass(frozen=True)
class Numbered:
    """An entry of the plan that is encoded, and its place in the plan."""

    number: int
    entry: PlanEntry


def learn_shared(
    checkpoint: Checkpoint, entries: Iterable[Numbered], work: Work, done: Callable[[Weight], None] | None = None
) -> None:
    """Learn what tensors of a codec share, from all of them as the checkpoint has them, and keep it.

    Args:
        checkpoint: the source.
        entries: all entries of the plan whose codec has something to share.
        work: where it goes, or is found.
        done: called after each tensor that was read for it.

    Raises:
        CheckpointError: a tensor cannot be read.
        CodecError: a weight cannot be encoded; names it.
        ArtifactError: the work folder cannot be written.
    """
    groups: dict[Codec, list[Weight]] = {}
    for item in entries:
        assert item.entry.codec is not None  # dense entries have none
        groups.setdefault(item.entry.codec, []).append(item.entry.weight)
    for codec, weights in groups.items():
        if not work.shared(codec.to_json()):
            work.put_shared(codec.to_json(), codec.learn(_matrices(checkpoint, weights, done)))


def _matrices(
    checkpoint: Checkpoint, weights: Iterable[Weight], done: Callable[[Weight], None] | None
) -> Iterator[Tensor]:
    """All matrices of these tensors, ``[out, in]``, one after the other."""
    for weight in weights:
        for matrix in weight.unstacked(checkpoint.read(weight.name)):
            try:
                require_matrix(matrix)
            except CodecError as error:
                raise CodecError(f"{weight.name}: {error}", hint=error.hint) from error
            yield matrix
        if done is not None:
            done(weight)


def encode_entries(
    checkpoint: Checkpoint,
    entries: Iterable[Numbered],
    work: Work,
    statistics: Lookup | None = None,
    done: Callable[[Weight], None] | None = None,
) -> None:
    """Encode tensors of a plan that are not finished yet, and keep them.

    Args:
        checkpoint: the source.
        entries: entries with a codec.
        work: where finished tensors are, and go.
        statistics: of tensors whose codec needs them.
        done: called after each tensor, in order.

    Raises:
        CheckpointError: a tensor cannot be read.
        CodecError, CalibrationError: a weight cannot be encoded; names it.
        ArtifactError: the work folder cannot be written.
    """

    def encode(item: Numbered) -> tuple[Numbered, bool]:
        weight, codec = item.entry.weight, item.entry.codec
        assert codec is not None  # dense entries are not encoded
        if work.has(item.number, weight.name):
            return item, True
        found = statistics(weight) if statistics is not None and codec.needs_statistics else None
        shared = work.shared(codec.to_json())
        work.put(item.number, weight.name, encode_unit(codec, weight, checkpoint.read(weight.name), found, shared))
        return item, False

    for item, reused in ordered_map(encode, entries):
        if reused:
            work.reused.append(item.entry.weight.name)
        if done is not None:
            done(item.entry.weight)


def encode_unit(
    codec: Codec,
    weight: Weight,
    tensor: Tensor,
    statistics: Sequence[Statistics | None] | None = None,
    shared: Mapping[str, Tensor] | None = None,
) -> Unit:
    """A tensor encoded, with what an artifact says of it and, for a layer that may have a bias, its correction.

    What encoding leaves of the target, E, moves the mean of the output by E·E[x]; a bias can take that up.

    Args:
        codec: what encodes it.
        weight: what it is.
        tensor: its values, in their stored shape.
        statistics: of its matrices; a matrix of which nothing is known takes those of unit inputs, which is to say
            that it is rounded without data.
        shared: what it shares with other tensors of the codec, where these have anything in common.

    Raises:
        CodecError, CalibrationError: of the codec's own kind, naming the tensor.
    """
    matrices = weight.unstacked(tensor)
    found = statistics if statistics is not None else [None] * len(matrices)
    payloads, bias = [], None
    try:
        for target, known in zip(matrices, found, strict=True):
            if statistics is not None and (known is None or known.metric is None):
                known = unit_statistics(target.shape[1])
            elif known is not None:
                with one_thread():
                    target = corrected(target, known)
            payloads.append(codec.encode_sharing(target, shared or {}, known))
            if weight.kind == "matrix" and known is not None and known.count and known.mean is not None:
                with one_thread():
                    bias = (target.float() - codec.decode(payloads[-1])) @ known.mean
    except (CodecError, CalibrationError) as error:
        raise type(error)(f"{weight.name}: {error}", hint=error.hint) from error
    counts = tuple(known.count or 0 if known is not None else 0 for known in statistics or ())
    return Unit(tuple(payloads), tensor_sha256(tensor), counts, bias)


def bias_of(weight: Weight) -> str:
    """The name that the bias of a weight's layer would have."""
    return weight.name.removesuffix("weight") + "bias"


def corrected_bias(bias: Tensor, change: Tensor) -> Tensor:
    """A bias with what its weight's encoding left, in its own dtype."""
    return (bias.float() + change).to(bias.dtype)


def decode_tensor(codec: Codec, weight: Weight, payloads: Sequence[Payload]) -> Tensor:
    """The tensor that payloads stand for, FP32, in the shape in which the checkpoint stores it."""
    matrices = [codec.decode(payload) for payload in payloads]
    if weight.transposed:
        matrices = [matrix.T for matrix in matrices]
    return torch.stack(matrices).reshape(weight.shape)


def dense_tensor(entry: PlanEntry, tensor: Tensor) -> Tensor:
    """A dense tensor in the dtype in which it is stored."""
    return tensor if entry.narrowed is None else tensor.to(TORCH_DTYPES[entry.narrowed])


def stored_reader(checkpoint: Checkpoint, entries: Sequence[PlanEntry], work: Work) -> Callable[[Weight], Tensor]:
    """What gives a tensor of the checkpoint as an artifact will hold it; encoded ones as far as they are finished.

    Args:
        checkpoint: the source.
        entries: of the whole plan.
        work: finished tensors.
    """
    numbers = {entry.weight.name: number for number, entry in enumerate(entries)}
    layers = {bias_of(entry.weight): entry for entry in entries if entry.codec is not None}

    def unit(entry: PlanEntry | None) -> Unit | None:
        return None if entry is None else work.get(numbers[entry.weight.name], entry.weight.name)

    def read(weight: Weight) -> Tensor:
        entry = entries[numbers[weight.name]]
        if entry.codec is not None:
            found = unit(entry)
            if found is None:
                return checkpoint.read(weight.name)
            return decode_tensor(entry.codec, weight, found.payloads)
        tuned = work.tuned
        if tuned is not None and weight.name in tuned.dense:
            return tuned.dense[weight.name]
        found, value = unit(layers.get(weight.name)), checkpoint.read(weight.name)
        if found is not None and found.bias is not None:
            value = corrected_bias(value, found.bias)
        return dense_tensor(entry, value)

    return read


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise CodecError where a tensor that stays dense holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise CodecError(
            f"{name}: the weight holds NaN or infinite values",
            hint="the checkpoint is broken: obtain it again, or repair that tensor",
        )


def unit_statistics(columns: int) -> Statistics:
    """Statistics of inputs of which nothing is known."""
    ones = torch.ones(columns)
    return Statistics(count=0, hessian=torch.eye(columns), mean=torch.zeros(columns), mean_abs=ones)
