"""The registered codecs: ``id -> "module:Class"``, imported when first used.

Adding a codec is one file and one line in ``_BUILTIN``. Other packages register theirs through the entry point group
``tenpak.codecs``, where an entry point's name is the id::

    [project.entry-points."tenpak.codecs"]
    "mycodec/1" = "mypackage.mycodec:MyCodec"

An id that is registered twice is an error, since it would decide by chance how an artifact is decoded.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from tenpak.codecs.base import Codec
from tenpak.errors import CodecError, RecipeError, UnknownCodecError

__all__ = ["ENTRY_POINT_GROUP", "from_json", "get", "ids"]

ENTRY_POINT_GROUP = "tenpak.codecs"

_BUILTIN = (
    ("additive/1", "tenpak.codecs.additive:Additive"),
    ("channelscaled/1", "tenpak.codecs.channelscaled:ChannelScaled"),
    ("dense/1", "tenpak.codecs.dense:Dense"),
    ("entropycoded/1", "tenpak.codecs.entropycoded:EntropyCoded"),
    ("lowrank/1", "tenpak.codecs.lowrank:LowRank"),
    ("normalfloat/1", "tenpak.codecs.normalfloat:NormalFloat"),
    ("pattern/1", "tenpak.codecs.pattern:Pattern"),
    ("residual/1", "tenpak.codecs.residual:Residual"),
    ("rotated/1", "tenpak.codecs.rotated:Rotated"),
    ("sparse/1", "tenpak.codecs.sparse:Sparse"),
    ("sparse24/1", "tenpak.codecs.sparse24:Sparse24"),
    ("trellis/1", "tenpak.codecs.trellis:Trellis"),
    ("uniform/1", "tenpak.codecs.uniform:Uniform"),
    ("vector/1", "tenpak.codecs.vector:Vector"),
)


def ids() -> tuple[str, ...]:
    """Ids of all registered codecs, sorted.

    Raises:
        CodecError: an id is registered twice.
    """
    return tuple(sorted(_targets()))


def get(codec_id: str) -> type[Codec]:
    """The codec class registered as ``codec_id``.

    Raises:
        UnknownCodecError: there is none; the hint names near ones.
        CodecError: an id is registered twice, or the registered object is not a codec of that id.
    """
    targets = _targets()
    if codec_id not in targets:
        near = difflib.get_close_matches(codec_id, targets, n=3, cutoff=0.5)
        raise UnknownCodecError(
            f"no codec {codec_id!r} is registered",
            hint=f"did you mean {' or '.join(near)}?" if near else f"registered are {', '.join(sorted(targets))}",
        )
    return _load(codec_id, targets[codec_id])


def from_json(config: Mapping[str, Any]) -> Codec:
    """The codec of a JSON configuration ``{"id": ..., **fields}``, nested codecs included.

    Raises:
        RecipeError: the configuration has no id, or a field is unknown, missing, of the wrong type or out of range.
        UnknownCodecError: no codec of this id is registered.
    """
    codec_id = config.get("id")
    if not isinstance(codec_id, str):
        raise RecipeError(
            f"a codec configuration names its codec as a string 'id', got {codec_id!r}",
            hint='e.g. {"id": "uniform/1", "bits": 4}',
        )
    try:
        return get(codec_id).from_json(config)
    except RecursionError:
        raise RecipeError("the codec configuration nests too deeply", hint="add at most 16 stages") from None


@cache
def _targets() -> dict[str, str]:
    """All registrations, ``id -> "module:Class"``."""
    installed = [(point.name, point.value) for point in entry_points(group=ENTRY_POINT_GROUP)]
    targets: dict[str, str] = {}
    for codec_id, target in (*_BUILTIN, *installed):
        if codec_id in targets:
            raise CodecError(
                f"codec {codec_id!r} is registered twice: as {targets[codec_id]} and as {target}",
                hint="uninstall one of the packages, or ask its author for another id",
            )
        targets[codec_id] = target
    return targets


@cache
def _load(codec_id: str, target: str) -> type[Codec]:
    module, _, name = target.partition(":")
    try:
        loaded = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CodecError(
            f"codec {codec_id!r} cannot be imported from {target}: {error}", hint="reinstall the package it comes from"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Codec) and getattr(loaded, "id", None) == codec_id):
        raise CodecError(
            f"{target} is registered as {codec_id!r} but is not a codec of that id",
            hint="the entry point's name must be the class's id",
        )
    return loaded
