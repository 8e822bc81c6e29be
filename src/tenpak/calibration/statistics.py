"""Statistics on disk: a folder that can be inspected, merged over shards of a text, and reused over recipes.

    statistics.json          what was read (source, text, tokens, window, seed, method), and which parts there are
    part-00000.safetensors   block 0, and so on
    part-outside.safetensors embeddings, head and whatever else is in no block

A part holds, for each distinct input g, ``g.hessian`` FP32 ``[in, in]``, ``g.mean`` and ``g.mean_abs`` FP32 ``[in]``,
and for each weight w with a curvature ``w.curvature`` FP32 ``[out]``; outside also ``token_frequency`` and
``input_curvature``. A table in its metadata says which weights (parameter and matrix) share an input, and how many
tokens it saw. A part is read when one of its weights is asked for, so a model's statistics never need to be in memory
at once. ``statistics.json`` is written last: without it a folder is not complete.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenpak.artifact.leftovers import locked, remove_unused
from tenpak.calibration.experts import experts
from tenpak.calibration.skeleton import OUTSIDE
from tenpak.calibration.sums import Key, Sums
from tenpak.checkpoint.source import Checkpoint, source_sha256
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Statistics
from tenpak.errors import CalibrationError, OutputExistsError

__all__ = [
    "FILE_NAME",
    "Origin",
    "Part",
    "StatisticsFolder",
    "new_folder",
    "part_name",
    "write_part",
    "write_table",
]

FILE_NAME = "statistics.json"
VERSION = 1
_PART = re.compile(r"part-(outside|\d{5})\.safetensors")


@dataclass(frozen=True)
class Origin:
    """What statistics are of.

    Attributes:
        source: name of the model.
        source_sha256: hash of its tensors, as in an artifact's manifest.
        text: name of the text, or names.
        text_sha256: hash of its UTF-8 bytes, or hashes.
        tokens: how many of its tokens were read.
        window: tokens per window.
        seed: of the labels that were drawn.
        method: ``"full"``, or ``"fast"``: forward only, curvature guessed.
    """

    source: str
    source_sha256: str
    text: str
    text_sha256: str
    tokens: int
    window: int
    seed: int
    method: str


@dataclass
class _Table:
    """What ``statistics.json`` says of a part."""

    counts: list[int] = field(default_factory=list)
    weights: list[tuple[str, int, int]] = field(default_factory=list)  # parameter, matrix, input


def part_name(part: int) -> str:
    """File name of a part: a block's number, or ``OUTSIDE``."""
    return "part-outside.safetensors" if part == OUTSIDE else f"part-{part:05d}.safetensors"


