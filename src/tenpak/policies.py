"""Policies: which codec each tensor gets, decided by what it is and where, by rules that were published or are common.

A policy gives overrides, as ``--set`` would: nothing after it knows of it, and the
overrides that an artifact records make it again. Overrides of the user come after, and win.

- ``PART`` and ``PART-whitened``: the matrices of some parts of every block of low rank, in INT8 factors; the rest by
  the recipe, which is ``dense`` unless given
- ``mixed``: bits and groups by part and position
- ``buckets``, ``buckets-fisher``: groups by sensitivity, see ``allocation.buckets``

None of them sees a budget, and none is the best that its bytes can buy: docs/policies.md compares.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenpak.allocation.buckets import sensitivities
from tenpak.allocation.patterns import Group, alike, covering, template
from tenpak.calibration.statistics import StatisticsFolder
from tenpak.checkpoint.parts import Part, Place, places
from tenpak.checkpoint.source import Checkpoint
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.validation import require_integer
from tenpak.errors import BudgetError, MissingStatisticsError, RecipeError
from tenpak.recipes import format, parse

__all__ = ["DEFAULT_MIN_DIM", "DEFAULT_RANK", "POLICIES", "Policy", "apply", "policy_of", "refuse_budget"]

DEFAULT_RANK = 128
DEFAULT_MIN_DIM = 1024

# What becomes of low rank, and how many times the rank it gets.
_PARTS: dict[str, tuple[frozenset[Part], int]] = {
    "k-proj": (frozenset({"k"}), 1),
    "q-v": (frozenset({"q", "v"}), 2),
    "qkv": (frozenset({"q", "k", "v", "qkv"}), 1),
    "out-proj": (frozenset({"o"}), 1),
    "attention": (frozenset({"q", "k", "v", "qkv", "o"}), 1),
    "mlp": (frozenset({"up", "down"}), 1),
}
_WHITENED = "-whitened"
_BOUNDARY = 2  # times the rank of the first and last blocks
_MOST_RANK = 8192
_FACTOR = Uniform(bits=8, group=None, symmetric=True)

# Bits and group, from the finest.
_FINE, _MIDDLE, _COARSE = (4, 16), (4, 32), (3, 32)
# Sensitivity above which a group of so many weights is taken.
_BUCKETS = ((0.5, 8), (0.2, 16), (0.05, 32), (-1.0, 64))

POLICIES: dict[str, str] = {
    **{name: f"plain low rank, INT8 factors, of {', '.join(sorted(parts))}" for name, (parts, _) in _PARTS.items()},
    **{name + _WHITENED: f"the same as {name} by least error of the output; needs calibration" for name in _PARTS},
    "mixed": "attention's queries and keys and the first and last blocks finest, MLPs between coarsest",
    "buckets": "groups of 8 to 64 by a sensitivity guessed from names, position and magnitude",
    "buckets-fisher": "groups of 8 to 64 by the sensitivity that statistics tell",
}


@dataclass(frozen=True)
class Policy:
    """A policy and its options.

    Attributes:
        name: one of ``POLICIES``.
        rank: of a low-rank matrix, 1 to 8192, by default 128; twice that in boundary blocks, and never so much that
            INT8 factors take more bytes than the matrix itself would in INT8.
        min_dim: matrices whose smaller side is less are left alone, by default 1024; low rank only.

    Raises:
        RecipeError: there is no such policy, it takes no such option, or a value is out of range.
    """

    name: str
    rank: int | None = None
    min_dim: int | None = None

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            near = difflib.get_close_matches(self.name, POLICIES, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise RecipeError(f"there is no policy {self.name!r}", hint=f"{hint}policies are {', '.join(POLICIES)}")
        for option, value, most in (("rank", self.rank, _MOST_RANK), ("min_dim", self.min_dim, 1 << 30)):
            if value is None:
                continue
            if not self.low_rank:
                raise RecipeError(
                    f"the policy {self.name} has no {option}", hint=f"only {', '.join(_PARTS)} have: leave it out"
                )
            require_integer(f"policy {self.name}", option, value, 1, most)

    @property
    def low_rank(self) -> bool:
        """Whether it gives matrices a low rank."""
        return self.name.removesuffix(_WHITENED) in _PARTS

    @property
    def default_recipe(self) -> str:
        """What it builds on where no recipe is given."""
        return "dense" if self.low_rank else "int4:g32"


def policy_of(name: str | None, rank: int | None = None, min_dim: int | None = None) -> Policy | None:
    """The policy that was asked for; None where none was. Raises ``RecipeError`` as ``Policy`` does."""
    if name is not None:
        return Policy(name, rank, min_dim)
    if rank is not None or min_dim is not None:
        raise RecipeError("rank and min-dim are options of a policy, and there is none", hint="e.g. --policy k-proj")
    return None


def refuse_budget(policy: Policy | str | None, budget: str | None) -> None:
    """Raise ``BudgetError`` where both are given: each would choose the codecs."""
    if policy is not None and budget is not None:
        name = policy if isinstance(policy, str) else policy.name
        raise BudgetError(
            f"a budget ({budget}) chooses the codecs itself and excludes a policy ({name})",
            hint="leave out one of them; --set PATTERN=RECIPE still decides for single tensors",
        )


def apply(
    policy: Policy,
    weights: Sequence[Weight],
    checkpoint: Checkpoint,
    recipe: str,
    known: StatisticsFolder | None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[str, ...]:
    """The overrides that a policy stands for, as ``--set`` takes them.

    Args:
        policy: the policy.
        weights: all tensors of the model.
        checkpoint: the source; only ``buckets`` and its kin read from it.
        recipe: what the policy builds on: that of the tensors which low rank leaves alone, or an ``int`` recipe whose
            bits or groups are changed.
        known: statistics of the original model, for ``buckets-fisher``.
        progress: told of the weights that are read, see ``sensitivities``.

    Raises:
        RecipeError: no tensor is what the policy is about (the message lists the layers), or the recipe is no ``int``
            recipe where there must be one.
        MissingStatisticsError: ``buckets-fisher`` without statistics.
        CheckpointError, CodecError, CalibrationError: a tensor, or what is known of it, cannot be used; names it.
    """
    found = places(weights)
    groups = alike([weight for weight in weights if weight.name in found])
    if policy.low_rank:
        wanted = _of_low_rank(policy, groups, found)
    elif policy.name == "mixed":
        regrid = _regrid(policy, recipe)
        wanted = [(group, regrid(*_level(found[group[0].name]))) for group in groups]
    else:
        if policy.name != "buckets-fisher":
            known = None
        elif known is None:
            raise MissingStatisticsError(
                "the policy buckets-fisher needs statistics of the model",
                hint="collect them, `tenpak calibrate MODEL -o FOLDER`, and give --statistics FOLDER; or take buckets",
            )
        else:
            known.require_source(checkpoint)
        regrid = _regrid(policy, recipe)
        weighed = sensitivities(checkpoint, groups, found, known, progress)
        wanted = [
            (group, regrid(None, next(size for above, size in _BUCKETS if sensitivity > above)))
            for group, sensitivity in zip(groups, weighed, strict=True)
        ]
    if not wanted:
        raise _nothing(policy, groups, found)
    overrides = covering(weights, parse(recipe), wanted)
    return tuple(f"{override.pattern}={format(override.codec)}" for override in overrides)


def _of_low_rank(policy: Policy, groups: Sequence[Group], found: dict[str, Place]) -> list[tuple[Group, Codec]]:
    parts, times = _PARTS[policy.name.removesuffix(_WHITENED)]
    rank = times * (policy.rank or DEFAULT_RANK)
    whitened = policy.name.endswith(_WHITENED)
    wanted: list[tuple[Group, Codec]] = []
    for group in groups:
        place, (rows, columns) = found[group[0].name], group[0].matrix_shape
        if place.part in parts and min(rows, columns) >= (policy.min_dim or DEFAULT_MIN_DIM):
            worth = rows * columns // (rows + columns)  # beyond it, INT8 of the matrix itself is smaller and better
            here = max(1, min(rank * (_BOUNDARY if place.boundary else 1), worth, _MOST_RANK))
            kind = "whitened" if whitened else "plain"
            wanted.append((group, LowRank(rank=here, kind=kind, factor=_FACTOR, norm_correction=not whitened)))
    return wanted


def _level(place: Place) -> tuple[int, int]:
    """Bits and group by part and position; what is no known part is kept fine."""
    if place.boundary or place.part in ("q", "k", "qkv", "other"):
        return _FINE
    return _COARSE if place.part in ("up", "down") else _MIDDLE


def _regrid(policy: Policy, recipe: str) -> Callable[[int | None, int], Codec]:
    """What gives the recipe's codec with other bits (None: its own) and another group."""

    def regrid(codec: Codec | None, bits: int | None, group: int) -> Codec:
        if isinstance(codec, ChannelScaled | Rotated):
            return replace(codec, inner=regrid(codec.inner, bits, group))
        if not isinstance(codec, Uniform):
            raise RecipeError(
                f"the policy {policy.name} changes bits and groups of an int recipe, and {recipe!r} is none",
                hint="e.g. --recipe gptq-int4:g32, or leave the recipe out",
            )
        return replace(codec, bits=codec.bits if bits is None else bits, group=group)

    codec = parse(recipe)
    regrid(codec, None, 32)  # refused before anything is read
    return lambda bits, group: regrid(codec, bits, group)


