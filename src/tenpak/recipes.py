"""Recipes: the short strings, JSON objects and preset names that stand for codecs.

Grammar (case and surrounding blanks do not matter)::

    recipe  = "dense" | stage { "+" stage } | JSON object       a sum encodes what the stages before it leave
    stage   = { "awq-" | "spin-" } [ "gptq-" ] grid { ":" option }
            | "fp32" | "bf16" | "fp16"                          dense in that dtype
            | "trellis:" STEP { ":" option }                    entropy-coded, rate by the step; needs calibration
            | preset [ ":" group ]                              the group replaces the preset's
    grid    = "int" BITS | "nf" BITS                            uniform, BITS 2 to 8; normalfloat, BITS 2 to 4
    group   = "g" SIZE | "row"                                  weights per scale, 8 to 256, or one scale per row
    option  = group
            | "sym" | "asym" | "search"                         int only
            | "learned"                                         nf only
            | "actorder" | "damp=" NUMBER | "sweeps=" COUNT     gptq only: order, relative damping, coordinate descent
            | "exp=" NUMBER                                     awq only: the exponent, 0 to 1
            | "seed=" COUNT                                     spin only: of the rotation's signs
            | "datafree"                                        trellis only: no calibration, all inputs alike
            | "states=" COUNT | "rate=" NUMBER | "damp=" NUMBER trellis only: 1 to 256, cost of a bit, damping

``awq-`` scales the input channels by their activity, ``spin-`` rotates the inputs, each at most once, the first of them
outermost: ``awq-spin-int4`` scales channels and rotates the scaled ones.

What is left out: ``g32`` for int2 to int7, ``row`` for int8, ``g64`` for nf, ``g128`` after a prefix; ``sym`` for rows,
``asym`` for groups; ``damp=0.01``, ``sweeps=0``, ``seed=0``, ``states=256``, ``rate=0.3``; the exponent is
searched. Without ``gptq-`` weights are rounded to nearest. ``dense`` means "leave it as it was" and parses to None.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tenpak.codecs import registry
from tenpak.codecs.base import Codec
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq, Nearest, Rounding
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import RecipeError

__all__ = ["PRESETS", "Preset", "format", "parse", "parse_overrides"]


@dataclass(frozen=True)
class Preset:
    """A recipe with a name.

    Attributes:
        recipe: the recipe string it stands for.
        description: one line for lists.
    """

    recipe: str
    description: str


PRESETS: dict[str, Preset] = {
    "int4-g8": Preset("int4:g8", "4 bits, FP16 scale and offset for every 8 weights: closest of the int4 family"),
    "int4-g16": Preset("int4:g16", "4 bits, scale and offset for every 16 weights"),
    "int4-g32": Preset("int4:g32", "4 bits, scale and offset for every 32 weights: the default"),
    "int4-g64": Preset("int4:g64", "4 bits, scale and offset for every 64 weights"),
    "int4-g128": Preset("int4:g128", "4 bits, scale and offset for every 128 weights: smallest of the int4 family"),
    "int4-opt": Preset("int4:g16:search", "int4-g16 with scale and offset refined to the least squared error"),
    "int4-residual": Preset("int4:g16+int2:g16", "int4-g16, and 2 bits on what it leaves"),
    "int3-g32": Preset("int3:g32", "3 bits, scale and offset for every 32 weights"),
    "nf3": Preset("nf3:g64", "3 bits on normal quantiles, one scale for every 64 weights"),
    "nf4": Preset("nf4:g64", "4 bits on normal quantiles, one scale for every 64 weights (as in QLoRA)"),
    "nf3-learned": Preset("nf3:g64:learned", "nf3 with levels learned for each tensor (Lloyd-Max)"),
    "nf4-learned": Preset("nf4:g64:learned", "nf4 with levels learned for each tensor (Lloyd-Max)"),
    "gptq-int4": Preset("gptq-int4:g128", "int4-g128 that makes up for rounding errors (GPTQ); needs calibration"),
    "gptq-int3": Preset("gptq-int3:g128", "3 bits, scale and offset for every 128 weights, GPTQ; needs calibration"),
    "gptq-style": Preset(
        "gptq-int4:g128", "gptq-int4 by another name: errors of a column are made up for by later ones"
    ),
    "awq-int4": Preset("awq-int4:g128", "int4-g128, channels scaled by activity, exponent searched; needs calibration"),
    "int4-calibrated": Preset("awq-int4:g128:exp=0.5", "int4-g128, channels scaled by activity^0.5; needs calibration"),
    "int3-calibrated": Preset("awq-int3:g128:exp=0.5", "3 bits, channels scaled by activity^0.5; needs calibration"),
    "spin-int4": Preset("spin-int4:g128", "int4-g128 of inputs rotated by random signs and a Hadamard matrix"),
    "int8": Preset("int8:row", "8 bits, one symmetric scale per row: what embeddings and heads take by default"),
}

_DENSE_WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_INT_OPTIONS = ("row", "sym", "asym", "search")
_NF_OPTIONS = ("row", "learned")
# Options of prefixes → the prefix that they need.
_OWNERS = {"actorder": "gptq-", "damp=": "gptq-", "sweeps=": "gptq-", "exp=": "awq-", "seed=": "spin-"}
_PREFIXES = ("gptq-", "awq-", "spin-", "awq-gptq-", "spin-gptq-", "awq-spin-", "spin-awq-")
_GRID_STAGE = re.compile(r"((?:awq-|spin-)*)(gptq-)?(int|nf)(\d{1,4})")
_GROUP = re.compile(r"row|g\d{1,9}")
_EXAMPLES = "a recipe looks like int4:g32, int8:row, nf4:g64 or int4:g16+int2:g16; `tenpak recipes` lists presets"


def parse(text: str) -> Codec | None:
    """The codec that a recipe stands for, or None for ``dense``: leave the tensor as it was.

    Raises:
        RecipeError: the recipe cannot be understood (the hint says what is near) or a value is out of range.
        UnknownCodecError: a JSON recipe names a codec that is not registered.
    """
    stripped = text.strip()
    if stripped.startswith("{"):
        return _parse_json(stripped)
    recipe = stripped.lower()
    if not recipe:
        raise RecipeError("the recipe is empty", hint=_EXAMPLES)
    if recipe == "dense":
        return None
    *before, codec = [_parse_stage(stage.strip(), recipe) for stage in recipe.split("+")]
    for base in reversed(before):
        codec = Residual(base, codec)
    return codec


def format(codec: Codec | None) -> str:
    """The recipe of a codec: the inverse of ``parse``, in its words where it has them, else as a JSON object."""
    if codec is None:
        return "dense"
    words = _words(codec)
    return json.dumps(codec.to_json(), separators=(",", ":")) if words is None else words


def parse_overrides(entries: Iterable[str]) -> tuple[tuple[str, Codec | None], ...]:
    """Per-tensor recipes from ``PATTERN=RECIPE`` entries, in their order.

    A pattern is a shell pattern (fnmatch) on tensor names.

    Raises:
        RecipeError: an entry has no ``=``, an empty pattern, or a recipe that cannot be understood.
    """
    overrides = []
    for entry in entries:
        pattern, equals, recipe = entry.partition("=")
        pattern = pattern.strip()
        if not equals or not pattern or not recipe.strip():
            raise RecipeError(
                f"{entry!r} does not set a recipe for a pattern",
                hint="write PATTERN=RECIPE, e.g. 'embed*=int8:row' or '*.k_proj.*=dense'",
            )
        try:
            overrides.append((pattern, parse(recipe)))
        except RecipeError as error:
            raise RecipeError(f"in {entry!r}: {error}", hint=error.hint) from error
    return tuple(overrides)


def _parse_json(text: str) -> Codec:
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecipeError(
            f"the recipe is not valid JSON: {error}", hint='e.g. {"id": "uniform/1", "bits": 4, "group": 32}'
        ) from error
    return registry.from_json(config)


def _parse_stage(stage: str, recipe: str) -> Codec:
    """One summand of a recipe; ``recipe`` is the whole, for messages."""
    if stage in PRESETS:
        codec = parse(PRESETS[stage].recipe)
        assert codec is not None  # no preset is dense
        return codec
    if stage in _DENSE_WORDS:
        return Dense(_DENSE_WORDS[stage])
    if stage == "dense":
        raise RecipeError(
            f"'dense' leaves a tensor as it was and cannot be added to something, in {recipe!r}",
            hint="to store what remains in full use fp32, bf16 or fp16",
        )
    head, *options = [word.strip() for word in stage.split(":")]
    if head == "trellis":
        return _trellis(options, recipe)
    match = _GRID_STAGE.fullmatch(head)
    if match is None and head in PRESETS:
        return _regrouped(head, options, recipe)
    if match is None:
        raise _unknown_stage(head, stage, recipe)
    wrappers, gptq, kind, bits = match[1].split("-")[:-1], match[2], match[3], int(match[4])
    if len(set(wrappers)) < len(wrappers):
        raise RecipeError(f"{recipe!r} has a prefix more than once", hint="keep one of them, e.g. awq-gptq-int4")
    prefixes = {f"{wrapper}-" for wrapper in wrappers} | ({gptq} if gptq else set())
    values, options = _values(options, prefixes, recipe)
    owned = [word for word, owner in _OWNERS.items() if owner in prefixes]
    known = (*(_INT_OPTIONS if kind == "int" else _NF_OPTIONS), *owned)
    default = 128 if prefixes else 64 if kind == "nf" else 32 if bits != 8 else None
    group, words = _options(options, known, default, recipe)
    rounding: Rounding = Nearest()
    if gptq:
        order = "activation" if "actorder" in values else "natural"
        rounding = Gptq(_number(values, "damp=", 0.01, recipe), order, _count(values, "sweeps=", recipe))
    codec = _grid(kind, bits, group, words, rounding, recipe)
    for wrapper in reversed(wrappers):
        if wrapper == "spin":
            codec = Rotated(codec, _count(values, "seed=", recipe))
        else:
            codec = ChannelScaled(codec, _number(values, "exp=", 0.0, recipe) if "exp=" in values else None)
    return codec


def _regrouped(name: str, options: list[str], recipe: str) -> Codec:
    """The preset of this name with another group in all its stages."""
    if len(options) != 1 or not _GROUP.fullmatch(options[0]):
        raise RecipeError(
            f"only a group can follow the preset {name!r}, not {':'.join(options)!r}, in recipe {recipe!r}",
            hint=f"e.g. {name}:g64; or write the preset out, {PRESETS[name].recipe}, and change that",
        )
    codec = parse(re.sub(rf"(?<=:)({_GROUP.pattern})(?=$|[:+])", options[0], PRESETS[name].recipe))
    assert codec is not None  # no preset is dense
    return codec


def _trellis(options: list[str], recipe: str) -> Codec:
    """The codec of ``trellis:STEP`` and its options."""
    known = {"states=": 256.0, "rate=": 0.3, "damp=": 0.01}
    values: dict[str, float] = {}
    words = [word.partition("=") for word in options[1:]]
    names = [name + equals for name, equals, _ in words]
    try:
        step = float(options[0])
        values = {name + equals: float(value) if equals else 1.0 for name, equals, value in words}
    except (IndexError, ValueError):
        step = math.nan
    if math.isnan(step) or len(set(names)) < len(names) or not set(names) <= {*known, "datafree"}:
        raise RecipeError(
            f"{recipe!r} is not trellis:STEP with options, each once",
            hint=f"e.g. trellis:0.001; options are datafree, {', '.join(known)}",
        )
    found = {**known, **values}
    states = int(found["states="]) if found["states="].is_integer() else -1
    return Trellis(step, states, "datafree" not in found, found["rate="], found["damp="])


def _grid(kind: str, bits: int, group: int | None, words: set[str], rounding: Rounding, recipe: str) -> Codec:
    """The codec at the heart of a stage."""
    if kind == "nf":
        return NormalFloat(bits, group, "learned" if "learned" in words else "normal", rounding)
    if {"sym", "asym"} <= words:
        raise RecipeError(f"{recipe!r} asks for both sym and asym", hint="keep one of them")
    symmetric = "sym" in words or (group is None and "asym" not in words)
    return Uniform(bits, group, symmetric, "search" in words, rounding)


def _values(options: list[str], prefixes: set[str], recipe: str) -> tuple[dict[str, str], list[str]]:
    """What the options of these prefixes are set to, and the other options."""
    values: dict[str, str] = {}
    rest = []
    for word in options:
        name, equals, value = word.partition("=")
        if _OWNERS.get(name + equals) not in prefixes:
            rest.append(word)
        elif name + equals in values:
            raise RecipeError(f"{recipe!r} gives {name} more than once", hint="keep one of them")
        else:
            values[name + equals] = value
    return values, rest


def _number(values: dict[str, str], option: str, default: float, recipe: str) -> float:
    try:
        return float(values.get(option, default))
    except ValueError:
        raise RecipeError(f"{option[:-1]} is a number, in recipe {recipe!r}", hint=f"e.g. {option}0.02") from None


def _count(values: dict[str, str], option: str, recipe: str) -> int:
    try:
        return int(values.get(option, 0))
    except ValueError:
        raise RecipeError(f"{option[:-1]} is a count, in recipe {recipe!r}", hint=f"e.g. {option}2") from None


def _options(
    options: list[str], known: tuple[str, ...], default: int | None, recipe: str
) -> tuple[int | None, set[str]]:
    """The group and the other option words of a stage."""
    sizes = [word for word in options if _GROUP.fullmatch(word)]
    if len(sizes) > 1 or len(set(options)) < len(options):
        raise RecipeError(f"{recipe!r} gives an option more than once", hint="keep one of them, e.g. int4:g32:search")
    words = set(options) - set(sizes)
    for word in words:
        owner = _OWNERS.get("".join(word.partition("=")[:2]))
        if word not in known or owner:
            near = difflib.get_close_matches(word, (*known, "g32", "g64", "g128"), n=1, cutoff=0.5)
            only = f"; it needs {'an' if owner == 'awq-' else 'a'} {owner} stage" if owner else ""
            raise RecipeError(
                f"{word!r} is not an option here{only}, in recipe {recipe!r}",
                hint=(f"did you mean {near[0]!r}? " if near else "") + f"options are gSIZE, {', '.join(known)}",
            )
    if not sizes:
        return default, words
    return (None if sizes[0] == "row" else int(sizes[0][1:])), words


def _unknown_stage(head: str, stage: str, recipe: str) -> RecipeError:
    grids = [*(f"int{b}" for b in range(2, 9)), *(f"nf{b}" for b in range(2, 5))]
    stems = [*grids, *(prefix + grid for prefix in _PREFIXES for grid in grids), *_DENSE_WORDS, "dense"]
    known = list(dict.fromkeys([*PRESETS, *stems, "trellis:0.001"]))
    misplaced = re.fullmatch(r"gptq-((?:awq-|spin-)+)(\w+)", head)
    near = [f"{misplaced[1]}gptq-{misplaced[2]}"] if misplaced else []
    near = near or difflib.get_close_matches(stage, known, n=2, cutoff=0.6)
    near = near or difflib.get_close_matches(head, known, n=2, cutoff=0.6)
    inside = "" if stage == recipe else f" in recipe {recipe!r}"
    return RecipeError(
        f"{stage!r}{inside} is not a recipe",
        hint=(f"did you mean {' or '.join(near)}? " if near else "") + _EXAMPLES,
    )


def _words(codec: Codec) -> str | None:
    """The codec in the grammar's words, or None where it has none."""
    if isinstance(codec, Uniform | NormalFloat):
        rounding = codec.rounding
        prefix, options = ("gptq-", _gptq_words(rounding)) if isinstance(rounding, Gptq) else ("", [])
        size = "row" if codec.group is None else f"g{codec.group}"
        if isinstance(codec, NormalFloat):
            words = [f"nf{codec.bits}", size, *(["learned"] if codec.levels == "learned" else [])]
        else:
            words = [f"int{codec.bits}", size]
            if codec.symmetric != (codec.group is None):
                words.append("sym" if codec.symmetric else "asym")
            words += ["search"] if codec.search else []
        return prefix + ":".join([*words, *options])
    if isinstance(codec, ChannelScaled | Rotated):
        return _prefixed(codec)
    if isinstance(codec, Trellis):
        return _trellis_words(codec)
    if isinstance(codec, Dense):
        return next(word for word, dtype in _DENSE_WORDS.items() if dtype == codec.dtype)
    if isinstance(codec, Residual) and not isinstance(codec.base, Residual):
        base, rest = _words(codec.base), _words(codec.rest)
        return None if base is None or rest is None else f"{base}+{rest}"
    return None


