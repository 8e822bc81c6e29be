"""The safetensors container, read and written without trusting it and without mapping it into memory.

A file is: 8 bytes little-endian header length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}`` (and an
optional ``__metadata__`` of strings), then the tensors' bytes, back to back. The safetensors package maps files, and
mapped pages count as resident memory; here bytes are read, so that what is held is what was asked for. Everything is
checked against the file's size before any memory is taken for data.

Source: the format description in the safetensors README. This module needs no torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tenpak.errors import CheckpointError, UnsupportedDtypeError

__all__ = ["DTYPE_BYTES", "TensorInfo", "encode_header", "read_header", "read_into", "read_whole", "weight_bytes"]

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# The limit of the reference implementation: no honest header is larger.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its safetensors dtype, its shape, and the bytes [start, end) of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is malformed or contradicts the file's size.
        UnsupportedDtypeError: a tensor's dtype is not one of ``DTYPE_BYTES``.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"it is {size} bytes long and announces a header of {length} bytes")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}", hint=f"look at {path}") from error
    header = _parse_json(raw, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ is not a mapping of strings")
    data_start = 8 + length
    tensors = {name: _tensor_info(name, entry, path, data_start) for name, entry in header.items()}
    position = data_start
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, info in ordered.items():
        if info.start != position:
            raise _broken(path, f"the bytes of tensor {name!r} overlap others or leave a hole before them")
        position = info.end
    if position != size:
        raise _broken(path, f"its header describes {position} bytes, the file has {size}")
    return ordered


def read_into(file: BinaryIO, info: TensorInfo, buffer: memoryview) -> None:
    """Fill ``buffer`` (``info.nbytes`` bytes) with a tensor's bytes from its opened file.

    Raises:
        CheckpointError: the file ends early.
    """
    file.seek(info.start)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]  # BinaryIO does not declare readinto
        if not count:
            raise _broken(info.file, "it ends before its last tensor")
        done += count


def read_whole(path: Path, limit: int) -> bytes:
    """The bytes of a small file.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than ``limit`` bytes.
    """
    if regular_size(path) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes")
    with path.open("rb") as file:
        return file.read(limit)


def regular_size(path: Path) -> int:
    """Size of a regular file: opening a pipe would wait for ever, and a device (``/dev/zero``) never ends.

    Raises:
        OSError: it does not exist or is something else.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length prefix and JSON header for tensors (name, dtype, shape, bytes) stored in this order.

    The JSON is compact; it is padded with spaces to a multiple of 8 so that the data starts aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _broken(path, "its header names a tensor twice")
        return found

    try:
        header = json.loads(raw.decode(), object_pairs_hook=no_duplicates)  # of bytes it would take UTF-16 as well
        if not isinstance(header, dict):
            raise _broken(path, "its header is not a JSON object")
        "".join(header).encode()  # escapes can smuggle in surrogates, which no file or terminal takes
    except (ValueError, RecursionError) as error:
        raise _broken(path, "its header is not valid JSON") from error
    return header


def _tensor_info(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the header entry of {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _broken(path, f"shape or offsets of {name!r} are not small lists of natural numbers")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UnsupportedDtypeError(
            f"tensor {name!r} in {path.name} has dtype {dtype!r}, which tenpak does not read",
            hint=f"convert it to one of {', '.join(DTYPE_BYTES)}",
        )
    start, end = offsets
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
        raise _broken(path, f"tensor {name!r} of shape {shape} and dtype {dtype} cannot take {end - start} bytes")
    return TensorInfo(dtype, tuple(shape), path, data_start + start, data_start + end)


def _is_naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is not a sound safetensors file: {why}", hint=f"obtain {path} again")


def weight_bytes(files: Iterable[Path]) -> int:
    """Total size of files in bytes, as the file system says."""
    return sum(os.stat(file).st_size for file in files)
