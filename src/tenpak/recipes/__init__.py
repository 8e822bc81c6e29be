"""Recipes: the short strings, JSON objects and preset names that stand for codecs.

``GRAMMAR`` says how they are written; case and surrounding blanks do not matter. ``parse`` and ``format`` are inverse.
``grammar`` reads whole recipes, ``stages`` the stages of a sum, ``options`` the words after colons; ``words`` writes.
"""

from tenpak.recipes.grammar import GRAMMAR, format, parse, parse_overrides
from tenpak.recipes.presets import PRESETS, Preset

__all__ = ["GRAMMAR", "PRESETS", "Preset", "format", "parse", "parse_overrides"]
