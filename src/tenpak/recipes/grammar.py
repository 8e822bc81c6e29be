"""Whole recipes: sums of stages, presets, JSON objects, and what is told of those that cannot be read."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable

from tenpak.codecs import registry
from tenpak.codecs.base import Codec
from tenpak.codecs.entropycoded import EntropyCoded
from tenpak.codecs.residual import Residual
from tenpak.errors import RecipeError
from tenpak.recipes.options import GROUP
from tenpak.recipes.presets import PRESETS
from tenpak.recipes.stages import HEADS, read_stage
from tenpak.recipes.words import words_of

__all__ = ["GRAMMAR", "format", "parse", "parse_overrides"]

GRAMMAR = """\
recipe  = "dense"                                 leave the tensor as it was
        | [ "ec-" ] stage { "+" stage } [ "~" COUNT ]
        | JSON object                             a codec's configuration
stage   = { "awq-" | "spin-" } [ "gptq-" ] grid { ":" option }
        | "sparse24-" [ "wanda-" | "gptq-" ] ( grid | float ) { ":" option }
        | "sparse" SHARE "%-" [ "wanda-" ] ( grid | float ) { ":" option }
        | [ "plain-" | "mag-" | "act-" ] "lowrank" [ RANK ] { ":" option }
        | "pattern" SIZE [ "x" LEARNED ] { ":" option }
        | [ "gptq-" ] "vq" DIMENSION "x" ENTRIES { ":" option }
        | "aq" BOOKS "x" DIMENSION "x" ENTRIES { ":" option }
        | "trellis:" STEP { ":" option }          its step, e.g. trellis:0.001; what budgets find
        | float                                   dense in that dtype
        | preset [ ":" group ]                    the group replaces those of the preset's grids
grid    = "int" BITS | "nf" BITS                  uniform, 2 to 8; normalfloat, 2 to 4
float   = "fp32" | "bf16" | "fp16"
part    = float | "int8" | "int4"                 int8:row and int4:g32, of factors and scales
group   = "g" SIZE | "row"                        a scale per SIZE weights, 8 to 256, or per row
option  = group                                   a grid's
        | "sym" | "asym" | "search"               int
        | "learned"                               nf
        | "actorder" | "damp=" NUMBER | "sweeps=" COUNT                     gptq- of a grid
        | "exp=" NUMBER                                                     awq-: instead of the search
        | "seed=" COUNT                                                     spin-
        | "damp=" NUMBER | "sweeps=" COUNT                                  sparse24-gptq-
        | "bpw=" NUMBER | "energy=" NUMBER | "error=" NUMBER                lowrank: one, or RANK
        | part | "damp=" NUMBER | "norm"                                    lowrank
        | "terms=" COUNT | "base=" COUNT | "scales=" part | "calibrated" | "seed=" COUNT        pattern
        | "row" | "shared" | "magnitude" | "rounds=" COUNT | "damp=" NUMBER | "seed=" COUNT     vq
        | "datafree" | "beam=" COUNT | "rounds=" COUNT | "damp=" NUMBER | "seed=" COUNT         aq
        | "datafree" | "states=" COUNT | "rate=" NUMBER | "damp=" NUMBER                        trellis
"""

_EXAMPLES = "a recipe looks like int4:g32, int8:row, nf4:g64 or int4:g16+int2:g16; `tenpak recipes` lists presets"
# The group of a grid, which comes first among its options in presets.
_REGROUPED = re.compile(rf"(?<![a-z])((?:[a-z0-9]+-)*(?:int|nf)\d:)(?:{GROUP.pattern})")


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
    stages, tilde, rounds = recipe.removeprefix("ec-").partition("~")
    *before, codec = [_parse_stage(stage.strip(), recipe) for stage in stages.split("+")]
    for base in reversed(before):
        codec = Residual(base, codec)
    if tilde:
        codec = _refined(codec, rounds, recipe)
    return EntropyCoded(codec) if recipe.startswith("ec-") else codec


def format(codec: Codec | None) -> str:
    """The recipe of a codec: the inverse of ``parse``, in its words where it has them, else as a JSON object."""
    if codec is None:
        return "dense"
    words = words_of(codec)
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


def _refined(codec: Codec, rounds: str, recipe: str) -> Codec:
    """The outermost sum with so many rounds of refinement."""
    if not re.fullmatch(r"\d{1,9}", rounds.strip()):
        raise RecipeError(
            f"'~' is followed by a count and nothing else, in recipe {recipe!r}", hint="e.g. int4:g16+int2:g16~3"
        )
    if not isinstance(codec, Residual):
        raise RecipeError(
            f"'~' refines the stages of a sum, and {recipe!r} has one stage", hint="e.g. int4:g16+int2:g16~3"
        )
    return dataclasses.replace(codec, iterations=int(rounds))


def _parse_stage(stage: str, recipe: str) -> Codec:
    """One summand of a recipe; ``recipe`` is the whole, for messages."""
    if stage in PRESETS:
        codec = parse(PRESETS[stage].recipe)
        assert codec is not None  # no preset is dense
        return codec
    if stage == "dense":
        raise RecipeError(
            f"'dense' leaves a tensor as it was and cannot be coded or added to something, in {recipe!r}",
            hint="to store what remains in full use fp32, bf16 or fp16",
        )
    head, *words = [word.strip() for word in stage.split(":")]
    found = read_stage(head, words, recipe)
    if found is None and head in PRESETS:
        return _regrouped(head, words, recipe)
    if found is None:
        raise _unknown_stage(head, stage, recipe)
    return found


def _regrouped(name: str, words: list[str], recipe: str) -> Codec:
    """The preset of this name with another group in all its grids."""
    plain = PRESETS[name].recipe
    if len(words) != 1 or not GROUP.fullmatch(words[0]):
        raise RecipeError(
            f"only a group can follow the preset {name!r}, not {':'.join(words)!r}, in recipe {recipe!r}",
            hint=f"e.g. {name}:g64; or write the preset out, {plain}, and change that",
        )
    regrouped, count = _REGROUPED.subn(rf"\g<1>{words[0]}", plain)
    if not count:
        raise RecipeError(
            f"the preset {name!r} has no groups to be replaced by {words[0]}, in recipe {recipe!r}",
            hint=f"write the preset out, {plain}, and change that",
        )
    codec = parse(regrouped)
    assert codec is not None  # no preset is dense
    return codec


def _unknown_stage(head: str, stage: str, recipe: str) -> RecipeError:
    if "ec-" in head:
        rest = recipe.replace("ec-", "")
        return RecipeError(
            f"'ec-' codes a whole recipe and stands once, at its beginning, not in {recipe!r}",
            hint=f"did you mean ec-{rest}?",
        )
    known = list(dict.fromkeys([*PRESETS, *HEADS]))
    misplaced = re.fullmatch(r"gptq-((?:awq-|spin-)+)(\w+)", head)
    near = [f"{misplaced[1]}gptq-{misplaced[2]}"] if misplaced else []
    near = near or difflib.get_close_matches(stage, known, n=2, cutoff=0.6)
    near = near or difflib.get_close_matches(head, known, n=2, cutoff=0.6)
    inside = "" if stage == recipe else f" in recipe {recipe!r}"
    return RecipeError(
        f"{stage!r}{inside} is not a recipe",
        hint=(f"did you mean {' or '.join(near)}? " if near else "") + _EXAMPLES,
    )
