"""Encoding a whole plan: which statistics it needs, where they come from, and in which order tensors are encoded.

What is in no block (embeddings, head) is encoded with statistics of the original model, or without any. Where blocks'
codecs need statistics, blocks follow one after another (``sequential``), unless ``propagation="none"`` asks that they,
too, take those of the original model. A plan that needs no statistics is encoded tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tenpak.calibrating import Progress, Reading, collect_into, read_text, warn_if_short
from tenpak.calibration.experts import rows_before
from tenpak.calibration.skeleton import OUTSIDE, Skeleton
from tenpak.calibration.statistics import StatisticsFolder
from tenpak.checkpoint.source import fingerprint, tensor_sha256
from tenpak.checkpoint.structure import Weight
from tenpak.encoding import Lookup, Numbered, encode_entries, learn_shared, stored_reader
from tenpak.errors import CalibrationError
from tenpak.job import Job
from tenpak.sequential import Walk, encode_blocks
from tenpak.work import Work

__all__ = [
    "Progress",
    "Propagation",
    "Task",
    "counter",
    "coverage",
    "encode_all",
    "numbered",
    "prepare",
    "statistics_of",
]

Propagation = Literal["original", "own", "none"]


@dataclass(frozen=True)
class Task:
    """A job with what it is calibrated on.

    Attributes:
        job: checkpoint and plan.
        reading: the text to read; None where nothing is calibrated, or ``statistics`` say everything.
        statistics: collected before, of the original model; None where there are none.
        propagation: see ``pipeline.compress``; ``"none"`` where there is no text to read.
        seed: of labels drawn for the curvature.
        trust_remote_code: let transformers run model code from the checkpoint.
    """

    job: Job
    reading: Reading | None = None
    statistics: StatisticsFolder | None = None
    propagation: Propagation = "original"
    seed: int = 0
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any] | None:
        """What the manifest records of the calibration; None where nothing is calibrated."""
        if self.reading is None and self.statistics is None:
            return None
        if self.reading is not None:
            return {**self.reading.to_json(), "propagation": self.propagation}
        assert self.statistics is not None  # one of the two is there
        origin = self.statistics.origin
        read = {"text": origin.text, "text_sha256": origin.text_sha256, "tokens": origin.tokens}
        return {**read, "window": origin.window, "propagation": "none"}

    @property
    def inputs(self) -> dict[str, Any]:
        """What statistics and codes depend on besides the plan: source, text, statistics given, seed; JSON."""
        return {
            "source": fingerprint(self.job.checkpoint),
            "calibration": self.to_json(),
            "tokens": None if self.reading is None else tensor_sha256(self.reading.tokens),
            "statistics": None if self.statistics is None else asdict(self.statistics.origin),
            "seed": self.seed,
        }

    @property
    def calibrated(self) -> bool:
        """Whether there is anything to calibrate on."""
        return self.reading is not None or self.statistics is not None

    @property
    def texts(self) -> set[str]:
        """Hashes of the texts that are calibrated on."""
        found = self.to_json()
        return set() if found is None else set(found["text_sha256"].split(", "))


def prepare(
    job: Job,
    calibration: str | Path | None = None,
    *,
    tokens: int,
    window: int | None = None,
    statistics: str | Path | None = None,
    propagation: Propagation = "original",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Task:
    """Find out what a job's calibration needs, and read its text; arguments are those of ``pipeline.compress``.

    Raises:
        CalibrationError: the text or the statistics cannot be used for this model.
    """
    if propagation not in get_args(Propagation):
        raise CalibrationError(
            f"propagation {propagation!r} is not known", hint=f"choose from {', '.join(get_args(Propagation))}"
        )
    needed = [item.entry.weight for item in numbered(job) if item.entry.codec and item.entry.codec.needs_statistics]
    if not needed:
        return Task(job, seed=seed, trust_remote_code=trust_remote_code)
    known = None if statistics is None else StatisticsFolder(statistics)
    if known is not None:
        known.require_source(job.checkpoint)
        if calibration is None:
            return Task(job, None, known, "none", seed, trust_remote_code)
    reading = read_text(
        job, calibration, tokens=tokens, window=window, trust_remote_code=trust_remote_code, progress=progress
    )
    warn_if_short(reading, needed)
    if known is not None and reading.text.sha256 not in known.origin.text_sha256.split(", "):
        raise CalibrationError(
            f"the statistics in {known.folder} are of the text {known.origin.text}, not of {reading.text.name}",
            hint="give the text that they were collected on, or no --calibration, or no --statistics",
        )
    return Task(job, reading, known, propagation, seed, trust_remote_code)


def numbered(job: Job) -> list[Numbered]:
    """The entries of a plan that are encoded, with their places in it."""
    entries = enumerate(job.plan.entries)
    return [Numbered(n, e) for n, e in entries if e.codec is not None and e.weight.tied_to is None]


def encode_all(task: Task, work: Work, progress: Progress | None = None, *, statistics: Path | None = None) -> None:
    """Encode every tensor of a plan that has a codec; finished ones are in ``work`` afterwards.

    Args:
        task: what is to be encoded.
        work: where finished tensors are, and go.
        progress: called after each tensor.
        statistics: where those of the original model are kept, by default in ``work``.

    Raises:
        CheckpointError: a tensor cannot be read.
        CodecError, CalibrationError: a weight cannot be encoded; names it.
        ArtifactError: the work folder cannot be written.
    """
    items = numbered(task.job)
    sharing = [item for item in items if item.entry.codec is not None and item.entry.codec.shared_fields]
    learn_shared(task.job.checkpoint, sharing, work, counter(sharing, progress, "learning"))
    done = counter(items, progress)
    needing = [item for item in items if item.entry.codec is not None and item.entry.codec.needs_statistics]
    if not needing:
        encode_entries(task.job.checkpoint, items, work, done=done)
        return
    models = None
    if task.reading is not None and task.propagation != "none":
        models = _skeletons(task)
    inside = {item.number for item in items if models and models[1].place(item.entry.weight.parameter) != OUTSIDE}
    if not any(item.number in inside for item in needing):
        inside = set()
    outside = [item for item in items if item.number not in inside]
    folder = statistics or work.folder / "statistics"
    known = task.statistics or _collect(task, folder, [i for i in needing if i.number not in inside], needing, progress)
    lookup = None if known is None else _lookup(known, items)
    encode_entries(task.job.checkpoint, outside, work, lookup, done)
    if inside and models is not None:
        assert task.reading is not None  # models are only made with a text
        original, compressed = models
        weighed = lookup if any(i.entry.codec is not None and i.entry.codec.uses_curvature for i in needing) else None
        walk = Walk(
            original if task.propagation == "original" else None,
            compressed,
            task.reading.tokens,
            task.reading.window,
            work,
            stored_reader(task.job.checkpoint, task.job.plan.entries, work),
            weighed,
            done,
            folder=work.folder,
        )
        encode_blocks(walk, items)


def statistics_of(task: Task, folder: Path, progress: Progress | None = None) -> Lookup | None:
    """The original model's statistics of all tensors that need them, collected unless they are in ``folder``."""
    items = numbered(task.job)
    needing = [item for item in items if item.entry.codec is not None and item.entry.codec.needs_statistics]
    known = task.statistics or _collect(task, folder, needing, needing, progress)
    return None if known is None else _lookup(known, items)


