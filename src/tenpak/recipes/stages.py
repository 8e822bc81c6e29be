"""The stages of a recipe, as ``GRAMMAR`` has them, read one by one: a head, and options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Final

from tenpak.codecs.additive import Additive
from tenpak.codecs.base import Codec
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq, Nearest, Rounding
from tenpak.codecs.sparse import Sparse
from tenpak.codecs.sparse24 import Sparse24
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.vector import Vector
from tenpak.errors import RecipeError
from tenpak.recipes.options import Options, read_options

__all__ = ["DENSE", "HEADS", "IMPORTANCE", "KINDS", "PARTS", "read_stage"]

DENSE: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Codecs of factors and scales, which are matrices too.
PARTS: Final[dict[str, Codec]] = {
    **{word: Dense(dtype) for word, dtype in DENSE.items()},
    "int8": Uniform(8, None, symmetric=True),
    "int4": Uniform(4, 32),
}
KINDS: Final = {"plain-": "plain", "mag-": "magnitude", "act-": "activation", "": "whitened"}
IMPORTANCE: Final = {"": "magnitude", "wanda-": "wanda", "gptq-": "sparsegpt"}

_GRIDS = [*(f"int{bits}" for bits in range(2, 9)), *(f"nf{bits}" for bits in range(2, 5))]
_PREFIXES = ("gptq-", "awq-", "spin-", "awq-gptq-", "spin-gptq-", "awq-spin-", "spin-awq-")
# Examples of all heads, to find what is near to one that is none.
HEADS: Final = (
    *_GRIDS,
    *(prefix + grid for prefix in _PREFIXES for grid in _GRIDS),
    *DENSE,
    "dense",
    *(f"sparse24-{importance}{values}" for importance in IMPORTANCE for values in ("int4", "nf4", "fp16")),
    *(f"sparse5%-{importance}{values}" for importance in ("", "wanda-") for values in ("int8", "nf4", "fp16")),
    *(f"{kind}lowrank32" for kind in KINDS),
    *("lowrank:bpw=2", "pattern4x224", "vq4x256", "gptq-vq4x256", "aq2x8x256", "trellis:0.001"),
)

_INT_OPTIONS = ("row", "sym", "asym", "search")
_NF_OPTIONS = ("row", "learned")
# Options of prefixes → the prefix that they need.
_OWNERS = {"actorder": "gptq-", "damp=": "gptq-", "sweeps=": "gptq-", "exp=": "awq-", "seed=": "spin-"}


def read_stage(head: str, words: list[str], recipe: str) -> Codec | None:
    """The codec of a stage, None where there is no such head; ``recipe`` is the whole, for messages.

    Raises:
        RecipeError: an option is not one of this stage, or a value is out of range.
    """
    for pattern, read in _STAGES:
        match = pattern.fullmatch(head)
        if match:
            return read(match, words, recipe)
    return None


def _dense(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    read_options(words, (), recipe)
    return Dense(DENSE[match[0]])


def _grid(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    """Scaled channels and rotations, at most one each, around a grid."""
    wrappers, gptq, kind, bits = match[1].split("-")[:-1], match[2], match[3], int(match[4])
    if len(set(wrappers)) < len(wrappers):
        raise RecipeError(f"{recipe!r} has a prefix more than once", hint="keep one of them, e.g. awq-gptq-int4")
    prefixes = {f"{wrapper}-" for wrapper in wrappers} | ({gptq} if gptq else set())
    owned = tuple(word for word, owner in _OWNERS.items() if owner in prefixes)
    options = read_options(words, (*_grid_options(kind), *owned), recipe, groups=True, owners=_OWNERS)
    rounding: Rounding = Nearest()
    if gptq:
        order = "activation" if "actorder" in options else "natural"
        rounding = Gptq(options.number("damp=", 0.01), order, options.count("sweeps=", 0))
    codec = _plain_grid(kind, bits, options, 128 if prefixes else None, rounding)
    for wrapper in reversed(wrappers):
        if wrapper == "spin":
            codec = Rotated(codec, options.count("seed=", 0))
        else:
            codec = ChannelScaled(codec, options.number_or_none("exp="))
    return codec


def _grid_options(kind: str) -> tuple[str, ...]:
    return _INT_OPTIONS if kind == "int" else _NF_OPTIONS


def _plain_grid(kind: str, bits: int, options: Options, default: int | None, rounding: Rounding) -> Codec:
    """The grid at the heart of a stage; ``default`` is its group after a prefix."""
    if "group" in options:
        size = options.values["group"]
        group = None if size == "row" else int(size[1:])
    else:
        group = default or (64 if kind == "nf" else 32 if bits != 8 else None)
    if kind == "nf":
        return NormalFloat(bits, group, "learned" if "learned" in options else "normal", rounding)
    asked = options.only_of(("sym", "asym"))
    symmetric = asked == "sym" or (group is None and asked is None)
    return Uniform(bits, group, symmetric, "search" in options, rounding)


def _sparse24(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    """Two of every four weights: in a grid, rounded to nearest, or dense."""
    importance, kind, bits, dense = match[1] or "", match[2], match[3], match[4]
    owned = ("damp=", "sweeps=") if importance == "gptq-" else ()
    owners = {"damp=": "sparse24-gptq-", "sweeps=": "sparse24-gptq-"}
    known = (*(() if dense else _grid_options(kind)), *owned)
    options = read_options(words, known, recipe, groups=not dense, owners=owners)
    values = _kept(kind, bits, dense, options)
    return Sparse24(values, IMPORTANCE[importance], options.number("damp=", 0.01), options.count("sweeps=", 4))


def _sparse(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    """A share of every row: in a grid, rounded to nearest, or dense."""
    share, importance, kind, bits, dense = match.groups()
    options = read_options(words, () if dense else _grid_options(kind), recipe, groups=not dense)
    # Not divided by 100, which rounds: what words say is the nearest number to it.
    return Sparse(float(f"{share}e-2"), _kept(kind, bits, dense, options), IMPORTANCE[importance or ""])


def _kept(kind: str, bits: str, dense: str | None, options: Options) -> Codec:
    """The codec of the weights that are not zero."""
    return Dense(DENSE[dense]) if dense else _plain_grid(kind, int(bits), options, 128, Nearest())


def _lowrank(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    options = read_options(words, ("bpw=", "energy=", "error=", *PARTS, "damp=", "norm"), recipe)
    rank = int(match[2]) if match[2] else None
    energy, bpw, error = (options.number_or_none(name) for name in ("energy=", "bpw=", "error="))
    if [rank, energy, bpw, error].count(None) != 3:
        raise RecipeError(
            f"{match[0]!r} takes exactly one of a rank, bpw=, energy= and error=, in recipe {recipe!r}",
            hint="e.g. lowrank32, or lowrank:bpw=2",
        )
    factor = PARTS[options.only_of(PARTS) or "int8"]
    damping = options.number("damp=", 0.01)
    return LowRank(rank, energy, bpw, error, KINDS[match[1] or ""], factor, damping, "norm" in options)


def _pattern(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    options = read_options(words, ("terms=", "base=", "scales=", "calibrated", "seed="), recipe)
    scales = options.values.get("scales=", "fp16")
    if scales not in PARTS:
        raise RecipeError(
            f"{scales!r} is no codec for scales, in recipe {recipe!r}", hint=f"scales= is one of {', '.join(PARTS)}"
        )
    return Pattern(
        int(match[1]),
        int(match[2] or 224),
        options.count_or_none("base="),
        options.count("terms=", 1),
        PARTS[scales],
        "calibrated" in options,
        options.count("seed=", 0),
    )


def _vector(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    gptq, dimension, entries = match[1], int(match[2]), int(match[3])
    options = read_options(words, ("row", "magnitude", "rounds=", "damp=", "seed=", "shared"), recipe)
    if gptq and "magnitude" in options:
        raise RecipeError(f"{recipe!r} asks for both gptq- and magnitude", hint="keep one of them")
    weighting = "calibrated" if gptq else "magnitude" if "magnitude" in options else "equal"
    rounds, damping, seed = options.count("rounds=", 2), options.number("damp=", 0.01), options.count("seed=", 0)
    shared = "shared" in options
    return Vector(dimension, entries, "row" in options or shared, weighting, rounds, damping, seed, shared)


def _additive(match: re.Match[str], words: list[str], recipe: str) -> Codec:
    options = read_options(words, ("datafree", "beam=", "rounds=", "damp=", "seed="), recipe)
    return Additive(
        int(match[1]),
        int(match[2]),
        int(match[3]),
        "datafree" not in options,
        options.count("beam=", 8),
        options.count("rounds=", 6),
        options.number("damp=", 0.01),
        options.count("seed=", 0),
    )


def _trellis(_: re.Match[str], words: list[str], recipe: str) -> Codec:
    try:
        step = float(words[0])
    except (IndexError, ValueError):
        step = math.nan
    if math.isnan(step):
        raise RecipeError(
            f"{recipe!r} is not trellis:STEP with options",
            hint="e.g. trellis:0.001; options are datafree, states=, rate=, damp=",
        )
    options = read_options(words[1:], ("datafree", "states=", "rate=", "damp="), recipe)
    states, rate, damping = options.count("states=", 256), options.number("rate=", 0.3), options.number("damp=", 0.01)
    return Trellis(step, states, "datafree" not in options, rate, damping)


_NUMBER = r"(\d{1,9})"
_VALUES = rf"(?:(int|nf)(\d{{1,4}})|({'|'.join(DENSE)}))"
_STAGES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], list[str], str], Codec]], ...] = (
    (re.compile("|".join(DENSE)), _dense),
    (re.compile(r"((?:awq-|spin-)*)(gptq-)?(int|nf)(\d{1,4})"), _grid),
    (re.compile(rf"sparse24-(wanda-|gptq-)?{_VALUES}"), _sparse24),
    (re.compile(rf"sparse(\d{{1,9}}(?:\.\d{{1,30}})?)%-(wanda-)?{_VALUES}"), _sparse),
    (re.compile(rf"(plain-|mag-|act-)?lowrank{_NUMBER}?"), _lowrank),
    (re.compile(rf"pattern{_NUMBER}(?:x{_NUMBER})?"), _pattern),
    (re.compile(rf"(gptq-)?vq{_NUMBER}x{_NUMBER}"), _vector),
    (re.compile(rf"aq{_NUMBER}x{_NUMBER}x{_NUMBER}"), _additive),
    (re.compile("trellis"), _trellis),
)
