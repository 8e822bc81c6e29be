"""What codecs that hold one other codec share: the check of it, and its tensors among their own.

A hostile configuration must not nest without end, so what a wrapper holds is limited: 16 codecs inside one another,
counting the wrapper and the stages of sums, which is more than has a use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tenpak.codecs.base import Codec, Payload
from tenpak.errors import RecipeError

__all__ = ["depth", "inner_payload", "require_inner"]

_DEEPEST = 16


def depth(codec: Codec) -> int:
    """How many codecs are inside one another, the outermost included."""
    values = (getattr(codec, field.name) for field in dataclasses.fields(codec))
    return 1 + max((depth(value) for value in values if isinstance(value, Codec)), default=0)


def require_inner(codec: Codec, value: Any) -> None:
    """Raise RecipeError unless ``value``, the field ``inner`` of ``codec``, is a codec and does not nest too deeply."""
    if not isinstance(value, Codec):
        raise RecipeError(
            f"codec {codec.id}: inner must be a codec, got {value!r}", hint='write it as {"id": ..., ...}'
        )
    if depth(codec) > _DEEPEST:
        raise RecipeError(
            f"codec {codec.id}: at most {_DEEPEST} codecs may be inside one another, got {depth(codec)}",
            hint="use fewer of them",
        )


def inner_payload(inner: Codec, payload: Payload, tensors: Mapping[str, Tensor]) -> Payload:
    """The payload of ``inner`` within ``payload``: its own ``tensors``, which it checks itself."""
    return Payload(inner.to_json(), payload.shape, payload.dtype, tensors)
