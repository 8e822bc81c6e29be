"""How finished work becomes an artifact: tensors, manifest, the source's other files; then report and model card."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tenpak.allocation.plan import is_parameter
from tenpak.artifact.schema import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    Source,
    dump_manifest,
    load_manifest,
)
from tenpak.artifact.writer import CARD_NAME, REPORT_NAME, ArtifactWriter, replace_file
from tenpak.checkpoint.source import Checkpoint, source_sha256, tensor_sha256
from tenpak.encoding import bias_of, corrected_bias, dense_tensor, require_finite
from tenpak.errors import ArtifactError
from tenpak.job import Job
from tenpak.report.card import model_card
from tenpak.report.report import Report
from tenpak.task import Progress, Task, coverage, numbered
from tenpak.work import Work

__all__ = ["publish", "record", "versions"]

# Files of a model folder that an artifact keeps as they are: tokenizer, chat template, generation config, licence.
_KEPT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def publish(task: Task, units: Work, output: ArtifactWriter, progress: Progress | None = None) -> None:
    """Write the artifact of finished work; ``progress`` is told of each tensor, in stored elements."""
    job = task.job
    with output as writer:
        manifest = _manifest(task, _store(writer, job, units, progress), _calibration(task, units))
        writer.publish(manifest, _config(job), copied=_kept_files(job.checkpoint))


def record(out: Path, report: Report, source: Checkpoint) -> Report:
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
    replace_file(out / CARD_NAME, model_card(report, manifest, _licence(source)).encode())
    return report


def _store(writer: ArtifactWriter, job: Job, work: Work, progress: Progress | None) -> dict[str, str]:
    """Store every tensor of the plan; returns the hashes of the source's tensors."""
    hashes: dict[str, str] = {}
    done, total = 0, sum(entry.weight.numel for entry in job.plan.entries)
    tuned = {} if work.tuned is None else work.tuned.dense
    layers = {bias_of(item.entry.weight): item for item in numbered(job)}
    for number, entry in enumerate(job.plan.entries):
        weight = entry.weight
        if progress is not None:
            progress("writing", done, total)
        done += weight.numel
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
            reason = entry.reason
            if weight.name in tuned:
                tensor, reason = tuned[weight.name], f"{reason}, tuned"
            elif unit is not None and unit.bias is not None:
                tensor = corrected_bias(tensor, unit.bias)
                reason = f"{reason}, with the mean error of its layer's weight taken up"
            writer.add_dense(weight.name, dense_tensor(entry, tensor), reason)
    if progress is not None:
        progress("writing", done, total)
    return hashes


def _calibration(task: Task, units: Work) -> dict[str, Any] | None:
    """What the manifest records of calibration and tuning."""
    found = task.to_json()
    if found is not None:
        experts = coverage(task.job, units)
        found |= {"experts": experts} if experts else {}
        found |= {} if units.tuned is None else {"tuning": dict(units.tuned.about)}
    return found


def _manifest(task: Task, hashes: Mapping[str, str], calibration: dict[str, Any] | None) -> Manifest:
    job = task.job
    return Manifest(
        format_version=FORMAT_VERSION,
        tenpak_version=version("tenpak"),
        versions=versions(),
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


def versions() -> dict[str, str]:
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
