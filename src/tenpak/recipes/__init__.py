"""Recipes: the short strings, JSON objects and preset names that stand for codecs.

``GRAMMAR`` says how they are written; case and surrounding blanks do not matter. ``parse`` and ``format`` are inverse.
``grammar`` reads whole recipes, ``stages`` the stages of a sum, ``options`` the words after colons; ``words`` writes.
Presets alone come without torch, which ``grammar`` imports when it is needed: shells complete their names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tenpak.recipes.presets import PRESETS, Preset

if TYPE_CHECKING:
    from tenpak.recipes.grammar import GRAMMAR, format, parse, parse_overrides

__all__ = ["GRAMMAR", "PRESETS", "Preset", "format", "parse", "parse_overrides"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tenpak.recipes' has no attribute {name!r}")
    value = getattr(import_module("tenpak.recipes.grammar"), name)
    globals()[name] = value
    return value
