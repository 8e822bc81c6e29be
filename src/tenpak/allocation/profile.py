"""A profile: what each tensor would take and cost with each candidate codec. The file that allocation reads.

JSON that a person can read and edit, checked strictly: an unknown field, a loss that is not a number or a name given
twice is an error. Recipes are as ``recipes.format`` writes them; ``dense`` leaves a tensor as it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tenpak.artifact.writer import replace_file
from tenpak.errors import AllocationError

__all__ = [
    "Measured",
    "Option",
    "Profile",
    "ProfileSource",
    "ProfiledTensor",
    "Strict",
    "read_json",
    "require_once",
    "write_json",
]

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Document = TypeVar("Document", bound=BaseModel)

_MOST_BYTES = 1_000_000_000


class Strict(BaseModel):
    """What is read from a file: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Option(Strict):
    """A candidate for a tensor: bytes of its payloads, and predicted loss in nats per token of text."""

    recipe: str
    bytes: Natural
    loss: Loss


class Measured(Strict):
    """A prediction put to the test: KL, nats per token, of the original with this tensor alone replaced."""

    tensor: str
    recipe: str
    predicted: Loss
    kl: Annotated[float, Field(allow_inf_nan=False)]


class ProfiledTensor(Strict):
    """A stored tensor of the model.

    Attributes:
        name: of the tensor.
        dtype: safetensors name of the dtype in which it stays if it is left dense.
        shape: of the tensor.
        bytes: if left dense.
        group: the name of the first of the tensors that always share a codec: experts of a layer.
        fused: names what engines fuse it into (queries, keys and values of a block; gate and up), or None.
        options: its candidates; none where it cannot be compressed.
    """

    name: str
    dtype: str
    shape: tuple[Natural, ...]
    bytes: Natural
    group: str
    fused: str | None = None
    options: tuple[Option, ...] = ()


class ProfileSource(Strict):
    """The model and the text.

    Attributes:
        name: of the model.
        sha256: of the checkpoint, as manifests have it.
        parameters: of the model, tied ones once.
        text: name of the text that the statistics are of.
        tokens: read of it.
    """

    name: str
    sha256: str
    parameters: Annotated[int, Field(ge=1)]
    text: str
    tokens: Natural


class Profile(Strict):
    """All stored tensors, in stored order, with what each candidate would take and cost."""

    format: Literal["tenpak profile/1"] = "tenpak profile/1"
    source: ProfileSource
    candidates: tuple[str, ...]
    tensors: tuple[ProfiledTensor, ...]
    measured: tuple[Measured, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """A profile from its file.

        Raises:
            AllocationError: the file cannot be read, or is no sound profile; says where.
        """
        found = read_json(cls, Path(path), "`tenpak profile MODEL -o FILE` makes one")
        require_once(Path(path), [tensor.name for tensor in found.tensors])
        return found

    def write(self, path: str | Path) -> None:
        """Write it to a file, atomically. Raises ArtifactError where that fails."""
        write_json(self, Path(path))


def read_json(kind: type[Document], path: Path, hint: str) -> Document:
    """A document from a file.

    Raises:
        AllocationError: the file cannot be read or is not what it should be; says where and, by ``hint``, what to do.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise AllocationError(f"{path} is too large for a {kind.__name__.lower()}", hint=hint)
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise AllocationError(f"cannot read {path}: {error.strerror or error}", hint=hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise AllocationError(f"{path}: {where}: {first['msg']}", hint=hint) from error


def write_json(document: BaseModel, path: Path) -> None:
    """Write a document with a line for each tensor, atomically. Raises ArtifactError where that fails."""
    content = document.model_dump(mode="json", exclude_none=True)
    lines = [f"{json.dumps(key)}: {_value(value)}" for key, value in content.items()]
    replace_file(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def require_once(path: Path, names: Sequence[str]) -> None:
    """Raise AllocationError where a name is given twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise AllocationError(f"{path} names {name!r} twice", hint="keep one of them")
        seen.add(name)
