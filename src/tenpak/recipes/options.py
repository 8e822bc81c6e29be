"""Options of a stage, the words after its colons: each known, given once, and set to what it should be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tenpak.errors import RecipeError

__all__ = ["GROUP", "Options", "read_options"]

GROUP = re.compile(r"row|g\d{1,9}")


@dataclass(frozen=True)
class Options:
    """The options of a stage by name: ``"datafree"``, ``"damp="`` or, for all sizes of groups, ``"group"``."""

    values: Mapping[str, str]
    recipe: str

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def number(self, name: str, default: float) -> float:
        """What an option is set to. Raises RecipeError unless it is a number."""
        found = self.number_or_none(name)
        return default if found is None else found

    def number_or_none(self, name: str) -> float | None:
        """What an option is set to, None where it is left out. Raises RecipeError unless it is a number."""
        if name not in self:
            return None
        try:
            return float(self.values[name])
        except ValueError:
            raise RecipeError(f"{name[:-1]} is a number, in recipe {self.recipe!r}", hint=f"e.g. {name}0.02") from None

    def count(self, name: str, default: int) -> int:
        """What an option is set to. Raises RecipeError unless it is an integer."""
        found = self.count_or_none(name)
        return default if found is None else found

    def count_or_none(self, name: str) -> int | None:
        """What an option is set to, None where it is left out. Raises RecipeError unless it is an integer."""
        if name not in self:
            return None
        try:
            return int(self.values[name])
        except ValueError:
            raise RecipeError(f"{name[:-1]} is a count, in recipe {self.recipe!r}", hint=f"e.g. {name}2") from None

    def only_of(self, names: Iterable[str]) -> str | None:
        """Which of these options is there, if any. Raises RecipeError where several are."""
        given = [name for name in names if name in self]
        if len(given) > 1:
            both = "both " if len(given) == 2 else ""
            raise RecipeError(f"{self.recipe!r} asks for {both}{' and '.join(given)}", hint="keep one of them")
        return given[0] if given else None


def read_options(
    words: Iterable[str],
    known: tuple[str, ...],
    recipe: str,
    *,
    groups: bool = False,
    owners: Mapping[str, str] | None = None,
) -> Options:
    """The options among ``known``, and group sizes where ``groups`` says so.

    ``owners`` names the prefix that an option which is not among ``known`` would need.

    Raises:
        RecipeError: a word is not known or given twice; the hint says what is near.
    """
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name += equals
        if groups and GROUP.fullmatch(word):
            name, value = "group", word
        elif name not in known:
            owner = (owners or {}).get(name)
            only = f"; it needs {'an' if owner == 'awq-' else 'a'} {owner} stage" if owner else ""
            sizes = ("g32", "g64", "g128") if groups else ()
            near = difflib.get_close_matches(word, (*known, *sizes), n=1, cutoff=0.5)
            listed = ", ".join([*(["gSIZE"] if groups else []), *known])
            raise RecipeError(
                f"{word!r} is not an option here{only}, in recipe {recipe!r}",
                hint=(f"did you mean {near[0]!r}? " if near else "")
                + (f"options are {listed}" if listed else "there are none"),
            )
        if name in values:
            raise RecipeError(f"{recipe!r} gives {name.rstrip('=')} more than once", hint="keep one of them")
        values[name] = value
    return Options(values, recipe)
