"""Roundings by name: from JSON, and the check of a codec's field."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from tenpak.codecs.rounding.base import Rounding
from tenpak.codecs.rounding.gptq import Gptq
from tenpak.codecs.rounding.nearest import Nearest
from tenpak.errors import RecipeError

__all__ = ["from_json", "require_rounding"]

_ROUNDINGS: dict[str, type[Rounding]] = {kind.name: kind for kind in (Nearest, Gptq)}


def from_json(config: object) -> Rounding:
    """The rounding of ``{"name": ..., **fields}`` or of a bare name; a rounding passes through.

    Raises:
        RecipeError: there is no such rounding, or a field is unknown, of the wrong type or out of range.
    """
    if isinstance(config, Rounding):
        return config
    entry = {"name": config} if isinstance(config, str) else config
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise RecipeError(
            f"a rounding is a name or an object with a 'name', got {config!r}", hint='e.g. {"name": "gptq"}'
        )
    name = entry["name"]
    if name not in _ROUNDINGS:
        near = difflib.get_close_matches(name, _ROUNDINGS, n=1)
        raise RecipeError(
            f"there is no rounding {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"roundings are {', '.join(_ROUNDINGS)}",
        )
    kind = _ROUNDINGS[name]
    known = sorted(field.name for field in dataclasses.fields(kind))
    unknown = sorted(set(entry) - set(known) - {"name"})
    if unknown:
        raise RecipeError(
            f"rounding {name} has no field {', '.join(map(repr, unknown))}",
            hint=f"its fields are {', '.join(known) or 'none'}",
        )
    return kind(**{key: value for key, value in entry.items() if key != "name"})


def require_rounding(codec: str, value: object) -> None:
    """Raise RecipeError unless ``value`` is a rounding."""
    if not isinstance(value, Rounding):
        raise RecipeError(
            f"codec {codec}: rounding must be one of {', '.join(_ROUNDINGS)}, got {value!r}",
            hint='write {"name": "gptq"}, or leave rounding out for nearest',
        )
