"""The straight line: checkpoint → plan → encode → artifact → evaluate → report.

``compress`` is the whole of it; ``predict`` is the same line without reading a weight. One tensor is in memory at a
time. The evaluation runs in a fresh process, on the files that were written.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenpak.allocation.plan import Override, Plan, PlanEntry, make_plan
from tenpak.artifact.schema import (
    CODES_SUFFIX,
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
    predicted_bytes,
    replace_file,
)
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.source import Checkpoint, open_checkpoint, tensor_sha256
from tenpak.checkpoint.structure import Weight, bind, build_meta_model, check_coverage
from tenpak.codecs.base import Codec, Payload
from tenpak.errors import CodecError, EvaluationError
from tenpak.recipes import parse, parse_overrides
from tenpak.report.card import model_card
from tenpak.report.report import Report, measured

__all__ = ["Prediction", "Progress", "compress", "predict"]

# (tensor that comes next, weights done so far, weights in all)
Progress = Callable[[str, int, int], None]

# Files of a model folder that an artifact keeps as they are: tokenizer, chat template, generation config, licence.
_KEPT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    plan: Plan
    recipe: str
    overrides: Mapping[str, str]


def compress(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str = "int4:g32",
    overrides: Sequence[str] = (),
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
        recipe: codec of the blocks' matrices: a recipe string, a preset's name, or JSON.
        overrides: ``"PATTERN=RECIPE"`` per tensor; the last match wins.
        evaluation: text (file, folder or dataset id) to measure on; None leaves the artifact unmeasured.
        seed: recorded, and used by codecs that draw random numbers.
        overwrite: replace an artifact at ``out``.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code from the checkpoint.
        max_shard_bytes: weight files are split above this size.
        progress: called before each tensor.

    Returns:
        The report, which is also ``report.json`` in the artifact.

    Raises:
        RecipeError: the recipe or an override cannot be used.
        CheckpointError: the source cannot be read or is not a decoder-only language model.
        CodecError: a weight cannot be encoded; names it.
        OutputExistsError, ArtifactError: the output cannot be written; nothing is left behind.
        EvaluationError: the artifact is written, but measuring it failed.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    job = _open(source, recipe, overrides, revision=revision, trust_remote_code=trust_remote_code)
    started = time.perf_counter()
    hashes: dict[str, str] = {}
    tied: dict[str, str] = {}
    with ArtifactWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        done, total = 0, sum(entry.weight.numel for entry in job.plan.entries)
        for entry in job.plan.entries:
            if progress:
                progress(entry.weight.name, done, total)
            _store(writer, job.checkpoint, entry, hashes, tied)
            done += entry.weight.numel
        if progress:
            progress("", done, total)
        manifest = _manifest(job, hashes, tied, seed)
        writer.publish(manifest, _config(job), copied=_kept_files(job.checkpoint))
    report = measured(out, job.checkpoint.bytes, seconds=time.perf_counter() - started)
    quality = _evaluate(out, job, evaluation, trust_remote_code) if evaluation is not None else None
    return _record(out, report.with_quality(quality), _licence(job.checkpoint))


@dataclass(frozen=True)
class Prediction:
    """What compressing would write and need.

    Attributes:
        bytes: size of the weight files; exact unless ``exact`` is False (a codec whose rate only coding can tell).
        parameters: of the model, tied ones once.
        checkpoint_bytes: size of the source's weight files.
        memory: estimated peak resident memory in bytes, of which ``base`` is this process as it is now.
        disk: free bytes needed while writing.
        seconds: estimated time to encode and write, from a short trial of each codec on this machine.
        dense: tensors that stay dense, with reasons.
    """

    bytes: int
    exact: bool
    parameters: int
    checkpoint_bytes: int
    memory: int
    disk: int
    seconds: float
    dense: Mapping[str, str]

    @property
    def bpw(self) -> float:
        return 8 * self.bytes / self.parameters

    @property
    def ratio_fp32(self) -> float:
        return 4 * self.parameters / self.bytes

    @property
    def ratio_checkpoint(self) -> float:
        return self.checkpoint_bytes / self.bytes

    def to_json(self) -> dict[str, Any]:
        names = ("bytes", "exact", "parameters", "checkpoint_bytes", "bpw", "ratio_fp32", "ratio_checkpoint")
        numbers = {name: getattr(self, name) for name in (*names, "memory", "disk", "seconds")}
        return {**numbers, "dense": dict(self.dense)}


def predict(
    source: str | Path,
    *,
    recipe: str = "int4:g32",
    overrides: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Prediction:
    """What ``compress`` with these arguments would write and need, from headers alone. Raises as ``compress`` does."""
    import psutil

    job = _open(source, recipe, overrides, revision=revision, trust_remote_code=trust_remote_code)
    entries = [e for e in job.plan.entries if e.weight.tied_to is None]
    rows, exact = [], True
    for entry in entries:
        weight = entry.weight
        size = weight.numel * DTYPE_BYTES[weight.dtype]
        if entry.codec is None:
            rows.append((weight.name, weight.dtype, weight.shape, size))
            continue
        bits = entry.codec.estimate_bits(weight.matrix_shape)
        exact = exact and bits is not None
        stored = size if bits is None else weight.matrices * bits // 8
        rows.append((weight.name + CODES_SUFFIX, "U8", (stored,), stored))
    total = predicted_bytes(rows, max_shard_bytes)
    largest = max((e.weight.numel * DTYPE_BYTES[e.weight.dtype] for e in entries), default=0)
    payload = max((row[3] for row in rows), default=0)
    return Prediction(
        bytes=total,
        exact=exact,
        parameters=job.plan.parameters,
        checkpoint_bytes=job.checkpoint.bytes,
        # The tensor itself, its payload as fields and as one blob, and the encoder's tiles.
        memory=psutil.Process().memory_info().rss + largest + 2 * payload + (64 << 20),
        disk=total + min(total, max_shard_bytes) + (1 << 20),
        seconds=_trial(entries, total),
        dense={e.weight.name: e.reason for e in entries if e.codec is None},
    )


def _open(
    source: str | Path, recipe: str, overrides: Sequence[str], *, revision: str | None, trust_remote_code: bool
) -> _Job:
    codec = parse(recipe)
    parsed = [Override(pattern, override) for pattern, override in parse_overrides(overrides)]
    checkpoint = open_checkpoint(source, revision=revision)
    model = build_meta_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    weights = bind(model, checkpoint.tensors)
    check_coverage(model, weights)
    plan = make_plan(weights, codec, parsed)
    return _Job(checkpoint, plan, recipe, dict(text.split("=", 1) for text in overrides))


def _store(
    writer: ArtifactWriter, checkpoint: Checkpoint, entry: PlanEntry, hashes: dict[str, str], tied: dict[str, str]
) -> None:
    weight = entry.weight
    tensor = checkpoint.read(weight.name)
    hashes[weight.name] = tensor_sha256(tensor)
    if weight.tied_to is not None and hashes[weight.name] == tensor_sha256(checkpoint.read(weight.tied_to)):
        tied[weight.name] = weight.tied_to
    elif entry.codec is None:
        writer.add_dense(weight.name, tensor, entry.reason)
    else:
        payloads = encode_tensor(entry.codec, weight, tensor)
        writer.add_weight(weight.name, payloads, shape=weight.shape, dtype=weight.dtype, transposed=weight.transposed)


def encode_tensor(codec: Codec, weight: Weight, tensor: Tensor) -> list[Payload]:
    """One payload per matrix of a tensor as the checkpoint stores it.

    Raises:
        CodecError: of the codec's own kind, naming the tensor.
    """
    matrices = tensor.unbind(0) if tensor.ndim == 3 else (tensor,)
    try:
        return [codec.encode(matrix.T if weight.transposed else matrix) for matrix in matrices]
    except CodecError as error:
        raise type(error)(f"{weight.name}: {error}", hint=error.hint) from error


def _manifest(job: _Job, hashes: Mapping[str, str], tied: Mapping[str, str], seed: int) -> Manifest:
    tensors = job.checkpoint.tensors
    lines = (f"{n} {tensors[n].dtype} {list(tensors[n].shape)} {hashes[n]}\n" for n in sorted(hashes))
    # A tensor of the plan that is tied on paper but differs is a parameter of its own.
    untied = sum(e.weight.numel for e in job.plan.entries if e.weight.tied_to is not None and e.weight.name not in tied)
    return Manifest(
        format_version=FORMAT_VERSION,
        tenpak_version=version("tenpak"),
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        source=Source(
            name=job.checkpoint.name,
            sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
            bytes=job.checkpoint.bytes,
            parameters=job.plan.parameters + untied,
        ),
        recipe=job.recipe,
        overrides=dict(job.overrides),
        seed=seed,
        weights={},
        dense={},
        tied=dict(tied),
        files={},
    )


def _config(job: _Job) -> dict[str, Any]:
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


def _evaluate(out: Path, job: _Job, text: str | Path, trust_remote_code: bool) -> dict[str, Any]:
    """Measure the written artifact in a fresh process."""
    command = [sys.executable, "-m", "tenpak", "evaluate", str(out), "--against", str(job.checkpoint.folder)]
    command += ["--text", str(text), "--json", *(["--trust-remote-code"] if trust_remote_code else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise EvaluationError(
            f"{out} is written, but measuring it failed (exit code {done.returncode})",
            hint="the reason is above; repeat with `tenpak evaluate`",
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _record(out: Path, report: Report, licence: str | None) -> Report:
    """Write the report, the card and, where measured, the quality in the manifest; each file atomically."""
    manifest = load_manifest(out / MANIFEST_NAME)
    if report.quality is not None:
        manifest = manifest.model_copy(update={"quality": report.quality})
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


def _trial(entries: Sequence[PlanEntry], total: int) -> float:
    """Seconds to encode, hash and write, extrapolated from a small matrix per codec."""
    seconds = total / 200e6  # writing and copying; an order of magnitude for a disk
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(256, 1024, generator=generator)
    started = time.perf_counter()
    tensor_sha256(sample)
    hashing = (time.perf_counter() - started) / (sample.numel() * 4)
    seconds += hashing * sum(e.weight.numel * DTYPE_BYTES[e.weight.dtype] for e in entries)
    for codec in {e.codec for e in entries if e.codec is not None}:
        codec.encode(sample[:8])  # the first call of anything in torch is slow
        started = time.perf_counter()
        codec.encode(sample)
        per_weight = (time.perf_counter() - started) / sample.numel()
        seconds += per_weight * sum(e.weight.numel for e in entries if e.codec == codec)
    return seconds
