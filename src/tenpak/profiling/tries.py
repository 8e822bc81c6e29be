"""Trying every candidate on every tensor: bytes and predicted loss of each.

A tensor is encoded with the statistics of the original model, whatever will become of those before it. Results are
kept line by line, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from tenpak.allocation.allocate import DENSE
from tenpak.allocation.patterns import alike
from tenpak.allocation.plan import PlanEntry, narrow_dtype
from tenpak.allocation.profile import Option, Profile, ProfiledTensor, ProfileSource
from tenpak.allocation.sensitivity import predicted_loss
from tenpak.calibration.statistics import StatisticsFolder
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.parts import places
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec, Statistics
from tenpak.codecs.nesting import require_alone
from tenpak.encoding import Lookup, encode_unit
from tenpak.errors import ArtifactError, RecipeError, UnsupportedShapeError
from tenpak.job import Job
from tenpak.kernels.parallel import ordered_map
from tenpak.profiling.candidates import Candidates
from tenpak.recipes import parse
from tenpak.task import Progress, Task, counter, numbered, statistics_of
from tenpak.work import Work

__all__ = ["profiled"]

_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "up"}


def profiled(
    task: Task, candidates: Candidates, fixed: Mapping[str, str], work: Work, progress: Progress | None = None
) -> Profile:
    """The profile of a task's model.

    Args:
        task: of ``observed``, with statistics or a text to collect them on.
        candidates: what to try.
        fixed: tensor → the one recipe that it has anyway.
        work: where results and statistics are kept.
        progress: called after each tensor.

    Raises:
        RecipeError: no candidate is meant for a tensor, or one shares something among tensors.
        CheckpointError: a tensor cannot be read.
        CodecError, CalibrationError: a weight cannot be encoded; names it.
        ArtifactError: the work folder cannot be written.
    """
    job = task.job
    items = numbered(job)
    able = [item.entry.weight for item in items]
    coded = sum(weight.numel for weight in able)
    wanted = {w.name: [fixed[w.name]] if w.name in fixed else candidates.of(w, coded) for w in able}
    bare = [name for name, recipes in wanted.items() if not recipes]
    if bare:
        raise RecipeError(f"no candidate is meant for {bare[0]!r}", hint="give candidates without a pattern as well")
    for codec in map(parse, dict.fromkeys(recipe for recipes in wanted.values() for recipe in recipes)):
        if codec is not None:
            require_alone(codec, "a profile, which tries tensors one by one")
    folder = work.folder / "statistics"
    lookup = statistics_of(task, folder, progress)
    assert lookup is not None  # the trellis codec needs them
    origin = (task.statistics or StatisticsFolder(folder)).origin
    kept = _Kept(work.folder / "passes" / "profile.jsonl")
    tick = counter(items, None if progress is None else lambda name, *rest: progress(f"profiling {name}", *rest))
    options: dict[str, tuple[Option, ...]] = {}

    def tried(weight: Weight) -> tuple[Weight, tuple[Option, ...]]:
        return weight, _options(job, weight, wanted[weight.name], lookup, origin.tokens, kept)

    for weight, found in ordered_map(tried, able):
        options[weight.name] = found
        tick(weight)
    entries = [entry for entry in job.plan.entries if entry.weight.tied_to is None]
    return Profile(
        source=ProfileSource(
            name=job.checkpoint.name,
            sha256=origin.source_sha256,
            parameters=job.plan.parameters,
            text=origin.text,
            tokens=origin.tokens,
        ),
        candidates=tuple(candidates.to_json()),
        tensors=_tensors(entries, options),
    )


def _options(
    job: Job, weight: Weight, recipes: Sequence[str], lookup: Lookup, tokens: int, kept: _Kept
) -> tuple[Option, ...]:
    """All candidates of a tensor that accept its shape; ``dense`` where none does."""
    size = weight.numel * DTYPE_BYTES[weight.dtype]
    missing = [recipe for recipe in recipes if recipe != DENSE and kept.get(weight.name, recipe) is None]
    if missing:
        tensor, statistics = job.checkpoint.read(weight.name), lookup(weight)
        for recipe in missing:
            codec = parse(recipe)
            assert codec is not None  # dense is none of the missing
            kept.put(weight.name, recipe, _tried(codec, weight, tensor, statistics, tokens))
    found = []
    for recipe in recipes:
        result = (size, 0.0) if recipe == DENSE else kept.get(weight.name, recipe)
        assert result is not None  # it was just kept
        if math.isfinite(result[1]):
            found.append(Option(recipe=recipe, bytes=result[0], loss=max(result[1], 0.0)))
    return tuple(found) or (Option(recipe=DENSE, bytes=size, loss=0.0),)


def _tried(
    codec: Codec, weight: Weight, tensor: Tensor, statistics: Sequence[Statistics | None], tokens: int
) -> tuple[int, float]:
    """Bytes and predicted loss of one candidate; an infinite loss where it does not accept the shape."""
    try:
        unit = encode_unit(codec, weight, tensor, statistics if codec.needs_statistics else None)
    except UnsupportedShapeError:
        return 0, math.inf
    decoded = [codec.decode(payload) for payload in unit.payloads]
    size = sum(payload.bits for payload in unit.payloads) // 8
    return size, predicted_loss(weight, tensor, decoded, statistics, tokens)


def _tensors(entries: Sequence[PlanEntry], options: Mapping[str, tuple[Option, ...]]) -> tuple[ProfiledTensor, ...]:
    weights = [entry.weight for entry in entries]
    groups = {w.name: group[0].name for group in alike([w for w in weights if w.kind == "expert"]) for w in group}
    found = places(weights)
    fused = {
        name: f"block {place.block}: {_FUSED[place.part]}" for name, place in found.items() if place.part in _FUSED
    }
    return tuple(
        ProfiledTensor(
            name=entry.weight.name,
            dtype=entry.weight.dtype,
            shape=entry.weight.shape,
            bytes=entry.weight.numel * DTYPE_BYTES[entry.weight.dtype],
            group=groups.get(entry.weight.name, entry.weight.name),
            fused=fused.get(entry.weight.name),
            options=options.get(entry.weight.name, ()),
            narrowed=narrow_dtype(entry.weight),
        )
        for entry in entries
    )


class _Kept:
    """Results by tensor and recipe, in a file to which each is added as a line of its own."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._found: dict[tuple[str, str], tuple[int, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # the last one may be cut short
                result: dict[str, Any] = json.loads(line)
                self._found[result["tensor"], result["recipe"]] = int(result["bytes"]), float(result["loss"])

    def get(self, tensor: str, recipe: str) -> tuple[int, float] | None:
        return self._found.get((tensor, recipe))

    def put(self, tensor: str, recipe: str, result: tuple[int, float]) -> None:
        line = json.dumps({"tensor": tensor, "recipe": recipe, "bytes": result[0], "loss": result[1]})
        try:
            with self._lock, self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # after whatever a run that was killed has left
        except OSError as error:
            raise ArtifactError(f"cannot write {self._path}: {error.strerror}", hint="free space there") from error
        self._found[tensor, recipe] = result
