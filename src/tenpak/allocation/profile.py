"""A profile: what each tensor would take and cost with each candidate codec. The file that allocation reads.

JSON that a person can read and edit, checked strictly: an unknown field, a loss that is not a number or a name given
twice is an error. Recipes are as ``recipes.format`` writes them; ``dense`` leaves a tensor as it was.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tenpak.artifact.writer import replace_file
from tenpak.checkpoint.header import read_whole
from tenpak.errors import AllocationError

__all__ = [
    "Document",
    "Loss",
    "Measured",
    "Natural",
    "Option",
    "Profile",
    "ProfileSource",
    "ProfiledTensor",
    "Strict",
]

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_MOST_BYTES = 1_000_000_000


class Strict(BaseModel):
    """What is read from a file: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Strict):
    """A file that lists tensors, each once."""

    made_by: ClassVar[str]

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Of its tensors."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A document from its file.

        Raises:
            AllocationError: the file cannot be read, or is not what it should be; says where.
        """
        path, hint = Path(path), f"`{cls.made_by}` makes one"
        try:
            found = cls.model_validate_json(read_whole(path, _MOST_BYTES))
        except OSError as error:
            raise AllocationError(f"cannot read {path}: {error.strerror or error}", hint=hint) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise AllocationError(f"{path}: {where}: {first['msg']}", hint=hint) from error
        seen: set[str] = set()
        for name in found.names:
            if name in seen:
                raise AllocationError(f"{path} names {name!r} twice", hint="keep one of them")
            seen.add(name)
        return found

    def write(self, path: str | Path) -> None:
        """Write it to a file with a line for each tensor, atomically. Raises ArtifactError where that fails."""
        content = self.model_dump(mode="json", exclude_none=True)
        lines = [f"{json.dumps(key)}: {_value(value)}" for key, value in content.items()]
        replace_file(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode())


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
        narrowed: safetensors name of a narrower dtype in which it stays beside the flagship codec, or None.
    """

    name: str
    dtype: str
    shape: tuple[Natural, ...]
    bytes: Natural
    group: str
    fused: str | None = None
    options: tuple[Option, ...] = ()
    narrowed: Literal["BF16"] | None = None


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


class Profile(Document):
    """All stored tensors, in stored order, with what each candidate would take and cost."""

    made_by: ClassVar[str] = "tenpak profile MODEL -o FILE"

    format: Literal["tenpak profile/1"] = "tenpak profile/1"
    source: ProfileSource
    candidates: tuple[str, ...]
    tensors: tuple[ProfiledTensor, ...]
    measured: tuple[Measured, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return [tensor.name for tensor in self.tensors]


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)
