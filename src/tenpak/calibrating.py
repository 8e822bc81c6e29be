"""From a text to statistics: what calibration reads, and what it finds.

The text is the user's, or ``texts/calibration.txt`` of the model's folder, or sampled from the model itself with a
fixed seed. The model runs in FP32, a block at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tenpak.calibration.activations import SPILL_BYTES
from tenpak.calibration.choice import Text, choose_text, first_tokens
from tenpak.calibration.collect import collect
from tenpak.calibration.heuristics import guess_curvature
from tenpak.calibration.skeleton import Skeleton
from tenpak.calibration.statistics import Origin, StatisticsFolder, new_folder, write_part, write_table
from tenpak.calibration.sums import Sums
from tenpak.calibration.text import context_length, sample_text
from tenpak.checkpoint.source import source_sha256
from tenpak.checkpoint.structure import Weight
from tenpak.errors import CalibrationError
from tenpak.evaluation.evaluate import load_original, load_tokenizer
from tenpak.job import Job, open_job

__all__ = [
    "DEFAULT_TEXT",
    "DEFAULT_TOKENS",
    "Progress",
    "Reading",
    "calibrate",
    "collect_into",
    "read_text",
    "warn_if_short",
]

DEFAULT_TEXT = Path("texts") / "calibration.txt"
DEFAULT_TOKENS = 131_072

# (what is being done, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]

_SAMPLED_TOKENS = 16_384
_SAMPLED_SEED = 1
# Below this many tokens per input the Hessian is mostly damping.
_TOKENS_PER_INPUT = 50


@dataclass(frozen=True)
class Reading:
    """What a model is calibrated on.

    Attributes:
        text: the text.
        tokens: those of its tokens that are read, int64 ``[tokens]``.
        window: tokens per window.
    """

    text: Text
    tokens: Tensor
    window: int

    def to_json(self) -> dict[str, Any]:
        """What manifests record."""
        return {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "tokens": self.tokens.numel(),
            "window": self.window,
        }


def read_text(
    job: Job,
    text: str | Path | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Reading:
    """The text to calibrate a job's model on, as tokens.

    Args:
        job: the model.
        text: file, folder or dataset id; None for the model's own text. Sampling one needs the model in memory.
        tokens: read at most this many.
        window: tokens per window, by default the model's context (at most 4096).
        trust_remote_code: let transformers run model code from the checkpoint.
        progress: called while a text is sampled.

    Raises:
        CalibrationError: the text cannot be used, or the tokenizer does not fit the model.
    """
    if tokens < 2:
        raise CalibrationError(f"{tokens} calibration tokens are not enough", hint="read at least 2, better 131,072")
    folder = job.checkpoint.folder
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)

    def sample() -> Text:
        model = load_original(folder, trust_remote_code=trust_remote_code)
        content = sample_text(
            model,
            tokenizer,
            tokens=min(tokens, _SAMPLED_TOKENS),
            seed=_SAMPLED_SEED,
            progress=None if progress is None else partial(progress, "sampling"),
        )
        return Text(f"sampled from the model, seed {_SAMPLED_SEED}", content, sampled=True)

    chosen = choose_text(text, folder / DEFAULT_TEXT, sample)
    ids = first_tokens(tokenizer, chosen.content, tokens, job.config.get_text_config().vocab_size)
    length = context_length(job.config) if window is None else window
    if length < 1:
        raise CalibrationError(f"a window of {length} tokens is not possible", hint="give at least 1")
    return Reading(chosen, ids, length)


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    fast: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    spill_bytes: int = SPILL_BYTES,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> StatisticsFolder:
    """Collect the statistics of a model on a text, and keep them in a folder.

    Args:
        source: model folder or hub id.
        out: folder to write; must not exist, unless it holds statistics and ``overwrite``.
        calibration: text (file, folder or dataset id); None for the model's own, or text sampled from it.
        tokens: read at most this many.
        window: tokens per window, by default the model's context (at most 4096).
        fast: forward only; the curvature is guessed from names and positions.
        seed: of the labels that are drawn from the model for the curvature.
        overwrite: replace statistics at ``out``.
        spill_bytes: hidden states beyond this go to disk.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code from the checkpoint.
        progress: called with what is done, and tokens done of it and in all, every block counted.

    Raises:
        CheckpointError: the source cannot be read.
        CalibrationError: the text cannot be used, the model overflows on it, or the disk is full.
        OutputExistsError: ``out`` exists.
    """
    out = Path(out)
    with new_folder(out, overwrite=overwrite) as folder:
        job = open_job(source, "dense", (), revision=revision, trust_remote_code=trust_remote_code)
        reading = read_text(
            job, calibration, tokens=tokens, window=window, trust_remote_code=trust_remote_code, progress=progress
        )
        warn_if_short(reading, [entry.weight for entry in job.plan.entries if entry.weight.kind != "dense"])
        collect_into(
            folder,
            job,
            reading,
            curvature=not fast,
            seed=seed,
            spill_bytes=spill_bytes,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    return StatisticsFolder(out)


def collect_into(
    folder: Path,
    job: Job,
    reading: Reading,
    *,
    curvature: bool,
    seed: int = 0,
    spill_bytes: int = SPILL_BYTES,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> StatisticsFolder:
    """Collect statistics into a folder, which is complete when this returns.

    Raises:
        CalibrationError: as ``collect``.
    """
    weights = tuple(entry.weight for entry in job.plan.entries)
    skeleton = Skeleton.build(job.checkpoint, weights, trust_remote_code=trust_remote_code)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[int] = []
    outputs = _outputs(weights)

    def sink(part: int, sums: Sums, extra: Any) -> None:
        if not curvature:
            guess_curvature(sums, part, len(skeleton.blocks), outputs)
        write_part(folder, part, sums, extra)
        written.append(part)

    collect(
        skeleton,
        reading.tokens,
        sink,
        window=reading.window,
        curvature=curvature,
        seed=seed,
        spill_bytes=spill_bytes,
        folder=folder,
        progress=None if progress is None else partial(progress, "calibrating"),
    )
    origin = Origin(
        source=job.checkpoint.name,
        source_sha256=source_sha256(job.checkpoint),
        seed=seed,
        method="full" if curvature else "fast",
        **reading.to_json(),
    )
    write_table(folder, origin, sorted(written))
    return StatisticsFolder(folder)


def _outputs(weights: Sequence[Weight]) -> dict[str, int]:
    """Parameter → outputs of each of its matrices; parts of an expert's rows add up."""
    found: dict[str, int] = {}
    for weight in weights:
        if weight.kind != "dense" and weight.tied_to is None and (weight.slot is None or weight.slot[0] == 0):
            found[weight.parameter] = found.get(weight.parameter, 0) + weight.matrix_shape[0]
    return found


def warn_if_short(reading: Reading, weights: Sequence[Weight]) -> None:
    """Warn where there are few tokens for the widest of the weights.

    Raises:
        CalibrationError: there are fewer than 2.
    """
    widest = max((weight.matrix_shape[1] for weight in weights), default=0)
    found, wanted = reading.tokens.numel(), _TOKENS_PER_INPUT * widest
    if found < 2:
        raise CalibrationError(
            f"the text {reading.text.name} has {found} token(s); {wanted} or more are advised for layers of {widest} "
            "inputs",
            hint="give a longer --calibration text",
        )
    if found < wanted:
        warnings.warn(
            f"{found} calibration tokens for layers of {widest} inputs; {wanted} or more are advised", stacklevel=3
        )
