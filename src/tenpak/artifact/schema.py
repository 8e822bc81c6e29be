"""What ``manifest.json`` says, as strict schemas: an unknown field is an error.

The manifest protects itself: its last field is the SHA-256 of its own canonical JSON without that field, and a file
that is not byte for byte the canonical JSON of what it says is refused. So any flipped bit is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from tenpak.checkpoint.header import TensorInfo, read_whole
from tenpak.errors import CorruptArtifactError, FormatVersionError

__all__ = [
    "CODES_SUFFIX",
    "FORMAT_VERSION",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "SHARING_VERSION",
    "DenseEntry",
    "FieldSpec",
    "Layout",
    "Manifest",
    "SharedEntry",
    "Source",
    "WeightEntry",
    "dump_manifest",
    "encode_index",
    "load_manifest",
    "shard_names",
    "shared_name",
]

FORMAT_VERSION = 1
# Of artifacts with shared tensors, of which readers of version 1 know nothing.
SHARING_VERSION = 2
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "model.safetensors.index.json"
# Appended to a compressed tensor's name. An underscore, because a dot would invite transformers' key renaming.
CODES_SUFFIX = "_codes"
# A manifest takes a few hundred bytes per tensor; far more than any real one, far less than would hurt.
_MAX_MANIFEST_BYTES = 100_000_000

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Shape = Annotated[tuple[Natural, ...], Field(max_length=8)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What shares nothing does not say so: it is written as it was before anything could be shared."""
        content: dict[str, Any] = serialize(self)
        return {key: value for key, value in content.items() if key != "shared" or value}


class FieldSpec(_Strict):
    """One tensor of a payload: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: Shape


class Layout(_Strict):
    """``count`` payloads in a row, each made of these fields, back to back without padding."""

    count: Annotated[int, Field(ge=1)]
    fields: tuple[FieldSpec, ...]


class WeightEntry(_Strict):
    """A compressed tensor: ``<name>_codes`` holds its payloads' bytes, one payload per matrix.

    ``shape`` is that of the decoded tensor as the checkpoint stores it; ``transposed`` says that its matrices are
    ``[in, out]`` there, while payloads decode to ``[out, in]``. ``bits`` counts the payloads' bits. ``shared`` are
    fields that all its payloads have besides, each with the name of the tensor that holds it.
    """

    shape: Shape
    dtype: str
    transposed: bool
    codec: dict[str, Any]
    payloads: tuple[Layout, ...]
    bits: Natural
    sha256: Sha256
    shared: dict[str, str] = {}


class SharedEntry(_Strict):
    """A tensor that payloads of several weights have in common, stored once."""

    shape: Shape
    dtype: str
    sha256: Sha256


class DenseEntry(_Strict):
    """A tensor stored as it was, and why."""

    shape: Shape
    dtype: str
    reason: str
    sha256: Sha256


class Source(_Strict):
    """The checkpoint that was compressed.

    ``sha256`` is the hash of the lines ``name dtype shape sha256-of-bytes`` of all its tensors, sorted by name.
    ``parameters`` counts the elements of the model's parameters, tied ones once.
    """

    name: str
    sha256: Sha256
    bytes: Natural
    parameters: Natural


class Manifest(_Strict):
    """Everything a reader must know besides the tensors' bytes."""

    format_version: int
    tenpak_version: str
    versions: dict[str, str]
    source: Source
    recipe: str
    overrides: tuple[str, ...]
    seed: int
    calibration: dict[str, Any] | None = None
    weights: dict[str, WeightEntry]
    dense: dict[str, DenseEntry]
    shared: dict[str, SharedEntry] = {}
    tied: dict[str, str]
    files: dict[str, Sha256]
    quality: dict[str, Any] | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """The hashes of all tensors by their stored names."""
        found = {name + CODES_SUFFIX: entry.sha256 for name, entry in self.weights.items()}
        found |= {name: entry.sha256 for name, entry in self.shared.items()}
        return found | {name: entry.sha256 for name, entry in self.dense.items()}

    @property
    def sharers(self) -> dict[str, list[str]]:
        """Shared tensor → the weights that name it."""
        found: dict[str, list[str]] = {name: [] for name in self.shared}
        for weight, entry in self.weights.items():
            for name in entry.shared.values():
                found.setdefault(name, []).append(weight)
        return found


def dump_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes of a manifest, its own hash included as the last field ``sha256``."""
    canonical = _canonical(manifest.model_dump(mode="json"))
    return _seal(canonical, hashlib.sha256(canonical).hexdigest())


def load_manifest(path: Path) -> Manifest:
    """Read, check and validate ``manifest.json``.

    Raises:
        FormatVersionError: another version of the format wrote it.
        CorruptArtifactError: missing, changed since it was written, or not a manifest.
    """
    try:
        raw = read_whole(path, _MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CorruptArtifactError(
            f"{path.parent} has no readable {path.name}: {error.strerror}",
            hint="an artifact is the whole folder: copy all its files",
        ) from error
    try:
        content = json.loads(raw.decode())
        version = content["format_version"]
        del content["sha256"]
        canonical = _canonical(content)
        sealed = _seal(canonical, hashlib.sha256(canonical).hexdigest())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(f"{path} is not a manifest", hint="obtain the artifact again") from error
    if type(version) is not int or version not in (FORMAT_VERSION, SHARING_VERSION):
        raise FormatVersionError(
            f"{path.parent} has format version {str(version)[:20]}, this tenpak reads {FORMAT_VERSION} and "
            f"{SHARING_VERSION}",
            hint="install a tenpak that reads it, or compress the model again",
        )
    if sealed != raw:
        raise CorruptArtifactError(f"{path} was changed after it was written", hint="obtain the artifact again")
    try:
        return Manifest.model_validate_json(canonical, strict=True)  # of JSON, because it knows no tuples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptArtifactError(f"{path}: {where}: {first['msg']}", hint="obtain the artifact again") from error


def shard_names(count: int) -> list[str]:
    """The names of ``count`` weight files, in order."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def shared_name(group: int, field: str) -> str:
    """The stored name of a tensor that the weights of a group share, groups being numbered in the order of weights."""
    return f"shared_{group}_{field}"


def encode_index(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The index that says which of several weight files holds which tensor, as transformers wants it."""
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: info.file.name for name, info in tensors.items()}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _seal(canonical: bytes, sha256: str) -> bytes:
    """The JSON object ``canonical`` with its hash as one more field, which is how the file holds it."""
    return canonical[:-1] + b',"sha256":"' + sha256.encode() + b'"}'


def _canonical(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
