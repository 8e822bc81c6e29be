"""``profile``: from a model, a text and candidates to a profile on disk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tenpak.allocation.profile import Profile
from tenpak.calibrating import DEFAULT_TOKENS
from tenpak.errors import AllocationError, CalibrationError, OutputExistsError
from tenpak.job import open_job
from tenpak.profiling.alone import chosen, measured_alone
from tenpak.profiling.candidates import DEFAULT_CANDIDATES, Candidates, fixed_by, observed
from tenpak.profiling.tries import profiled
from tenpak.task import Progress, Task, prepare, statistics_of
from tenpak.work import Work, default_work

__all__ = ["profile"]

_MEASURED_TOKENS = 8192


def profile(
    source: str | Path,
    out: str | Path,
    *,
    candidates: Sequence[str] = (DEFAULT_CANDIDATES,),
    overrides: Sequence[str] = (),
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    calibration_window: int | None = None,
    statistics: str | Path | None = None,
    measure: int = 0,
    work: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Try candidates on every tensor of a model and keep what each takes and costs.

    Args:
        source: model folder or hub id.
        out: file to write.
        candidates: ``"RECIPE,RECIPE"`` for all tensors, ``"PATTERN=RECIPE,RECIPE"`` for some; see ``Candidates``.
        overrides: ``"PATTERN=RECIPE"``: the only candidate of matching tensors.
        calibration: text that predictions are for: file, folder or dataset id; None for the model's own.
        calibration_tokens: read at most this many of its tokens.
        calibration_window: tokens per window, by default the model's context (at most 4096).
        statistics: folder that ``calibrate`` wrote for this model.
        measure: also measure so many of the predictions, of the costliest tensors, each alone; takes two models in
            memory and, per tensor, a pass over about 8,192 tokens of the text.
        work: folder for finished results, from which a run that was stopped goes on; beside ``out`` by default, and
            removed when the profile is complete.
        seed: of labels drawn for the curvature.
        overwrite: replace a file at ``out``.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code from the checkpoint.
        progress: called after each tensor, and while the original model is read.

    Raises:
        OutputExistsError: there is something at ``out``.
        RecipeError, CheckpointError, CalibrationError, CodecError: as ``pipeline.compress``.
        ArtifactError: profile or work folder cannot be written.
    """
    out = Path(out)
    if out.exists() and (out.is_dir() or not overwrite):
        raise OutputExistsError(f"{out} exists", hint="choose another -o, or pass --overwrite for a file")
    wanted = Candidates.parse(candidates)
    job = open_job(source, None, overrides, revision=revision, trust_remote_code=trust_remote_code)
    task = prepare(
        observed(job),
        calibration,
        tokens=calibration_tokens,
        window=calibration_window,
        statistics=statistics,
        propagation="none",
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if measure and task.reading is None:
        raise CalibrationError("measuring needs a text to measure on", hint="give --calibration TEXT as well")
    run = _run(task, wanted, job.overrides)
    with Work(default_work(out, run) if work is None else Path(work), run) as folder:
        found = profiled(task, wanted, fixed_by(job), folder, progress)
        if measure:
            found = _measured(task, found, measure, folder, progress)
        found.write(out)
        folder.remove()
    return found


def _run(task: Task, candidates: Candidates, overrides: Sequence[str]) -> dict[str, Any]:
    """What the results depend on."""
    return {
        **task.inputs,
        "purpose": "profile",
        "candidates": candidates.to_json(),
        "overrides": list(overrides),
        "versions": {name: version(name) for name in ("tenpak", "torch", "transformers")},
    }


def _measured(task: Task, found: Profile, most: int, work: Work, progress: Progress | None) -> Profile:
    assert task.reading is not None  # it was checked
    length = min(task.reading.window, task.reading.tokens.numel(), _MEASURED_TOKENS)
    windows = task.reading.tokens[: _MEASURED_TOKENS // length * length]
    windows = windows[: windows.numel() // length * length].view(-1, length)
    lookup = statistics_of(task, work.folder / "statistics", progress)
    assert lookup is not None  # they were collected for the profile
    pairs = chosen(found, most)
    if not pairs:
        raise AllocationError("there is nothing to measure: no candidate loses anything", hint="leave out --measure")
    with torch.no_grad():
        values = measured_alone(
            task.job, pairs, lookup, windows, trust_remote_code=task.trust_remote_code, progress=progress
        )
    return found.model_copy(update={"measured": values})
