"""Files of PIXEL: one safetensors file each, which names and protects what it holds.

Besides its data a file has two tensors of bytes, ``about``, JSON whose ``format`` says what the file is, and
``sha256``, 32 bytes: the hash of the lines ``name dtype shape sha256-of-bytes`` of all the others, sorted by name. So a
flipped bit is found, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from tenpak.checkpoint.header import encode_header, read_header
from tenpak.checkpoint.source import dtype_name, read_tensor, tensor_bytes, tensor_sha256
from tenpak.errors import ArtifactError, CheckpointError, CorruptArtifactError

__all__ = ["About", "damaged", "file_bytes", "read_file", "write_file"]

_ABOUT, _SHA256 = "about", "sha256"


class About(BaseModel):
    """Base of what ``about`` may say: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Said = TypeVar("Said", bound=About)


def file_bytes(tensors: Mapping[str, Tensor], about: About) -> int:
    """Size in bytes of the file that ``write_file`` writes."""
    sealed = _ordered({**tensors, _ABOUT: _json(about), _SHA256: torch.zeros(32, dtype=torch.uint8)})
    return len(_header(sealed)) + sum(tensor.numel() * tensor.element_size() for tensor in sealed.values())


def write_file(path: str | Path, tensors: Mapping[str, Tensor], about: About) -> None:
    """Write tensors, on whatever device, under another name and rename the file when it is complete.

    Raises:
        ArtifactError: it cannot be written.
        UnsupportedDtypeError: tenpak does not store a tensor's dtype.
    """
    path = Path(path)
    sealed = {**{name: tensor.detach().cpu() for name, tensor in tensors.items()}, _ABOUT: _json(about)}
    sealed[_SHA256] = _sealed(sealed)
    ordered = _ordered(sealed)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_header(ordered))
            for tensor in ordered.values():
                file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: str | Path, kind: type[Said]) -> tuple[dict[str, Tensor], Said]:
    """The tensors of a file and what is said about them.

    Raises:
        CorruptArtifactError: there is none, it is no file of this kind, or it was changed since it was written.
    """
    path = Path(path)
    try:
        tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
    except CheckpointError as error:
        raise CorruptArtifactError(str(error), hint=error.hint) from error
    said = tensors.get(_ABOUT)
    if said is None or said.dtype != torch.uint8 or _SHA256 not in tensors:
        raise damaged(path, "it was not written by tenpak.pixel")
    header = _header(tensors)  # with the names, and what no hash covers
    with path.open("rb") as file:
        sound = file.read(len(header)) == header
    if not sound or not torch.equal(tensors.pop(_SHA256), _sealed(tensors)):
        raise damaged(path, "it was changed after it was written")
    del tensors[_ABOUT]
    try:
        return tensors, kind.model_validate_json(bytes(tensor_bytes(said)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f"{where}: {first['msg']}") from error


def damaged(path: str | Path, why: str) -> CorruptArtifactError:
    """The error of a file that cannot be used."""
    return CorruptArtifactError(f"{Path(path).name} cannot be used: {why}", hint=f"obtain {path} again")


def _json(about: About) -> Tensor:
    content: dict[str, Any] = about.model_dump(mode="json")
    return torch.frombuffer(bytearray(json.dumps(content, separators=(",", ":")).encode()), dtype=torch.uint8)


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wider dtypes first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    return encode_header(
        (name, dtype_name(t.dtype), tuple(t.shape), math.prod(t.shape) * t.element_size())
        for name, t in tensors.items()
    )


def _sealed(tensors: Mapping[str, Tensor]) -> Tensor:
    lines = (f"{n} {dtype_name(t.dtype)} {list(t.shape)} {tensor_sha256(t)}\n" for n, t in sorted(tensors.items()))
    digest = hashlib.sha256("".join(lines).encode()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
