"""Saved plans as overrides: what ``--plan`` gives to each tensor of a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from tenpak.allocation.allocate import DENSE, Rules
from tenpak.allocation.patterns import Group, alike, covering
from tenpak.allocation.saved_plan import SavedPlan
from tenpak.checkpoint.source import Checkpoint, source_sha256
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec
from tenpak.errors import AllocationError, RecipeError
from tenpak.recipes import format, parse, parse_overrides

__all__ = ["overriding", "planned", "rules_of"]


def planned(plan: SavedPlan, weights: Sequence[Weight], checkpoint: Checkpoint) -> tuple[str, ...]:
    """The overrides that a plan stands for, as ``--set`` takes them, on top of the recipe ``dense``.

    Raises:
        AllocationError: the plan is of another model, names a tensor that this one has not or that cannot be
            compressed, leaves one out, or gives one a recipe that cannot be understood.
    """
    able = {weight.name: weight for weight in weights if weight.kind != "dense" and weight.tied_to is None}
    recipes = {tensor.name: tensor.recipe for tensor in plan.tensors}
    for name in recipes:
        if name not in able:
            near = difflib.get_close_matches(name, able, n=2, cutoff=0.5)
            known = any(weight.name == name for weight in weights)
            raise AllocationError(
                f"the plan names {name!r}, which {'cannot be compressed' if known else 'the model does not have'}",
                hint=f"near: {', '.join(near)}" if near else "was it made for another model? profile this one",
            )
    missing = [name for name in able if name not in recipes]
    if missing:
        raise AllocationError(
            f"the plan says nothing of {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            hint=f'give it a recipe, or "{DENSE}" to leave it as it was',
        )
    if source_sha256(checkpoint) != plan.source_sha256:
        raise AllocationError(
            f"the plan is for another model ({plan.source}) or other weights than those of {checkpoint.name}",
            hint="profile this model: tenpak profile MODEL -o FILE",
        )
    return overriding(weights, recipes)


def rules_of(
    pins: Sequence[str] = (), bans: Sequence[str] = (), least: Sequence[str] = (), *, fused: bool = False
) -> Rules:
    """Rules from ``PATTERN=RECIPE`` (pins, bans) and ``PATTERN=BITS`` (least).

    Raises:
        RecipeError: an entry cannot be understood.
        AllocationError: bits are no positive number.
    """
    floors = []
    for entry in least:
        pattern, _, bits = entry.rpartition("=")
        try:
            floors.append((pattern.strip(), float(bits)))
        except ValueError:
            raise AllocationError(f"{entry!r} sets no bits for a pattern", hint="e.g. 'embed*=4'") from None
        if not (pattern.strip() and 0 < floors[-1][1] < 1e6):
            raise AllocationError(f"{entry!r} sets no bits for a pattern", hint="e.g. 'embed*=4'")
    read = [tuple((pattern, format(codec)) for pattern, codec in parse_overrides(rules)) for rules in (pins, bans)]
    return Rules(read[0], read[1], tuple(floors), fused)


def overriding(weights: Sequence[Weight], recipes: Mapping[str, str]) -> tuple[str, ...]:
    """Overrides that give these recipes to these tensors, on top of ``dense``.

    Raises:
        AllocationError: a recipe cannot be understood, or tensors that are encoded alike differ.
    """
    codecs: dict[str, Codec | None] = {}
    for name, recipe in recipes.items():
        try:
            codecs[name] = parse(recipe)
        except RecipeError as error:
            raise AllocationError(f"{name}: {error}", hint=error.hint) from error
    wanted: list[tuple[Group, Codec | None]] = []
    for group in alike([weight for weight in weights if weight.name in codecs]):
        chosen = {format(codecs[weight.name]): codecs[weight.name] for weight in group}
        if len(chosen) > 1 and DENSE in chosen:
            raise AllocationError(
                f"{group[0].name!r} and other experts of its layer cannot be partly dense",
                hint="give all of them a recipe, or none",
            )
        wanted += [([w for w in group if codecs[w.name] == codec], codec) for codec in chosen.values()]
    return tuple(f"{rule.pattern}={format(rule.codec)}" for rule in covering(weights, None, wanted))
