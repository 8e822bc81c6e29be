"""How a model calls its blocks: hidden states first or by name, and whatever else it makes of its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["hidden_of", "replaced", "same_but_hidden"]


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first, or the one of that name."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def replaced(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def same_but_hidden(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    """Whether a block was called with the same arguments twice, hidden states aside."""

    def rest(call: tuple[Any, Any]) -> tuple[list[Any], Any]:
        args, kwargs = call
        return tree_flatten((args[1:], kwargs) if args else {k: v for k, v in kwargs.items() if k != "hidden_states"})

    (leaves, form), (others, other_form) = rest(first), rest(second)
    return form == other_form and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(leaves, others, strict=True)
    )
