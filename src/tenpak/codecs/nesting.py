"""What codecs that hold one other codec share: the check of it, and its tensors among their own.

A codec that stores tensors of its own beside those of the one it holds names the latter with a prefix, and puts wider
dtypes first: ``joined``, and back, ``split``.

A hostile configuration must not nest without end, so what a wrapper holds is limited: 16 codecs inside one another,
counting the wrapper and the stages of sums, which is more than has a use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics
from tenpak.errors import InvalidPayloadError, RecipeError

__all__ = [
    "depth",
    "inner_payload",
    "joined",
    "joined_fields",
    "require_alone",
    "require_inner",
    "require_kept_values",
    "rows_only",
    "split",
]

_DEEPEST = 16


def depth(codec: Codec) -> int:
    """How many codecs are inside one another, the outermost included."""
    values = (getattr(codec, field.name) for field in dataclasses.fields(codec))
    return 1 + max((depth(value) for value in values if isinstance(value, Codec)), default=0)


def require_inner(codec: Codec, value: Any, field: str = "inner") -> None:
    """Raise RecipeError unless ``value``, this field of ``codec``, is a codec and does not nest too deeply."""
    if not isinstance(value, Codec):
        raise RecipeError(
            f"codec {codec.id}: {field} must be a codec, got {value!r}", hint='write it as {"id": ..., ...}'
        )
    if depth(codec) > _DEEPEST:
        raise RecipeError(
            f"codec {codec.id}: at most {_DEEPEST} codecs may be inside one another, got {depth(codec)}",
            hint="use fewer of them",
        )
    require_alone(value, f"{field} of codec {codec.id}")


def require_alone(codec: Codec, place: str) -> None:
    """Raise RecipeError where ``codec`` shares tensors among weights, and ``place`` is where one weight is encoded."""
    if codec.shared_fields:
        names = ", ".join(field.name for field in codec.shared_fields)
        raise RecipeError(
            f"{place}: codec {codec.id} cannot share its {names} with other weights there",
            hint="leave out ':shared' (\"shared\" in JSON) there; it is for recipes of one stage",
        )


def require_kept_values(codec: Codec, values: Codec, hint: str) -> None:
    """Raise RecipeError, with ``hint``, where ``values``, the codec of what every row keeps of a weight, needs more."""
    require_inner(codec, values, "values")
    if values.needs_statistics:
        raise RecipeError(
            f"codec {codec.id}: its values belong to other columns in every row, so {values.id} cannot use the Hessian"
            " for them",
            hint=hint,
        )


def inner_payload(
    inner: Codec, payload: Payload, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None = None
) -> Payload:
    """The payload of ``inner`` within ``payload``: its own ``tensors``, which it checks itself.

    Args:
        inner: what they are of.
        payload: of the codec that holds ``inner``.
        tensors: of ``inner``.
        shape: of what it decodes to, where that is not the whole weight.
    """
    return Payload(inner.to_json(), payload.shape if shape is None else shape, payload.dtype, tensors)


def joined_fields(own: Sequence[Field], prefix: str, inner: Sequence[Field] | None) -> tuple[Field, ...] | None:
    """Fields of a codec's own and, with ``prefix``, those of the codec in it; None where these are not known."""
    if inner is None:
        return None
    named = (dataclasses.replace(field, name=prefix + field.name) for field in inner)
    return tuple(sorted((*own, *named), key=lambda field: -field.dtype.itemsize))


def joined(own: Mapping[str, Tensor], prefix: str, inner: Payload) -> dict[str, Tensor]:
    """Tensors in the order of ``joined_fields``."""
    tensors = {**own, **{prefix + name: tensor for name, tensor in inner.tensors.items()}}
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def rows_only(statistics: Statistics | None) -> Statistics | None:
    """What is known of the rows: for a matrix of kept values, whose columns are others in every row."""
    rows = None if statistics is None else statistics.row_weight
    return None if rows is None else Statistics(output_curvature=rows)


def split(payload: Payload, own: Sequence[Field], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a codec's own, checked, and those of the codec in it, which checks them itself.

    Raises:
        InvalidPayloadError: a tensor is missing or unexpected, or one of ``own`` is of another dtype or shape.
    """
    inner = {name.removeprefix(prefix): t for name, t in payload.tensors.items() if name.startswith(prefix)}
    found = {name: tensor for name, tensor in payload.tensors.items() if not name.startswith(prefix)}
    shown = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    expected = {field.name: (field.dtype, field.shape) for field in own}
    if min(payload.shape) <= 0 or shown != expected:
        raise InvalidPayloadError(
            f"payload of {payload.codec.get('id')} for shape {payload.shape} holds {shown}, expected {expected} and"
            f" names that begin with {prefix}",
            hint="the artifact is damaged or was written by another version",
        )
    return found, inner