def _prefixed(codec: Codec) -> str | None:
    """Scaled channels and rotations around a grid in words."""
    prefix, options, seen = "", [], set()
    while isinstance(codec, ChannelScaled | Rotated):
        if type(codec) in seen:
            return None
        seen.add(type(codec))
        if isinstance(codec, Rotated):
            prefix += "spin-"
            options += [f"seed={codec.seed}"] if codec.seed else []
        else:
            prefix += "awq-"
            options += [] if codec.exponent is None else [f"exp={codec.exponent!r}"]
        codec = codec.inner
    words = _words(codec) if isinstance(codec, Uniform | NormalFloat) else None
    return None if words is None else ":".join([prefix + words, *options])


def _trellis_words(codec: Trellis) -> str:
    """Step and the options in which a codec differs from what is left out."""
    plain = Trellis(codec.step)
    words = [f"trellis:{codec.step!r}"]
    words += [] if codec.calibrated else ["datafree"]
    words += [f"states={codec.states}"] if codec.states != plain.states else []
    words += [f"rate={codec.rate_weight!r}"] if codec.rate_weight != plain.rate_weight else []
    words += [f"damp={codec.damping!r}"] if codec.damping != plain.damping else []
    return ":".join(words)


def _gptq_words(rounding: Gptq) -> list[str]:
    """The options in which a rounding differs from ``Gptq()``."""
    return [
        *(["actorder"] if rounding.order == "activation" else []),
        *([f"damp={rounding.damping!r}"] if rounding.damping != Gptq().damping else []),
        *([f"sweeps={rounding.sweeps}"] if rounding.sweeps else []),
    ]
