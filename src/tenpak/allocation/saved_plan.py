"""A plan as a file: a recipe for every tensor that can be compressed. Made by ``allocate``, edited by people.

Only names and recipes count when it is read; bytes and losses are what was predicted when it was made.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from tenpak.allocation.budget import Budget
from tenpak.allocation.profile import Document, Loss, Natural, Strict

__all__ = ["PlannedTensor", "SavedPlan"]


class PlannedTensor(Strict):
    """A tensor's recipe, and what it was predicted to take (bytes of its payloads) and to cost (nats per token)."""

    name: str
    recipe: str
    bytes: Natural | None = None
    loss: Loss | None = None


class SavedPlan(Document):
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

    made_by: ClassVar[str] = "tenpak allocate PROFILE -o FILE"

    format: Literal["tenpak plan/1"] = "tenpak plan/1"
    source: str
    source_sha256: str
    budget: str | None = None
    bytes: Natural | None = None
    loss: Loss | None = None
    bound: Loss | None = None
    tensors: tuple[PlannedTensor, ...]

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return [tensor.name for tensor in self.tensors]

    @property
    def gap(self) -> float:
        """How far the plan may be above the best one in what was not limited, relative to that; 0 for the best."""
        by_size = self.budget is None or Budget.parse(self.budget).is_size
        reached, least = (self.loss if by_size else self.bytes) or 0.0, self.bound or 0.0
        return reached / least - 1 if least > 0 else 0.0
