"""From codecs for single tensors to overrides by pattern, few enough to read and to record."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain

from tenpak.allocation.plan import Override, make_plan
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec

__all__ = ["Group", "alike", "covering", "template"]

Group = list[Weight]
"""Tensors that are encoded alike: one, or the experts of a layer."""


def alike(weights: Sequence[Weight]) -> list[Group]:
    """Weights in groups that are encoded alike; copies of tied ones left out."""
    groups: dict[tuple[str, int], Group] = defaultdict(list)
    for weight in weights:
        if weight.tied_to is None:
            groups[weight.parameter, -1 if weight.slot is None else weight.slot[1]].append(weight)
    return list(groups.values())


def covering(
    weights: Sequence[Weight], codec: Codec | None, wanted: Sequence[tuple[Group, Codec | None]]
) -> tuple[Override, ...]:
    """Overrides that give these codecs to these tensors and change no other: what is usual, then exceptions.

    Args:
        weights: all tensors of the model.
        codec: what the others keep: that of the recipe.
        wanted: groups of tensors, each with its codec, or None to leave them dense.
    """
    families: dict[str, list[tuple[Group, Codec | None]]] = defaultdict(list)
    for group, own in wanted:
        families[template(group[0].name)].append((group, own))
    rules: list[Override] = []
    for pattern, members in families.items():
        usual = Counter(own for _, own in members).most_common(1)[0][0]
        if len(members) > 1 or len(members[0][0]) > 1:
            rules.append(Override(pattern, usual))
            members = [(group, own) for group, own in members if own != usual]
        rules += chain.from_iterable(_exceptions(group, own) for group, own in members)
    # A pattern may match more than was meant: other shapes, or components that it leaves open.
    goal = {entry.weight.name: entry.codec for entry in make_plan(weights, codec).entries}
    goal |= {weight.name: own for group, own in wanted for weight in group}
    got = make_plan(weights, codec, rules).entries
    rules += [
        Override(glob.escape(entry.weight.name), goal[entry.weight.name])
        for entry in got
        if entry.codec != goal[entry.weight.name]
    ]
    return tuple(rules)


def _exceptions(group: Group, codec: Codec | None) -> list[Override]:
    """One override for a group: what the names differ in is left open."""
    names = [weight.name.split(".") for weight in group]
    if len({len(name) for name in names}) > 1:
        return [Override(glob.escape(weight.name), codec) for weight in group]
    pattern = [glob.escape(same[0]) if len(set(same)) == 1 else "*" for same in zip(*names, strict=True)]
    return [Override(".".join(pattern), codec)]


def template(name: str) -> str:
    """A name with its numbers left open: ``model.layers.*.self_attn.k_proj.weight``."""
    return ".".join("*" if piece.isdigit() else glob.escape(piece) for piece in name.split("."))
