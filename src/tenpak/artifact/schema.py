"""What ``manifest.json`` says, as strict schemas: an unknown field is an error.

The manifest protects itself: its last field is the SHA-256 of its own canonical JSON without that field, and a file
that is not byte for byte the canonical JSON of what it says is refused. So any flipped bit is found.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tenpak.errors import CorruptArtifactError, FormatVersionError

__all__ = [
    "CODES_SUFFIX",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "DenseEntry",
    "FieldSpec",
    "Layout",
    "Manifest",
    "Source",
    "WeightEntry",
    "dump_manifest",
    "load_manifest",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# Appended to a compressed tensor's name. An underscore, because a dot would invite transformers' key renaming.
CODES_SUFFIX = "_codes"
# A manifest takes a few hundred bytes per tensor; far more than any real one, far less than would hurt.
_MAX_MANIFEST_BYTES = 256_000_000

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Shape = Annotated[tuple[Natural, ...], Field(max_length=8)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    ``[in, out]`` there, while payloads decode to ``[out, in]``. ``bits`` counts the payloads' bits.
    """

    shape: Shape
    dtype: str
    transposed: bool
    codec: dict[str, Any]
    payloads: tuple[Layout, ...]
    bits: Natural
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
    weights: dict[str, WeightEntry]
    dense: dict[str, DenseEntry]
    tied: dict[str, str]
    files: dict[str, Sha256]
    quality: dict[str, Any] | None = None


def dump_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes of a manifest, its own hash included as the last field ``sha256``."""
    content = manifest.model_dump(mode="json")
    return _canonical({**content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()})


def load_manifest(path: Path) -> Manifest:
    """Read, check and validate ``manifest.json``.

    Raises:
        FormatVersionError: another version of the format wrote it.
        CorruptArtifactError: missing, changed since it was written, or not a manifest.
    """
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CorruptArtifactError(f"{path} is too large to be a manifest")
        raw = path.read_bytes()
    except OSError as error:
        raise CorruptArtifactError(
            f"{path.parent} has no readable {path.name}", hint="an artifact is the whole folder: copy all its files"
        ) from error
    try:
        content = json.loads(raw)
        version = content["format_version"]
        claimed = content.pop("sha256")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(f"{path} is not a manifest", hint="obtain the artifact again") from error
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{path.parent} has format version {version!r}, this tenpak reads {FORMAT_VERSION}",
            hint="install a tenpak that reads it, or compress the model again",
        )
    sound = hashlib.sha256(_canonical(content)).hexdigest() == claimed
    if not sound or _canonical({**content, "sha256": claimed}) != raw:
        raise CorruptArtifactError(f"{path} was changed after it was written", hint="obtain the artifact again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptArtifactError(f"{path}: {where}: {first['msg']}", hint="obtain the artifact again") from error


def _canonical(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
