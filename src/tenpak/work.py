"""Finished work of a run, on disk, so that a run which was stopped can go on where it was.

A work folder belongs to one run: its ``run.json`` holds what the run depends on (source files, texts, recipe, options,
versions), and a run that depends on anything else is refused. A *unit* is one encoded tensor: a safetensors file with
its payloads' fields, and in its metadata the codec, the shape, and a hash. It is written under another name and
renamed, so it is there entirely or not at all, and one whose hash is wrong counts as not there. Units are the same
bytes whoever computed them, so an artifact made from old and new ones is the one that an uninterrupted run would have
made.

    run.json
    units/00012.safetensors          by the tensor's place in the plan
    shared/<codec>.safetensors       what all tensors of a codec share, by a hash of its configuration
    tuned.safetensors                dense tensors that tuning has changed; all units are there when it is
    statistics/                      of the original model, where a recipe needs them
    passes/<name>/                   the work of each pass of a search, where a run makes several
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tenpak.artifact.blob import join
from tenpak.artifact.leftovers import locked
from tenpak.checkpoint.source import TORCH_DTYPES, dtype_name, tensor_sha256
from tenpak.codecs.base import Payload
from tenpak.errors import ArtifactError

__all__ = ["Tuned", "Unit", "Work", "default_work", "run_key"]

RUN_NAME = "run.json"
_TUNED_NAME = "tuned.safetensors"


@dataclass(frozen=True)
class Unit:
    """An encoded tensor.

    Attributes:
        payloads: one per matrix.
        source_sha256: hash of the source tensor's bytes.
        counts: how many inputs calibration saw for each matrix; empty where the codec needed no statistics.
        bias: what is to be added to the bias of the layer, FP32 ``[out]``; None where it keeps its own.
    """

    payloads: tuple[Payload, ...]
    source_sha256: str
    counts: tuple[int, ...] = ()
    bias: Tensor | None = None


@dataclass(frozen=True)
class Tuned:
    """What tuning has made of a run.

    Attributes:
        dense: tensors that stay dense and were changed, as they are stored.
        about: how it went, JSON.
    """

    dense: Mapping[str, Tensor]
    about: Mapping[str, Any]


def run_key(run: Mapping[str, Any]) -> str:
    """A hash of what a run depends on, in hexadecimal."""
    return hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()


def default_work(out: Path, run: Mapping[str, Any]) -> Path:
    """The work folder beside an output; another run to the same output gets another one."""
    return out.parent / f".{out.name}.work-{run_key(run)[:12]}"


class Work:
    """A work folder in use; a context manager that locks it.

    Args:
        folder: where; made if it is not there.
        run: what the run depends on, JSON.

    Attributes:
        reused: names of the units that were found finished.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = json.loads(json.dumps(run, default=str))
        self.reused: list[str] = []
        self._lock = contextlib.ExitStack()
        self._tuned: Tuned | None = None
        self._shared: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> Self:
        """Open the folder.

        Raises:
            ArtifactError: it belongs to another run, is used by one just now, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.folder))
            self._claim()
            (self.folder / "units").mkdir(exist_ok=True)
            for left in [*self.folder.glob("activations-*"), *self.folder.glob("statistics/activations-*")]:
                shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
        except BlockingIOError as error:
            raise ArtifactError(
                f"{self.folder} is in use by another run", hint="wait for it, or choose another --work"
            ) from error
        except OSError as error:
            self._lock.close()
            if self.empty:
                self.remove()
            raise _unwritable(self.folder, error) from error
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Delete what it holds of a run, which has become an artifact or is of no use; and itself, if empty then."""
        for name in ("units", "shared", "statistics", "passes"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in self.folder.glob("run.*"):
            if path.name in (RUN_NAME, "run.partial"):
                path.unlink(missing_ok=True)
        (self.folder / _TUNED_NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def empty(self) -> bool:
        """Whether nothing in it is worth keeping."""
        kept = any((self.folder / name).exists() for name in ("shared", "statistics", "passes"))
        return not kept and not any((self.folder / "units").glob("*.safetensors"))

    def inner(self, name: str, more: Mapping[str, Any]) -> Work:
        """The work of one of several passes, to be entered in its turn; ``more`` is what it depends on besides."""
        return Work(self.folder / "passes" / name, {**self.run, **more})

    def has(self, number: int, name: str) -> bool:
        """Whether the unit of tensor ``name``, at ``number`` in the plan, is finished and sound."""
        return self.get(number, name) is not None

    def get(self, number: int, name: str) -> Unit | None:
        """A finished unit; None where there is none, or a damaged one."""
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["unit"])
                shared = self.shared(about["codec"])
                payloads = tuple(
                    Payload(
                        about["codec"],
                        (int(about["shape"][0]), int(about["shape"][1])),
                        TORCH_DTYPES[about["dtype"]],
                        {field: file.get_tensor(f"{index}.{field}") for field in fields},
                        shared,
                    )
                    for index, fields in enumerate(about["fields"])
                )
                bias = file.get_tensor("bias") if about["bias"] else None
            sound = about["name"] == name and about["sha256"] == tensor_sha256(join(payloads))
            sound = sound and (bias is None or about["bias"] == tensor_sha256(bias))
            unit = Unit(payloads, str(about["source_sha256"]), tuple(about["counts"]), bias)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
            return None
        return unit if sound else None

    def put(self, number: int, name: str, unit: Unit) -> None:
        """Keep a finished unit.

        Raises:
            ArtifactError: the disk is full or the folder cannot be written.
        """
        payloads, first = unit.payloads, unit.payloads[0]
        about = {
            "name": name,
            "codec": dict(first.codec),
            "shape": list(first.shape),
            "dtype": dtype_name(first.dtype),
            "fields": [list(payload.tensors) for payload in payloads],
            "sha256": tensor_sha256(join(payloads)),
            "source_sha256": unit.source_sha256,
            "counts": list(unit.counts),
            "bias": None if unit.bias is None else tensor_sha256(unit.bias),
        }
        tensors = {
            f"{index}.{field}": tensor.detach().cpu().contiguous().clone()  # fields may be views of one memory
            for index, payload in enumerate(payloads)
            for field, tensor in payload.tensors.items()
        }
        if unit.bias is not None:
            tensors["bias"] = unit.bias.contiguous()
        self._save(self._path(number), tensors, {"unit": json.dumps(about)})

    def shared(self, codec: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """What all tensors of a codec share, by field; empty where nothing is kept, or what is there is damaged."""
        path = self._shared_path(codec)
        if path.name not in self._shared and path.is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    hashes = json.loads(file.metadata()["sha256"])
                    tensors = {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118  # no mapping
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                return {}
            if hashes == {field: tensor_sha256(tensor) for field, tensor in tensors.items()}:
                self._shared[path.name] = tensors
        return self._shared.get(path.name, {})

    def put_shared(self, codec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep what all tensors of a codec share.

        Raises:
            ArtifactError: the disk is full or the folder cannot be written.
        """
        hashes = {field: tensor_sha256(tensor) for field, tensor in tensors.items()}
        self._save(self._shared_path(codec), tensors, {"sha256": json.dumps(hashes)})

    def put_tuned(self, tuned: Tuned) -> None:
        """Say that the units are tuned, and keep the dense tensors that go with them.

        Raises:
            ArtifactError: the disk is full or the folder cannot be written.
        """
        hashes = {name: tensor_sha256(tensor) for name, tensor in tuned.dense.items()}
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tuned.dense.items()}
        about = json.dumps({"about": dict(tuned.about), "sha256": hashes})
        self._save(self.folder / _TUNED_NAME, tensors, {"tuned": about})
        self._tuned = None

    @property
    def tuned(self) -> Tuned | None:
        """What tuning has made of this run; None where it has not been tuned, or what is there is damaged."""
        path = self.folder / _TUNED_NAME
        if self._tuned is None and path.is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    content = json.loads(file.metadata()["tuned"])
                    dense = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                if content["sha256"] == {name: tensor_sha256(tensor) for name, tensor in dense.items()}:
                    self._tuned = Tuned(dense, content["about"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                return None
        return self._tuned

    def _save(self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Write a file under another name and rename it."""
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(dict(tensors), temporary, metadata=dict(about))
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _unwritable(path, error) from error

    def _path(self, number: int) -> Path:
        return self.folder / "units" / f"{number:05d}.safetensors"

    def _shared_path(self, codec: Mapping[str, Any]) -> Path:
        return self.folder / "shared" / f"{run_key(codec)[:16]}.safetensors"

    def _claim(self) -> None:
        """Write what the run depends on, or compare it with what is written."""
        path = self.folder / RUN_NAME
        if not path.exists():
            if any(other.name != "run.partial" for other in self.folder.iterdir()):
                raise ArtifactError(
                    f"{self.folder} is not empty and holds no work of tenpak", hint="choose another folder for --work"
                )
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(self.run, indent=2) + "\n")
            temporary.replace(path)
            return
        try:
            other = json.loads(path.read_text())
        except ValueError:
            other = None
        if other == self.run:
            return
        differs = sorted(k for k in self.run if not isinstance(other, dict) or other.get(k) != self.run[k])
        raise ArtifactError(
            f"the work folder {self.folder} belongs to another run (it differs in {', '.join(differs) or 'its form'})",
            hint="choose another --work, or delete that folder",
        )


def _unwritable(path: Path, error: Exception) -> ArtifactError:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors tells the code in its message only.
    full = getattr(error, "errno", None) in codes or any(f"os error {code})" in str(error) for code in codes)
    return ArtifactError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
        hint=("free space on that disk and run the command again: " if full else "check that folder; ")
        + "finished tensors are kept and will be reused",
    )
