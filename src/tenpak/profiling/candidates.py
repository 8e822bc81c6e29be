"""Which recipes are tried on which tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tenpak.allocation.allocate import DENSE
from tenpak.allocation.plan import matches
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.trellis import Trellis
from tenpak.errors import RecipeError
from tenpak.job import Job, replanned
from tenpak.recipes import format, parse, parse_overrides

__all__ = ["DEFAULT_CANDIDATES", "Candidates", "fixed_by", "observed"]

# From about one bit to eight, fixed-rate, so that a plan's bytes are known before it is encoded.
DEFAULT_CANDIDATES = "default"
_DEFAULT = (
    "gptq-vq8x256", "gptq-vq4x256", "gptq-int2:g32", "gptq-int3:g64", "gptq-int3:g32", "gptq-int4:g64",
    "gptq-int4:g32", "gptq-int5:g32", "gptq-int6:g32", "gptq-int8:g64",
)  # fmt: skip
_LADDER = "trellis"
_LADDER_LOSSES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats per token of the whole model, roughly


@dataclass(frozen=True)
class Candidates:
    """Which recipes are tried on which tensors.

    Attributes:
        rules: (pattern, recipes), the last match wins; recipes as ``recipes.format`` writes them, each once.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Candidates:
        """From ``RECIPE,RECIPE,…`` for all tensors and ``PATTERN=RECIPE,…`` for some.

        ``default`` stands for fixed-rate recipes from about one bit to eight, ``trellis`` without a step for steps
        from fine to coarse.

        Raises:
            RecipeError: a recipe cannot be understood, or an entry holds none.
        """
        rules = []
        for entry in entries:
            pattern, equals, recipes = entry.partition("=")
            # An option of a recipe may hold "=", a pattern no comma and no colon.
            if not equals or {",", ":", "{"} & set(pattern):
                pattern, recipes = "*", entry
            words = [word.strip() for word in _split(recipes) if word.strip()]
            words = [w for word in words for w in (_DEFAULT if word == DEFAULT_CANDIDATES else (word,))]
            if not words or not pattern.strip():
                raise RecipeError(f"{entry!r} names no recipe", hint="write RECIPE,RECIPE or PATTERN=RECIPE,RECIPE")
            found = [word if word == _LADDER else format(parse(word)) for word in words]
            rules.append((pattern.strip(), tuple(dict.fromkeys(found))))
        return cls(tuple(rules))

    def of(self, weight: Weight, coded: int) -> list[str]:
        """The recipes to try on a tensor of a model with so many weights in matrices."""
        found: tuple[str, ...] = ()
        for pattern, recipes in self.rules:
            if matches(pattern, weight.name):
                found = recipes
        ladder = [format(Trellis(step=float(f"{math.sqrt(10 * loss / coded):.4g}"))) for loss in _LADDER_LOSSES]
        return list(dict.fromkeys(r for recipe in found for r in (ladder if recipe == _LADDER else [recipe])))

    def to_json(self) -> list[str]:
        """The entries again."""
        return [f"{pattern}={','.join(recipes)}" for pattern, recipes in self.rules]


def _split(recipes: str) -> list[str]:
    """At commas that are not within a JSON object."""
    parts, depth = [""], 0
    for character in recipes:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def fixed_by(job: Job) -> dict[str, str]:
    """Tensor → recipe, of those for which the job's overrides decide."""
    rules = parse_overrides(job.overrides)
    return {
        entry.weight.name: format(codec)
        for entry in job.plan.entries
        for pattern, codec in rules
        if entry.weight.kind != "dense" and matches(pattern, entry.weight.name)
    }


def observed(job: Job) -> Job:
    """The job with a codec that asks for all statistics of every matrix: what is collected for it suffices for all."""
    return replanned(job, DENSE, (f"*={format(Trellis(step=1.0))}",))
