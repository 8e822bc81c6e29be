"""The straight line: checkpoint → plan → encode → artifact → evaluate → report.

A few tensors are in memory at a time, never a model. The evaluation runs in a fresh process, on the files that were
written.
"""

from __future__ import annotations

import glob
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tenpak.allocation.budget import Budget
from tenpak.allocation.plan import is_parameter
from tenpak.artifact.leftovers import remove_unused
from tenpak.artifact.schema import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    Source,
    dump_manifest,
    load_manifest,
)
from tenpak.artifact.writer import (
    CARD_NAME,
    MAX_SHARD_BYTES,
    REPORT_NAME,
    ArtifactWriter,
    check_output,
    replace_file,
)
from tenpak.calibrating import DEFAULT_TOKENS
from tenpak.calibration.choice import Text
from tenpak.checkpoint.source import Checkpoint, fingerprint, source_sha256, tensor_sha256
from tenpak.dial import Dialled, dial, dialled_job, report_of
from tenpak.encoding import bias_of, corrected_bias, require_finite
from tenpak.errors import ArtifactError, BudgetError, CalibrationError, CodecError, EvaluationError
from tenpak.job import Job, open_job
from tenpak.report.card import model_card
from tenpak.report.report import Report, measured
from tenpak.task import Progress, Propagation, Task, coverage, encode_all, numbered, prepare
from tenpak.work import Work, default_work

__all__ = ["Progress", "compress"]