def write_part(folder: Path, part: int, sums: Sums, extra: Mapping[str, Tensor] | None = None) -> None:
    """Store the statistics of a part, its table in its metadata; both appear at once or not at all.

    Args:
        folder: the statistics' folder.
        part: a block's number, or ``OUTSIDE``.
        sums: of the part's weights.
        extra: further tensors, by name.
    """
    tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in (extra or {}).items()}
    for number, inputs in enumerate(sums.inputs):
        made = inputs.statistics()
        found = {"hessian": made.hessian, "mean": made.mean, "mean_abs": made.mean_abs}
        tensors |= {f"{number}.{name}": value for name, value in found.items() if value is not None}
    weights = []
    for position, (key, group) in enumerate(sums.group_of.items()):
        weights.append((key[0], key[1], group))
        if key in sums.squares:
            tensors[f"{position}.curvature"] = (sums.squares[key] / max(sums.inputs[group].count, 1)).float()
    table = _Table([inputs.count for inputs in sums.inputs], weights)
    path = folder / part_name(part)
    temporary = path.with_suffix(".partial")
    try:
        save_file(tensors, temporary, metadata={"table": json.dumps(asdict(table))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(
            f"cannot write {path}: {error}", hint="free space there, and run the command again"
        ) from error


def write_table(folder: Path, origin: Origin, parts: Iterable[int]) -> None:
    """Complete a folder of statistics."""
    content = {"version": VERSION, **asdict(origin), "parts": list(parts)}
    path = folder / FILE_NAME
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


@dataclass(frozen=True)
class Part:
    """A part as it is read: its table and its tensors by name."""

    table: _Table
    tensors: Mapping[str, Tensor]

    def get(self, key: Key) -> Statistics | None:
        """Statistics of a weight, or None where it was never multiplied with."""
        for position, (parameter, matrix, group) in enumerate(self.table.weights):
            if (parameter, matrix) == key:
                if not {f"{group}.{name}" for name in ("hessian", "mean", "mean_abs")} <= self.tensors.keys():
                    raise CalibrationError(f"the statistics of {parameter} are incomplete", hint="calibrate again")
                return Statistics(
                    count=self.table.counts[group],
                    hessian=self.tensors[f"{group}.hessian"],
                    mean=self.tensors[f"{group}.mean"],
                    mean_abs=self.tensors[f"{group}.mean_abs"],
                    output_curvature=self.tensors.get(f"{position}.curvature"),
                )
        return None


class StatisticsFolder:
    """Statistics that were written before.

    Attributes:
        folder: where they are.
        origin: what they are of.
        parts: the parts there are.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            CalibrationError: it holds no complete statistics, or those of another version of tenpak.
        """
        self.folder = Path(folder)
        path = self.folder / FILE_NAME
        try:
            content = json.loads(path.read_text())
            version = content.pop("version")
            self.parts: list[int] = content.pop("parts")
            if version != VERSION:
                raise CalibrationError(
                    f"{folder} holds statistics of version {version!r}, this tenpak reads {VERSION}",
                    hint="calibrate again",
                )
            self.origin = Origin(**content)
            for name, kind in Origin.__annotations__.items():
                if type(getattr(self.origin, name)).__name__ != kind:
                    raise TypeError(name)  # noqa: TRY301
            if not all(type(part) is int for part in self.parts) or OUTSIDE not in self.parts:
                raise TypeError("parts")  # noqa: TRY301
        except OSError as error:
            raise CalibrationError(
                f"{folder} holds no statistics: {path.name}: {error.strerror}",
                hint="`tenpak calibrate MODEL -o FOLDER` makes some; it writes that file last",
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CalibrationError(f"{path} is damaged", hint="calibrate again") from error
        self._held: dict[int, Part] = {}
        self._lock = threading.Lock()

        tables = {number: _read_table(self.folder / part_name(number)) for number in self.parts}
        self._part_of = {parameter: number for number, table in tables.items() for parameter, _, _ in table.weights}

    def require_source(self, checkpoint: Checkpoint) -> None:
        """Raise CalibrationError where the statistics are of another model; reads all of the checkpoint."""
        if source_sha256(checkpoint) != self.origin.source_sha256:
            raise CalibrationError(
                f"the statistics in {self.folder} are of another model ({self.origin.source}), not of "
                f"{checkpoint.name}",
                hint="calibrate this model: tenpak calibrate MODEL -o FOLDER",
            )

    def part(self, number: int) -> Part:
        """A part, read now; the last one is held, since a block's weights are asked for together.

        Raises:
            CalibrationError: it is missing or damaged.
        """
        with self._lock:
            if number not in self._held:
                self._held = {number: _read_part(self.folder / part_name(number))}
            return self._held[number]

    def of(self, weight: Weight, *, rows_before: int = 0) -> tuple[Statistics | None, ...]:
        """Statistics of a tensor's matrices, one for each; None where nothing is known.

        An expert that saw fewer tokens than it has inputs gets the means over all experts of its layer.

        Args:
            weight: the tensor.
            rows_before: where the tensor is a part of an expert's rows: how many come before it.

        Raises:
            CalibrationError: a part is missing or damaged.
        """
        if weight.kind == "embedding":
            return (self._embedding(weight),)
        if weight.parameter not in self._part_of:
            return (None,) * weight.matrices
        part = self.part(self._part_of[weight.parameter])
        if weight.kind != "expert":
            return (part.get((weight.parameter, 0)),)
        seen = [matrix for parameter, matrix, _ in part.table.weights if parameter == weight.parameter]
        return experts(part.get, weight, seen, rows_before=rows_before)

    def counts(self) -> dict[str, list[int]]:
        """How many inputs each weight saw: parameter → count of each matrix that saw any."""
        found: dict[str, list[int]] = {}
        for number in self.parts:
            table = _read_table(self.folder / part_name(number))
            for parameter, _, group in table.weights:
                found.setdefault(parameter, []).append(table.counts[group])
        return found

    def _embedding(self, weight: Weight) -> Statistics:
        part = self.part(OUTSIDE)
        frequency, curvature = part.tensors.get("token_frequency"), part.tensors.get("input_curvature")
        if frequency is None or len(frequency) != weight.shape[0]:  # of positions, or types
            return Statistics()
        if curvature is not None and len(curvature) != weight.shape[1]:
            curvature = None
        return replace(
            part.get((weight.parameter, 0))
            or Statistics(count=self.origin.tokens),  # a product where it is the head too
            token_frequency=frequency,
            input_curvature=curvature,
        )


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder to write statistics to, which takes the place of ``out`` at the end, or goes after an error.

    Raises:
        OutputExistsError: something is at ``out`` that may not be replaced.
        CalibrationError: the folder cannot be written.
    """
    _check_free(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_unused(out.parent, f".{glob.escape(out.name)}.partial-*")
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CalibrationError(f"cannot write {out}: {error.strerror}", hint="choose another -o") from error
    try:
        with locked(folder):
            yield folder
            _check_free(out, overwrite=overwrite)
            shutil.rmtree(out, ignore_errors=True)
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / FILE_NAME).is_file():
        raise OutputExistsError(
            f"{out} exists and holds no statistics", hint="choose another -o; only statistics are ever replaced"
        )
    if not overwrite:
        raise OutputExistsError(f"{out} exists", hint="choose another -o, or pass --overwrite")
    foreign = sorted(p.name for p in out.iterdir() if p.name != FILE_NAME and not _PART.fullmatch(p.name))
    if foreign:
        raise OutputExistsError(
            f"{out} also holds {', '.join(foreign[:3])}, which tenpak did not write",
            hint="move those files away first, or choose another -o",
        )


def _read_table(path: Path) -> _Table:
    try:
        with safe_open(path, framework="pt") as file:
            table = json.loads(file.metadata()["table"])
        weights = [(str(parameter), int(matrix), int(group)) for parameter, matrix, group in table["weights"]]
        found = _Table([int(count) for count in table["counts"]], weights)
        if not all(0 <= group < len(found.counts) for _, _, group in weights):
            raise ValueError("a weight's input is not in the table")  # noqa: TRY301
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error
    return found


def _read_part(path: Path) -> Part:
    try:
        return Part(_read_table(path), load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"{path} is missing or damaged: {error}", hint="calibrate again")
