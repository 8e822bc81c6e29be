"""The straight line: checkpoint → plan → encode → artifact → evaluate → report.

A few tensors are in memory at a time, never a model, except for tuning. The evaluation runs in a fresh process, on the
files that were written.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tenpak.allocation.budget import Budget
from tenpak.artifact.leftovers import remove_unused
from tenpak.artifact.schema import MANIFEST_NAME, load_manifest
from tenpak.artifact.writer import MAX_SHARD_BYTES, ArtifactWriter, check_output
from tenpak.calibrating import DEFAULT_TOKENS
from tenpak.dial import Found, Knob, Measure, Search, dial, promise, report_of
from tenpak.errors import ArtifactError, BudgetError, CalibrationError, CodecError
from tenpak.job import Job, open_job
from tenpak.knobs import Room, Step
from tenpak.measuring import check_text, evaluate_apart, require_other_text
from tenpak.policies import Policy, refuse_budget
from tenpak.profiling import Candidates
from tenpak.publishing import publish, record, versions
from tenpak.recovery import chosen_steps
from tenpak.report.report import Report, measured
from tenpak.task import Progress, Propagation, Task, encode_all, prepare
from tenpak.work import Work, default_work

__all__ = ["Progress", "compress"]


def compress(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | None = None,
    policy: Policy | str | None = None,
    budget: str | None = None,
    candidates: Sequence[str] = (),
    plan: str | Path | None = None,
    overrides: Sequence[str] = (),
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    calibration_window: int | None = None,
    statistics: str | Path | None = None,
    propagation: Propagation = "original",
    tuning: int | None = None,
    work: str | Path | None = None,
    evaluation: str | Path | None = None,
    allow_overlap: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Compress a model into an artifact and, given a text, measure what that cost.

    Args:
        source: model folder or hub id; FP32, FP16 or BF16 safetensors (or a weights-only ``pytorch_model.bin``).
        out: folder to write; must not exist, unless ``overwrite`` and it holds an artifact.
        recipe: codec of the blocks' matrices: a recipe string, a preset's name, or JSON; ``int4:g32`` where neither it
            nor a budget is given. With a policy, what that builds on.
        policy: decides the codec of each tensor, by name or as a ``Policy`` with options; excludes a budget. What it
            decides is recorded as recipe and overrides. ``buckets-fisher`` needs ``statistics``.
        budget: instead of a recipe, what the artifact may cost: ``"10x"``, ``"3.2bpw"``, ``"25MB"`` of weight files,
            met to half a per cent and never exceeded, or ``"kl=0.01"``, ``"ppl=1%"`` on the evaluation text. The
            flagship codec compresses every matrix then, unless there are candidates; see ``knobs``.
        candidates: with a budget, what to choose from for each tensor, ``"RECIPE,RECIPE"`` or
            ``"PATTERN=RECIPE,RECIPE"``; see ``profiling.Candidates``.
        plan: instead of a recipe, a file that gives each tensor one, see ``allocation.saved_plan``.
        overrides: ``"PATTERN=RECIPE"`` per tensor; the last match wins.
        calibration: text (file, folder or dataset id) for codecs that need statistics; None takes the model's own text
            (``texts/calibration.txt`` in its folder) or samples one from it. Never the evaluation text. With a budget,
            ``"none"`` is the quick mode: all inputs count the same.
        calibration_tokens: read at most this many of its tokens.
        calibration_window: tokens per window, by default the model's context (at most 4096).
        statistics: folder that ``calibrate`` wrote for this model. With ``calibration`` as well, the same text, blocks
            see the compression of those before them; without it, only these statistics are used.
        propagation: what a block's rounding knows of the compression of those before it: ``"original"`` corrects its
            target towards the original model's outputs, ``"own"`` only looks at the inputs that it will get,
            ``"none"`` uses the statistics of the original model.
        tuning: at most so many steps of distillation from the original, on the calibration text, of what stays
            continuous (scales of the flagship codec, norms, biases), see ``recovery``; by default 240 with a budget
            where memory suffices for it, and none with a recipe.
        work: folder for finished tensors, from which a run that was stopped goes on; beside ``out`` by default, and
            removed when the artifact is complete.
        evaluation: text (file, folder or dataset id) to measure on; None leaves the artifact unmeasured.
        allow_overlap: measure on it even though more than a per cent of it occurs in the calibration text; how much is
            recorded in any case.
        seed: recorded, and used by codecs that draw random numbers.
        overwrite: replace an artifact at ``out``.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code from the checkpoint.
        max_shard_bytes: weight files are split above this size.
        progress: called with what is done (a phase, or the tensor just encoded), how much of it, and how much there is.

    Returns:
        The report, which is also ``report.json`` in the artifact.

    Raises:
        RecipeError: the recipe, an override or the policy cannot be used.
        AllocationError: the budget cannot be understood or met; the message states what can be.
        CheckpointError: the source cannot be read or is not a decoder-only language model.
        CalibrationError: a text cannot be used, or that to measure on is calibrated on; nothing is written.
        CodecError: a weight cannot be encoded; names it.
        OutputExistsError, ArtifactError: the output cannot be written, or ``work`` belongs to another run.
        EvaluationError: the text or the tokenizer is of no use, or the artifact is written but measuring it failed.
    """
    out, started = Path(out), time.perf_counter()
    check_output(out, overwrite=overwrite)
    spent, choice = _budget(recipe, policy, plan, budget, evaluation), _candidates(candidates, budget, calibration)
    job = open_job(
        source,
        recipe,
        overrides,
        policy=policy,
        plan=plan,
        statistics=statistics,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    job, knob = _turnable(job, spent, choice, calibrated=calibration != "none")
    check_text(job, evaluation, trust_remote_code)
    task = prepare(
        job,
        calibration,
        tokens=calibration_tokens,
        window=calibration_window,
        statistics=statistics,
        propagation=propagation,
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    shared = require_other_text(task, evaluation, allowed=allow_overlap)
    steps = chosen_steps(task, tuning, by_default=spent is not None)
    with ExitStack() as stack:
        root = _opened(out, work, _run(task, "by budget" if spent else job.recipe, choice), stack)
        passed = root.folder / "passes" / "artifact"
        writer = partial(ArtifactWriter, passed, overwrite=True, max_shard_bytes=max_shard_bytes)
        measure = partial(_measured_pass, writer, evaluation, spent, progress)
        found, units = _encoded(Search(task, root, measure, steps, max_shard_bytes, progress), knob, spent, stack)
        publish(found.task, units, ArtifactWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes), progress)
    return _recorded(out, found, spent, len(units.reused), started, evaluation, shared, progress)


def _recorded(
    out: Path,
    found: Found,
    spent: Budget | None,
    reused: int,
    started: float,
    evaluation: str | Path | None,
    shared: float | None,
    progress: Progress | None,
) -> Report:
    """The report of what was written, with its quality where there is a text; recorded in the artifact."""
    remove_unused(out.parent, f".{glob.escape(out.name)}.work-*")  # of runs that were to make another artifact here
    source = found.task.job.checkpoint
    report = measured(out, source.bytes, seconds=time.perf_counter() - started, reused=reused)
    search = None if spent is None else report_of(found, spent)
    if evaluation is not None:
        record(out, report.with_search(search), source)  # measuring may fail or be interrupted
        quality = _known(out, found) or evaluate_apart(out, found.task, evaluation, progress)
        report = report.with_quality({**quality, "overlap": shared})
    if spent is not None and search is not None:
        search |= {"promise": promise(report, spent)}
    return record(out, report.with_search(search), source)


def _known(out: Path, found: Found) -> dict[str, Any]:
    """What a search has measured of the same files; nothing where these are others."""
    if found.measure is None or found.measure.files != load_manifest(out / MANIFEST_NAME).files:
        return {}
    return dict(found.measure.quality)


def _work_folder(work: str | Path | None, out: Path, run: dict[str, Any]) -> Path:
    """Where finished tensors go."""
    if work is None:
        return default_work(out, run)
    if out.resolve() in (Path(work).resolve(), *Path(work).resolve().parents):
        raise ArtifactError(f"the work folder {work} lies in the output", hint="choose another --work")
    return Path(work)


def _budget(
    recipe: str | None,
    policy: Policy | str | None,
    plan: str | Path | None,
    budget: str | None,
    evaluation: str | Path | None,
) -> Budget | None:
    """The budget that was asked for, after a check that it makes sense with the rest."""
    if budget is None:
        return None
    refuse_budget(policy, budget)
    if recipe is not None or plan is not None:
        other = f"recipe ({recipe})" if plan is None else f"plan ({plan})"
        raise BudgetError(
            f"a budget ({budget}) chooses the codec itself and excludes a {other}",
            hint="leave out one of them; --set PATTERN=RECIPE still decides for single tensors",
        )
    spent = Budget.parse(budget)
    if not spent.is_size and evaluation is None:
        raise BudgetError(f"the budget {spent} is measured on a text, and there is none", hint="give --evaluation TEXT")
    return spent


def _candidates(candidates: Sequence[str], budget: str | None, calibration: str | Path | None) -> Candidates | None:
    """The candidates that were given, after a check that they make sense with the rest."""
    if not candidates:
        return None
    if budget is None:
        raise BudgetError("candidates need a budget that chooses among them", hint="e.g. --target 10x")
    if calibration == "none":
        raise CalibrationError(
            "choosing among candidates takes statistics of a text", hint="give --calibration TEXT, or no candidates"
        )
    return Candidates.parse(candidates)


def _turnable(
    job: Job, spent: Budget | None, choice: Candidates | None, *, calibrated: bool
) -> tuple[Job, Knob | None]:
    """What a budget turns, and the job as that wants it calibrated; the job as it is where there is no budget."""
    if spent is None:
        return job, None
    knob = Step(calibrated) if choice is None else Room(job, choice)
    return knob.job(job), knob


def _encoded(search: Search, knob: Knob | None, spent: Budget | None, stack: ExitStack) -> tuple[Found, Work]:
    """All tensors encoded and tuned, after the search that a budget takes, and the folder where they are."""
    if spent is not None and knob is not None:
        return dial(search, knob, spent, stack)
    encode_all(search.task, search.root, search.progress)
    return Found(search.task, ()), search.tuned(search.task, search.root, "recipe", stack)


def _measured_pass(
    writer: Callable[[], ArtifactWriter],
    evaluation: str | Path | None,
    spent: Budget | None,
    progress: Progress | None,
    task: Task,
    units: Work,
) -> Measure:
    """The loss of a pass: written, and measured from its files in a fresh process."""
    assert evaluation is not None  # the budget was checked
    assert spent is not None  # nothing is measured without one
    output = writer()
    publish(task, units, output, progress)
    found, name = evaluate_apart(output.out, task, evaluation, progress), "kl" if spent.kind == "kl" else "ppl_increase"
    files = load_manifest(output.out / MANIFEST_NAME).files
    return Measure(found[name], found[f"{name}_se"], found["tokens"], found, files)


def _run(task: Task, recipe: str, candidates: Candidates | None) -> dict[str, Any]:
    """What the bytes of the artifact depend on: a run of anything else cannot go on with its work.

    Not which budget: a search for another one goes on from the same statistics and passes.
    """
    return {
        **task.inputs,
        "recipe": recipe,
        **({} if candidates is None else {"candidates": candidates.to_json()}),
        "overrides": list(task.job.overrides),
        "versions": {"tenpak": version("tenpak"), **versions()},
    }


def _opened(out: Path, work: str | Path | None, run: dict[str, Any], stack: ExitStack) -> Work:
    """The work folder of a run, in use as long as ``stack``."""
    opened = stack.enter_context(Work(_work_folder(work, out, run), run))
    stack.enter_context(_kept(opened))
    return opened


@contextmanager
def _kept(work: Work) -> Iterator[None]:
    """Keep the finished work of a run that is stopped; not that of one which is complete or could only fail again."""
    try:
        yield
    except BaseException as error:
        if work.empty or isinstance(error, CodecError):
            work.remove()
        raise
    work.remove()