def _nothing(policy: Policy, groups: Sequence[Group], found: dict[str, Place]) -> RecipeError:
    """The error of a policy that matches nothing: says why, and lists the layers."""
    parts, _ = _PARTS.get(policy.name.removesuffix(_WHITENED), (frozenset(), 0))
    listed: dict[str, Part] = {}
    sides: list[int] = []
    for group in groups:
        name, part = group[0].name, found[group[0].name].part
        rows, columns = group[0].matrix_shape
        listed.setdefault(f"{template(name)} ({part}, {rows} × {columns})", part)
        sides += [min(rows, columns)] if part in parts else []
    layers = ", ".join(listed) or "none in numbered blocks"
    hint = f"policies by part are {', '.join(_PARTS)}; or give the codec by --set PATTERN=RECIPE"
    if sides:
        why = f"the largest has {max(sides)} on its smaller side, less than min-dim {policy.min_dim or DEFAULT_MIN_DIM}"
        hint = f"give --min-dim {max(sides)} or less, and a --rank well below it"
    elif "qkv" in listed.values() and parts & {"q", "k", "v"}:
        why = "queries, keys and values are one tensor here, which can only be taken as a whole"
        hint = "--policy qkv takes it as a whole"
    else:
        why = "there is none of them"
    return RecipeError(f"the policy {policy.name} matches no layer: {why}; layers are {layers}", hint=hint)