def coverage(job: Job, work: Work) -> dict[str, list[int]]:
    """Expert tensor → how many tokens each of its matrices saw, for those that were calibrated."""
    found = {}
    for item in numbered(job):
        unit = work.get(item.number, item.entry.weight.name) if item.entry.weight.kind == "expert" else None
        if unit is not None and unit.counts:
            found[item.entry.weight.name] = list(unit.counts)
    return found


def _skeletons(task: Task) -> tuple[Skeleton, Skeleton]:
    weights = [entry.weight for entry in task.job.plan.entries]
    first, second = (
        Skeleton.build(task.job.checkpoint, weights, trust_remote_code=task.trust_remote_code) for _ in range(2)
    )
    return first, second


def _collect(
    task: Task, folder: Path, outside: Sequence[Numbered], needing: Sequence[Numbered], progress: Progress | None
) -> StatisticsFolder | None:
    """Statistics of the original model, where anything needs them; kept in ``folder``."""
    curvature = any(item.entry.codec is not None and item.entry.codec.uses_curvature for item in needing)
    curvature = curvature or any(item.entry.weight.kind == "embedding" for item in outside)
    if task.reading is None or not (curvature or outside):
        return None
    try:
        return StatisticsFolder(folder)
    except CalibrationError:
        return collect_into(
            folder,
            task.job,
            task.reading,
            curvature=curvature,
            seed=task.seed,
            trust_remote_code=task.trust_remote_code,
            progress=progress,
        )


def _lookup(known: StatisticsFolder, items: Sequence[Numbered]) -> Lookup:
    before = rows_before([item.entry.weight for item in items])
    return lambda weight: known.of(weight, rows_before=before.get(weight.name, 0))


def counter(items: Sequence[Numbered], progress: Progress | None, phase: str | None = None) -> Callable[[Weight], None]:
    """Tells ``progress`` of each of these tensors that is done, in weights, by its name or that of the phase."""
    done, total = 0, sum(item.entry.weight.numel for item in items)

    def tick(weight: Weight) -> None:
        nonlocal done
        done += weight.numel
        if progress is not None:
            progress(phase or weight.name, done, total)

    return tick