# Files of a model folder that an artifact keeps as they are: tokenizer, chat template, generation config, licence.
_KEPT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def compress(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | None = None,
    budget: str | None = None,
    overrides: Sequence[str] = (),
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    calibration_window: int | None = None,
    statistics: str | Path | None = None,
    propagation: Propagation = "original",
    work: str | Path | None = None,
    evaluation: str | Path | None = None,
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
            nor a budget is given.
        budget: instead of a recipe, what the artifact may cost: ``"10x"``, ``"3.2bpw"``, ``"25MB"`` of weight files,
            met to half a per cent and never exceeded, or ``"kl=0.01"``, ``"ppl=1%"`` on the evaluation text. The
            flagship codec compresses every matrix then; see ``dial``.
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
        work: folder for finished tensors, from which a run that was stopped goes on; beside ``out`` by default, and
            removed when the artifact is complete.
        evaluation: text (file, folder or dataset id) to measure on; None leaves the artifact unmeasured.
        seed: recorded, and used by codecs that draw random numbers.
        overwrite: replace an artifact at ``out``.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code from the checkpoint.
        max_shard_bytes: weight files are split above this size.
        progress: called after each tensor, and while the original model is read.

    Returns:
        The report, which is also ``report.json`` in the artifact.

    Raises:
        RecipeError: the recipe or an override cannot be used.
        AllocationError: the budget cannot be understood or met; the message states what can be.
        CheckpointError: the source cannot be read or is not a decoder-only language model.
        CalibrationError: a text cannot be used, or is given for both purposes; nothing is written.
        CodecError: a weight cannot be encoded; names it.
        OutputExistsError, ArtifactError: the output cannot be written, or ``work`` belongs to another run.
        EvaluationError: the text or the tokenizer is of no use, or the artifact is written but measuring it failed.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    spent = _budget(recipe, budget, evaluation)
    job = open_job(source, recipe, overrides, revision=revision, trust_remote_code=trust_remote_code)
    if spent is not None:
        job = dialled_job(job, 1.0, calibrated=calibration != "none")
    if evaluation is not None:
        _check_text(job, evaluation, trust_remote_code)
    started = time.perf_counter()
    task = prepare(
        job,
        calibration,
        tokens=calibration_tokens,
        window=calibration_window,
        statistics=statistics,
        propagation=propagation,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    if evaluation is not None:
        _require_other_text(task, evaluation)
    run = _run(task, by_budget=spent is not None)
    if work is not None and out.resolve() in (Path(work).resolve(), *Path(work).resolve().parents):
        raise ArtifactError(f"the work folder {work} lies in the output", hint="choose another --work")
    with ExitStack() as stack:
        root = stack.enter_context(Work(Path(work) if work is not None else default_work(out, run), run))
        stack.enter_context(_kept(root))
        measure = partial(_measured_pass, root.folder / "passes" / "artifact", evaluation)
        task, units, search = _encoded(task, root, spent, measure, max_shard_bytes, progress, stack)
        _publish(task, units, ArtifactWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes))
        root.remove()
    remove_unused(out.parent, f".{glob.escape(out.name)}.work-*")  # of runs that were to make another artifact here
    report = measured(out, job.checkpoint.bytes, seconds=time.perf_counter() - started, reused=len(units.reused))
    report = report.with_search(search)
    licence = _licence(job.checkpoint)
    _record(out, report, licence)  # measuring may fail or be interrupted
    if evaluation is None:
        return report
    return _record(out, report.with_quality(_evaluate(out, task, evaluation)), licence)


def _budget(recipe: str | None, budget: str | None, evaluation: str | Path | None) -> Budget | None:
    """The budget that was asked for, after a check that it makes sense with the rest."""
    if budget is None:
        return None
    if recipe is not None:
        raise BudgetError(
            f"a budget ({budget}) chooses the codec itself and excludes a recipe ({recipe})",
            hint="leave out one of them; --set PATTERN=RECIPE still decides for single tensors",
        )
    spent = Budget.parse(budget)
    if not spent.is_size and evaluation is None:
        raise BudgetError(f"the budget {spent} is measured on a text, and there is none", hint="give --evaluation TEXT")
    return spent


def _encoded(
    task: Task,
    root: Work,
    spent: Budget | None,
    measure: Callable[[Budget, Task, Work], float],
    max_shard_bytes: int,
    progress: Progress | None,
    stack: ExitStack,
) -> tuple[Task, Work, dict[str, Any] | None]:
    """The task with all tensors encoded, the folder where they are, and the search that a budget took."""
    if spent is None:
        encode_all(task, root, progress)
        return task, root, None
    found, units = dial(Dialled(task, spent, root, partial(measure, spent), max_shard_bytes, progress), stack)
    return found.task, units, report_of(found, spent)


def _publish(task: Task, units: Work, output: ArtifactWriter) -> None:
    """Write the artifact of finished work."""
    job = task.job
    with output as writer:
        manifest = _manifest(task, _store(writer, job, units), coverage(job, units))
        writer.publish(manifest, _config(job), copied=_kept_files(job.checkpoint))


def _measured_pass(folder: Path, evaluation: str | Path | None, spent: Budget, task: Task, units: Work) -> float:
    """The loss of a pass: written, and measured from its files in a fresh process."""
    assert evaluation is not None  # the budget was checked
    _publish(task, units, ArtifactWriter(folder, overwrite=True))
    return float(_evaluate(folder, task, evaluation)["kl" if spent.kind == "kl" else "ppl_increase"])


def _run(task: Task, *, by_budget: bool) -> dict[str, Any]:
    """What the bytes of the artifact depend on: a run of anything else cannot go on with its work.

    Not which budget: a search for another one goes on from the same statistics and passes.
    """
    job = task.job
    return {
        "source": fingerprint(job.checkpoint),
        "recipe": "by budget" if by_budget else job.recipe,
        "overrides": list(job.overrides),
        "calibration": task.to_json(),
        "tokens": None if task.reading is None else tensor_sha256(task.reading.tokens),
        "statistics": None if task.statistics is None else asdict(task.statistics.origin),
        "seed": task.seed,
        "versions": {"tenpak": version("tenpak"), **_versions()},
    }


@contextmanager
def _kept(work: Work) -> Iterator[None]:
    """Keep the finished work of a run that is stopped; not that of one which could only fail again."""
    try:
        yield
    except BaseException as error:
        if work.empty or isinstance(error, CodecError):
            work.remove()
        raise


def _store(writer: ArtifactWriter, job: Job, work: Work) -> dict[str, str]:
    """Store every tensor of the plan; returns the hashes of the source's tensors."""
    hashes: dict[str, str] = {}
    layers = {bias_of(item.entry.weight): item for item in numbered(job)}
    for number, entry in enumerate(job.plan.entries):
        weight = entry.weight
        if entry.codec is not None and weight.tied_to is None:
            unit = work.get(number, weight.name)
            if unit is None:
                raise ArtifactError(
                    f"the finished tensor {weight.name!r} is gone from {work.folder}", hint="run the command again"
                )
            hashes[weight.name] = unit.source_sha256
            writer.add_weight(
                weight.name, unit.payloads, shape=weight.shape, dtype=weight.dtype, transposed=weight.transposed
            )
            continue
        tensor = job.checkpoint.read(weight.name)
        hashes[weight.name] = tensor_sha256(tensor)
        if weight.tied_to is None:
            if is_parameter(weight):  # masks and unused tensors may hold what they like
                require_finite(weight.name, tensor)
            layer = layers.get(weight.name)
            unit = None if layer is None else work.get(layer.number, layer.entry.weight.name)
            if unit is None or unit.bias is None:
                writer.add_dense(weight.name, tensor, entry.reason)
            else:
                reason = f"{entry.reason}, with the mean error of its layer's weight taken up"
                writer.add_dense(weight.name, corrected_bias(tensor, unit.bias), reason)
    return hashes


def _manifest(task: Task, hashes: Mapping[str, str], experts: Mapping[str, list[int]]) -> Manifest:
    job = task.job
    calibration = task.to_json()
    if calibration is not None and experts:
        calibration["experts"] = dict(experts)
    return Manifest(
        format_version=FORMAT_VERSION,
        tenpak_version=version("tenpak"),
        versions=_versions(),
        source=Source(
            name=job.checkpoint.name,
            sha256=source_sha256(job.checkpoint, hashes),
            bytes=job.checkpoint.bytes,
            parameters=job.plan.parameters,
        ),
        recipe=job.recipe,
        overrides=job.overrides,
        seed=task.seed,
        calibration=calibration,
        weights={},
        dense={},
        tied={e.weight.name: e.weight.tied_to for e in job.plan.entries if e.weight.tied_to is not None},
        files={},
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy", "safetensors")}


def _config(job: Job) -> dict[str, Any]:
    """``config.json`` of the source; states the dtype, which transformers would otherwise guess from the weights."""
    config = dict(job.checkpoint.config)
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        sizes: dict[str, int] = {}
        for info in job.checkpoint.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        config["dtype"] = names.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")
    return config


def _kept_files(checkpoint: Checkpoint) -> list[Path]:
    replaced = {"config.json", MANIFEST_NAME, REPORT_NAME, CARD_NAME}
    return sorted(
        path
        for path in checkpoint.folder.iterdir()
        if path.is_file()
        and (path.suffix in _KEPT_SUFFIXES or path.name.startswith("LICENSE"))
        and path.name not in replaced
        and not path.name.endswith(".index.json")
    )


def _licence(checkpoint: Checkpoint) -> str | None:
    """The ``license:`` line of the source's model card, if there is one."""
    card = checkpoint.folder / CARD_NAME
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] != ["---"]:
        return None
    for line in lines[1:]:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return None


def _require_other_text(task: Task, evaluation: str | Path) -> None:
    """A quality measured on the text that was calibrated on would flatter."""
    from tenpak.calibration.text import load_text

    if task.texts and Text(str(evaluation), load_text(evaluation)).sha256 in task.texts:
        raise CalibrationError(
            f"calibration and evaluation text are the same ({Path(evaluation).name})",
            hint="give another --evaluation text",
        )


def _check_text(job: Job, text: str | Path, trust_remote_code: bool) -> None:
    """Find out before the work, not after it, that there is nothing to measure on."""
    from tenpak.calibration.text import load_text, tokenize
    from tenpak.evaluation.evaluate import load_tokenizer

    tokenizer = load_tokenizer(job.checkpoint.folder, trust_remote_code=trust_remote_code)
    if tokenize(tokenizer, load_text(text)).numel() < 2:
        raise EvaluationError(f"the text at {str(text)!r} has a single token", hint="give a longer text")


def _evaluate(out: Path, task: Task, text: str | Path) -> dict[str, Any]:
    """Measure the written artifact in a fresh process."""
    command = [sys.executable, "-m", "tenpak", "evaluate", str(out), "--against", str(task.job.checkpoint.folder)]
    command += ["--text", str(text), "--json", *(["--trust-remote-code"] if task.trust_remote_code else [])]
    # Its progress would be drawn over that of this process; its error is told below.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
        raise EvaluationError(
            f"{out} is written, but measuring it failed: {reason}", hint="repeat it with `tenpak evaluate`"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _record(out: Path, report: Report, licence: str | None) -> Report:
    """Write the report, the card and, where measured, the quality in the manifest; each file atomically."""
    manifest = load_manifest(out / MANIFEST_NAME)
    if report.quality is not None:
        # Speeds differ from run to run; the manifest of the same inputs must not.
        quality = {key: value for key, value in report.quality.items() if not key.startswith("tokens_per_second")}
        manifest = manifest.model_copy(update={"quality": quality})
        replace_file(out / MANIFEST_NAME, dump_manifest(manifest))
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps({**report.to_json(), "environment": environment, "versions": manifest.versions}, indent=2)
    replace_file(out / REPORT_NAME, (text + "\n").encode())
    replace_file(out / CARD_NAME, model_card(report, manifest, licence).encode())
    return report
