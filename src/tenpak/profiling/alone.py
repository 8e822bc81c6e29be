"""Predictions put to the test: the original with one tensor alone replaced, run beside the original itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tenpak.allocation.allocate import DENSE
from tenpak.allocation.profile import Measured, Option, Profile, ProfiledTensor
from tenpak.calibration.skeleton import Skeleton
from tenpak.checkpoint.structure import Weight
from tenpak.encoding import Lookup, decode_tensor, encode_unit
from tenpak.job import Job
from tenpak.recipes import parse
from tenpak.tuning.distil import divergence

__all__ = ["chosen", "measured_alone"]

_LEAST = 1e-7  # nats per token, below which the arithmetic of FP32 is measured


def chosen(profile: Profile, most: int) -> list[tuple[ProfiledTensor, Option]]:
    """What to measure: of the costliest tensors, options from the finest to the coarsest, ``most`` in all.

    A tensor's options are taken in turn, so that the measured losses span what the tensors' losses do.
    """
    able = [tensor for tensor in profile.tensors if any(option.recipe != DENSE for option in tensor.options)]
    able.sort(key=lambda tensor: -max(option.loss for option in tensor.options))
    found = []
    for number, tensor in enumerate(able[:most]):
        options = sorted(
            (option for option in tensor.options if option.recipe != DENSE and option.loss > _LEAST),
            key=lambda option: option.loss,
        )
        if options:
            found.append((tensor, options[-1 - number % len(options)]))
    return found


def measured_alone(
    job: Job,
    pairs: Sequence[tuple[ProfiledTensor, Option]],
    lookup: Lookup,
    windows: Tensor,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Measured, ...]:
    """The KL of each of these tensors replaced by what its option decodes to. Both models are in memory, in FP32.

    Args:
        job: of the model.
        pairs: tensors, each with the option to measure.
        lookup: gives the statistics that options are encoded with.
        windows: of text, int64 ``[windows, window]``.
        trust_remote_code: let transformers run model code from the checkpoint.
        progress: called after each.

    Raises:
        CheckpointError, CodecError, CalibrationError: a tensor cannot be read or encoded.
    """
    weights = {entry.weight.name: entry.weight for entry in job.plan.entries}
    original, other = (
        Skeleton.build(job.checkpoint, list(weights.values()), trust_remote_code=trust_remote_code) for _ in range(2)
    )
    for model in (original, other):
        model.load(model.parameters)
    found = []
    for number, (tensor, option) in enumerate(pairs):
        weight = weights[tensor.name]
        value = _replaced(job, weight, option.recipe, lookup)

        def read(asked: Weight, weight: Weight = weight, value: Tensor = value) -> Tensor:
            return value if asked.name == weight.name else job.checkpoint.read(asked.name)

        other.load([weight.parameter], read)
        kl = divergence(other, original, windows)
        other.load([weight.parameter])
        found.append(Measured(tensor=tensor.name, recipe=option.recipe, predicted=option.loss, kl=kl))
        if progress is not None:
            progress(f"measuring {tensor.name}", number + 1, len(pairs))
    return tuple(found)


def _replaced(job: Job, weight: Weight, recipe: str, lookup: Lookup) -> Tensor:
    """What a tensor becomes, FP32, in the shape in which it is stored."""
    codec = parse(recipe)
    assert codec is not None  # what stays dense is not measured
    statistics = lookup(weight) if codec.needs_statistics else None
    unit = encode_unit(codec, weight, job.checkpoint.read(weight.name), statistics)
    return decode_tensor(codec, weight, unit.payloads)
