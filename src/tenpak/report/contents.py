"""What the page tells of one artifact, read from its manifest, its headers and ``report.json``; no weights are read."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tenpak.artifact.reader import Artifact, open_artifact
from tenpak.artifact.schema import Manifest
from tenpak.artifact.writer import REPORT_NAME
from tenpak.checkpoint.header import read_whole
from tenpak.codecs import registry
from tenpak.recipes import format as recipe_of
from tenpak.report.bill import Bill, size_bill
from tenpak.report.inputs import Quality, Recorded
from tenpak.report.report import Report, measured

__all__ = ["Contents", "Place", "Stored", "place", "read_contents", "short_kinds", "short_recipe"]

_MAX_REPORT_BYTES = 100_000_000
_MOST_RECIPES = 8  # beyond that, codecs are told apart by their ids only
_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the model, read off its name.

    Attributes:
        block: number of the block (``3`` of ``model.layers.3.mlp.up_proj.weight``); None outside of blocks.
        part: what it is in there (``mlp.up_proj``), numbers of experts as ``*``.
    """

    block: int | None
    part: str


@dataclass(frozen=True)
class Stored:
    """One stored tensor.

    Attributes:
        name: in the checkpoint.
        place: in the model.
        shape: when decoded.
        codec: what stores of its kind are called: a recipe, a codec id where there are many, or ``dense BF16``.
        recipe: of its codec in full; None where it is dense, or what other tensors share.
        bytes: of its payloads or of the dense tensor.
        reason: why it is dense; empty where it is not.
    """

    name: str
    place: Place
    shape: tuple[int, ...]
    codec: str
    recipe: str | None
    bytes: int
    reason: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bpw(self) -> float:
        """Bits per weight of this tensor, headers apart."""
        return 8 * self.bytes / max(self.numel, 1)

    @property
    def is_matrix(self) -> bool:
        """Whether it is compressed, or could be by its shape."""
        return self.recipe is not None or (bool(self.reason) and len(self.shape) > 1)


@dataclass(frozen=True)
class Contents:
    """One artifact.

    Attributes:
        name: of its folder.
        manifest: of the artifact.
        report: its sizes.
        quality: as the manifest records it; None where it was not measured.
        recorded: from ``report.json``; all parts missing where there is none that can be read.
        tensors: name → stored tensor, in the manifest's order.
        bill: what the bytes of the weight files are spent on.
    """

    name: str
    manifest: Manifest
    report: Report
    quality: Quality | None
    recorded: Recorded
    tensors: Mapping[str, Stored]
    bill: Bill

    @property
    def codecs(self) -> list[str]:
        """The names in ``Stored.codec``, by falling bytes; dense ones last."""
        total: dict[str, int] = defaultdict(int)
        for tensor in self.tensors.values():
            total[tensor.codec] += tensor.bytes
        return sorted(total, key=lambda codec: (codec.startswith("dense "), -total[codec], codec))


def read_contents(folder: str | Path) -> Contents:
    """Read an artifact for the page. Raises as ``open_artifact`` does."""
    artifact = open_artifact(folder)
    manifest = artifact.manifest
    recipes = {name: recipe_of(registry.from_json(entry.codec)) for name, entry in manifest.weights.items()}
    many = len(set(recipes.values())) > _MOST_RECIPES
    labels = {
        name: str(manifest.weights[name].codec["id"]) if many else short_recipe(recipe)
        for name, recipe in recipes.items()
    }
    return Contents(
        name=artifact.folder.resolve().name,
        manifest=manifest,
        report=measured(folder),
        quality=_quality(manifest),
        recorded=_recorded(artifact.folder / REPORT_NAME),
        tensors=_stored(artifact, recipes, labels),
        bill=size_bill(artifact, labels),
    )


def place(name: str) -> Place:
    """The place of a tensor; the first number in a name is that of its block, the others count experts."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal() and len(part) < 7]
    if not numbers:
        return Place(None, ".".join(parts))
    first = numbers[0]
    rest = ["*" if index in numbers else part for index, part in enumerate(parts) if index > first]
    return Place(int(parts[first]), ".".join(rest) or parts[first - 1])


def short_kinds(parts: Iterable[str]) -> dict[str, str]:
    """Part → short name (``self_attn.q_proj`` → ``q``), as long as needed to be different; attention first."""
    found = list(dict.fromkeys(parts))
    short: dict[str, str] = {}
    for length in range(1, 1 + max((part.count(".") + 1 for part in found), default=0)):
        tried = {part: _last(part, length) for part in found if part not in short}
        names = [*tried.values(), *short.values()]
        short |= {part: name for part, name in tried.items() if names.count(name) == 1}
    short |= {part: part for part in found if part not in short}
    order = {name: number for number, name in enumerate(_ORDER)}
    return dict(sorted(short.items(), key=lambda item: order.get(item[1], len(order))))


def short_recipe(recipe: str) -> str:
    """A recipe for people: long numbers rounded, long JSON cut."""
    rounded = re.sub(r"\d+\.\d{4,}(?:e-?\d+)?", lambda found: f"{float(found[0]):.3g}", recipe)
    return rounded if len(rounded) <= 40 else rounded[:39] + "…"


def _last(part: str, length: int) -> str:
    pieces = part.split(".")[-length:]
    return ".".join(piece.removesuffix("_proj").removesuffix("_tokens") or piece for piece in pieces)


def _stored(artifact: Artifact, recipes: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, Stored]:
    manifest = artifact.manifest
    found = {
        name: Stored(name, place(name), entry.shape, labels[name], recipes[name], entry.bits // 8)
        for name, entry in manifest.weights.items()
    }
    for name, (weight, *_) in manifest.sharers.items():
        nbytes = artifact.tensors[name].nbytes
        found[name] = Stored(name, Place(None, name), manifest.shared[name].shape, labels[weight], None, nbytes)
    for name, dense in manifest.dense.items():
        nbytes = artifact.tensors[name].nbytes
        found[name] = Stored(name, place(name), dense.shape, f"dense {dense.dtype}", None, nbytes, dense.reason)
    return found


def _quality(manifest: Manifest) -> Quality | None:
    try:
        return None if manifest.quality is None else Quality.model_validate(manifest.quality)
    except ValidationError:
        return None  # the schema of manifests leaves open what a quality is


def _recorded(path: Path) -> Recorded:
    """What ``report.json`` says; it is no part of what makes an artifact whole, so a broken one says nothing."""
    try:
        content: Any = json.loads(read_whole(path, _MAX_REPORT_BYTES))
        return Recorded.model_validate(content)
    except (OSError, ValueError, RecursionError):  # a ValidationError is a ValueError
        return Recorded()
