"""Writing an artifact: streamed, sharded, all or nothing.

Everything goes into a hidden folder beside the output, ``config.json`` last; the folder is renamed into place when all
of it is on the disk. A run that is killed leaves a hidden folder that no loader accepts; one that fails or is
interrupted removes it. Tensors are spooled as they come, because a safetensors header precedes the data but is only
known after it; so while a shard is closed the disk holds it twice.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from torch import Tensor

from tenpak.artifact.blob import join, layouts
from tenpak.artifact.leftovers import locked, remove_unused
from tenpak.artifact.schema import (
    CODES_SUFFIX,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    SHARING_VERSION,
    DenseEntry,
    Manifest,
    SharedEntry,
    WeightEntry,
    dump_manifest,
    encode_index,
    load_manifest,
    shard_names,
    shared_name,
)
from tenpak.checkpoint.header import DTYPE_BYTES, encode_header, read_header
from tenpak.checkpoint.source import dtype_name, is_artifact, tensor_bytes, tensor_sha256
from tenpak.codecs.base import Payload
from tenpak.errors import ArtifactError, OutputExistsError, TenpakError

__all__ = ["MAX_SHARD_BYTES", "PAGE_NAME", "ArtifactWriter", "check_output", "predicted_bytes", "replace_file"]

MAX_SHARD_BYTES = 4_000_000_000
REPORT_NAME = "report.json"
CARD_NAME = "README.md"
PAGE_NAME = "report.html"  # written later, if at all
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class _Stored:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0  # in the spool

    @property
    def header_row(self) -> tuple[str, str, tuple[int, ...], int]:
        return self.name, self.dtype, self.shape, self.nbytes


def _file_order(tensors: Sequence[_Stored]) -> list[_Stored]:
    # Wide dtypes first keeps every tensor aligned to its own size without padding.
    return sorted(tensors, key=lambda t: (-DTYPE_BYTES[t.dtype], t.name))


class ArtifactWriter:
    """Streams tensors into a new artifact; use it as a context manager and call ``publish`` at the end.

    Leaving the context without ``publish`` removes everything that was written. File system errors come out as
    ArtifactError with a hint.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.out = out
        self.overwrite = overwrite
        self.max_shard_bytes = max_shard_bytes
        self.weights: dict[str, WeightEntry] = {}
        self.dense: dict[str, DenseEntry] = {}
        self.shared: dict[str, SharedEntry] = {}
        self._groups: dict[str, dict[str, str]] = {}  # what is shared → its stored names by field
        self._shards: list[list[_Stored]] = [[]]
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> Self:
        check_output(self.out, overwrite=self.overwrite)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_unused(self.out.parent, f".{glob.escape(self.out.name)}.partial-*")
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent))
            try:
                self._lock.enter_context(locked(self._folder))
                self._spool: BinaryIO = (self._folder / "spool").open("w+b")
            except BaseException:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise
        except OSError as error:
            raise _unwritable(self.out, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._spool.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()
        if isinstance(error, OSError) and not isinstance(error, TenpakError):
            raise _unwritable(self.out, error) from error

    def add_weight(
        self, name: str, payloads: Sequence[Payload], *, shape: tuple[int, ...], dtype: str, transposed: bool
    ) -> int:
        """Store a compressed tensor, one payload per matrix; returns its bytes.

        What the payloads share is stored before the first weight that has it.
        """
        groups = [self._share(payload) for payload in payloads]
        if any(group != groups[0] for group in groups):
            raise ArtifactError(f"{name}: its payloads share different tensors", hint="encode them with the same ones")
        blob = join(payloads)
        self.weights[name] = WeightEntry(
            shape=shape,
            dtype=dtype,
            transposed=transposed,
            codec=dict(payloads[0].codec),
            payloads=layouts(payloads),
            bits=8 * blob.numel(),
            sha256=self._store(name + CODES_SUFFIX, blob),
            shared=groups[0],
        )
        return blob.numel()

    def add_dense(self, name: str, tensor: Tensor, reason: str) -> int:
        """Store a tensor as it is, with the reason why it is not compressed; returns its bytes."""
        self.dense[name] = DenseEntry(
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            reason=reason,
            sha256=self._store(name, tensor),
        )
        return tensor.numel() * tensor.itemsize

    def publish(
        self,
        manifest: Manifest,
        config: Mapping[str, Any],
        *,
        copied: Sequence[Path] = (),
        texts: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the rest and rename the folder into place.

        Args:
            manifest: its version, ``weights``, ``dense``, ``shared`` and ``files`` become those of what was added.
            config: ``config.json`` of the source; gets the ``quantization_config``.
            copied: files (tokenizer and so on) to copy under their own names and to hash.
            texts: further files to write, not hashed (report, card).

        Raises:
            OutputExistsError: the output appeared meanwhile.
        """
        self._close_shards()
        version = SHARING_VERSION if self.shared else FORMAT_VERSION
        quantization = {"quant_method": "tenpak", "format_version": version}
        text = json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n"
        hashes = {}
        for path in copied:
            data = path.read_bytes()
            _write(self._folder / path.name, data)
            hashes[path.name] = hashlib.sha256(data).hexdigest()
        for name, content in (texts or {}).items():
            _write(self._folder / name, content.encode())
        hashes["config.json"] = hashlib.sha256(text.encode()).hexdigest()
        added = {"weights": self.weights, "dense": self.dense, "shared": self.shared, "files": hashes}
        complete = manifest.model_copy(update={"format_version": version, **added})
        _write(self._folder / MANIFEST_NAME, dump_manifest(complete))
        _write(self._folder / "config.json", text.encode())
        os.chmod(self._folder, 0o777 & ~_umask())  # mkdtemp made it private
        _sync_folder(self._folder)
        self._move_into_place()
        return self.out

    def _share(self, payload: Payload) -> dict[str, str]:
        """Stored names of what a payload shares, by field; stored once for all payloads of this codec that have it."""
        if not payload.shared:
            return {}
        hashes = {field: tensor_sha256(tensor) for field, tensor in payload.shared.items()}
        key = json.dumps([payload.codec, hashes], sort_keys=True)
        if key not in self._groups:
            self._groups[key] = {field: shared_name(len(self._groups), field) for field in payload.shared}
            for field, name in self._groups[key].items():
                tensor = payload.shared[field]
                shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
                self.shared[name] = SharedEntry(shape=shape, dtype=dtype, sha256=self._store(name, tensor))
        return self._groups[key]

    def _store(self, name: str, tensor: Tensor) -> str:
        view = tensor_bytes(tensor)
        if self._shards[-1] and self._spool.tell() + len(view) > self.max_shard_bytes:
            self._close_shard()
            self._shards.append([])
        start = self._spool.tell()
        self._spool.write(view)
        row = _Stored(name, dtype_name(tensor.dtype), tuple(tensor.shape), len(view), start)
        self._shards[-1].append(row)
        return hashlib.sha256(view).hexdigest()

    def _close_shard(self) -> None:
        """Write the spooled tensors as a safetensors file and empty the spool."""
        rows = _file_order(self._shards[-1])
        path = self._folder / f"shard-{len(self._shards)}"
        self._spool.flush()
        with path.open("wb") as file:
            file.write(encode_header(row.header_row for row in rows))
            for row in rows:
                self._spool.seek(row.start)
                _copy(self._spool, file, row.nbytes)
            file.flush()
            os.fsync(file.fileno())
        self._spool.seek(0)
        self._spool.truncate()

    def _close_shards(self) -> None:
        self._close_shard()
        self._spool.close()
        (self._folder / "spool").unlink()
        names = shard_names(len(self._shards))
        for number, name in enumerate(names, 1):
            (self._folder / f"shard-{number}").rename(self._folder / name)
        if len(names) > 1:
            headers = (read_header(self._folder / name) for name in names)
            tensors = {key: info for header in headers for key, info in header.items()}
            _write(self._folder / INDEX_NAME, encode_index(tensors))

    def _move_into_place(self) -> None:
        check_output(self.out, overwrite=self.overwrite)
        retired = None
        if self.out.is_dir() and any(self.out.iterdir()):
            retired = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.replaced-", dir=self.out.parent))
        try:
            if retired:
                self.out.rename(retired / self.out.name)
            self._folder.rename(self.out)
        except BaseException:  # Ctrl-C as well: the old artifact must come back, and may only then be given up
            if retired:
                if not os.path.lexists(self.out):
                    (retired / self.out.name).rename(self.out)
                shutil.rmtree(retired, ignore_errors=True)
            raise
        _sync_folder(self.out.parent)
        if retired:
            try:
                shutil.rmtree(retired, ignore_errors=True)
            except BaseException:  # Ctrl-C: the new artifact is in place, and nobody else would remove the old one
                shutil.rmtree(retired, ignore_errors=True)
                raise


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is an artifact that may be replaced.

    Raises:
        OutputExistsError: says what is in the way.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise _unwritable(out, error) from error
    if not out.is_dir() or not is_artifact(out):
        raise OutputExistsError(
            f"{out} exists and is not a tenpak artifact", hint="choose another -o; only an artifact is ever replaced"
        )
    if not overwrite:
        raise OutputExistsError(f"{out} exists", hint="choose another -o, or pass --overwrite to replace the artifact")
    written = {"config.json", MANIFEST_NAME, REPORT_NAME, CARD_NAME, PAGE_NAME, INDEX_NAME}
    with contextlib.suppress(TenpakError):  # without a manifest nobody knows where the other files come from
        written |= load_manifest(out / MANIFEST_NAME).files.keys()
    names = (path.name for path in out.iterdir())
    foreign = sorted(name for name in names if name not in written and not _SHARD.fullmatch(name))
    if foreign:
        raise OutputExistsError(
            f"{out} also holds {', '.join(foreign[:3])}, which tenpak did not write",
            hint="move those files away first, or choose another -o",
        )


def predicted_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], max_shard_bytes: int) -> int:
    """Exact size of the weight files for stored tensors (name, dtype, shape, bytes) added in this order."""
    shards: list[list[_Stored]] = [[]]
    size = 0
    for row in tensors:
        if shards[-1] and size + row[3] > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(_Stored(*row))
        size += row[3]
    return sum(
        len(encode_header(row.header_row for row in _file_order(rows))) + sum(row.nbytes for row in rows)
        for rows in shards
    )


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file by these bytes, atomically."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _write(temporary, data)
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C as well
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise
    _sync_folder(path.parent)


def _copy(source: BinaryIO, target: BinaryIO, nbytes: int) -> None:
    while nbytes > 0:
        chunk = source.read(min(nbytes, 1 << 22))
        target.write(chunk)
        nbytes -= len(chunk)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"cannot write {path}: {error.strerror or error}",
        hint="nothing was left behind; free space on that disk, or choose another -o",
    )
