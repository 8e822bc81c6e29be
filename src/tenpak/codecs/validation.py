"""Checks of codec configurations: each message names the codec, the field, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from tenpak.errors import RecipeError

__all__ = ["require_bool", "require_choice", "require_group", "require_integer", "require_number"]

GROUP_LOW, GROUP_HIGH = 8, 256


def require_integer(codec: str, field: str, value: object, low: int, high: int) -> None:
    """Raise RecipeError unless ``value`` is an integer (not a bool) in ``[low, high]``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(
            f"codec {codec}: {field} must be an integer from {low} to {high}, got {value!r}",
            hint=f"choose {field} from {low} to {high}",
        )


def require_number(owner: str, field: str, value: object, low: float, high: float) -> None:
    """Raise RecipeError unless ``value`` is a number (not a bool) in ``[low, high]``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(
            f"{owner}: {field} must be a number from {low:g} to {high:g}, got {value!r}",
            hint=f"choose {field} from {low:g} to {high:g}",
        )


def require_group(codec: str, value: object) -> None:
    """Raise RecipeError unless ``value`` is a group size (8 to 256) or None, one group per row."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not GROUP_LOW <= value <= GROUP_HIGH:
        raise RecipeError(
            f"codec {codec}: group must be an integer from {GROUP_LOW} to {GROUP_HIGH}, or null, got {value!r}",
            hint=f"choose group from {GROUP_LOW} to {GROUP_HIGH}, or null for one group per row (':row' in a recipe)",
        )


def require_bool(codec: str, field: str, value: object) -> None:
    """Raise RecipeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise RecipeError(
            f"codec {codec}: {field} must be true or false, got {value!r}", hint=f"write true or false for {field}"
        )


def require_choice(codec: str, field: str, value: object, choices: Sequence[object]) -> None:
    """Raise RecipeError unless ``value`` is one of ``choices``, and of its type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        names = ", ".join(map(str, choices))
        raise RecipeError(
            f"codec {codec}: {field} must be one of {names}, got {value!r}", hint=f"choose {field} from {names}"
        )
