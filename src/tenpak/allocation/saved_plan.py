"""A plan as a file: a recipe for every tensor that can be compressed. Made by ``allocate``, edited by people.

Only names and recipes count when it is read; bytes and losses are what was predicted when it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tenpak.allocation.profile import Loss, Natural, Strict, read_json, require_once, write_json

__all__ = ["PlannedTensor", "SavedPlan"]


class PlannedTensor(Strict):
    """A tensor's recipe, and what it was predicted to take (bytes of its payloads) and to cost (nats per token)."""

    name: str
    recipe: str
    bytes: Natural | None = None
    loss: Loss | None = None


class SavedPlan(Strict):
    """A plan.

    Attributes:
        source: name of the model.
        source_sha256: of its checkpoint, as manifests have it.
        budget: that it was made for, or None.
        bytes: of all weight files, predicted; exact unless a codec's rate is only known after coding.
        loss: predicted, nats per token.
        bound: no plan of these candidates within the budget and rules has a lower predicted loss, or where the loss is
            limited, fewer bytes.
        tensors: all that can be compressed.
    """

    format: Literal["tenpak plan/1"] = "tenpak plan/1"
    source: str
    source_sha256: str
    budget: str | None = None
    bytes: Natural | None = None
    loss: Loss | None = None
    bound: Loss | None = None
    tensors: tuple[PlannedTensor, ...]

    @classmethod
    def read(cls, path: str | Path) -> SavedPlan:
        """A plan from its file.

        Raises:
            AllocationError: the file cannot be read, or is no sound plan; says where.
        """
        found = read_json(cls, Path(path), "`tenpak allocate PROFILE -o FILE` makes one")
        require_once(Path(path), [tensor.name for tensor in found.tensors])
        return found

    def write(self, path: str | Path) -> None:
        """Write it to a file, atomically. Raises ArtifactError where that fails."""
        write_json(self, Path(path))
