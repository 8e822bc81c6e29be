"""What a shell completes: presets for recipes, names of policies. A key press may not wait for torch to be imported."""

from __future__ import annotations

__all__ = ["POLICY_NAMES", "complete_override", "complete_policy", "complete_recipe"]

# Those of ``policies.POLICIES``, which could not be imported without torch; a test compares them.
_PARTS = ("k-proj", "q-v", "qkv", "out-proj", "attention", "mlp")
POLICY_NAMES = (*_PARTS, *(f"{part}-whitened" for part in _PARTS), "mixed", "buckets", "buckets-fisher")


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Presets that begin so, with what they are."""
    from tenpak.recipes.presets import PRESETS

    wanted = incomplete.lower()
    return [(name, preset.description) for name, preset in PRESETS.items() if name.startswith(wanted)]


def complete_policy(incomplete: str) -> list[str]:
    """Policies that begin so."""
    return [name for name in POLICY_NAMES if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[tuple[str, str]]:
    """``PATTERN=`` with the presets that go on so."""
    pattern, equals, recipe = incomplete.partition("=")
    return [(f"{pattern}={name}", text) for name, text in complete_recipe(recipe)] if equals else []
