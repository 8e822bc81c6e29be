"""Codecs in the words of ``GRAMMAR``: the inverse of what ``stages`` and ``grammar`` read."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from tenpak.codecs.additive import Additive
from tenpak.codecs.base import Codec
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.entropycoded import EntropyCoded
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.sparse import Sparse
from tenpak.codecs.sparse24 import Sparse24
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.vector import Vector
from tenpak.recipes.stages import DENSE, IMPORTANCE, KINDS, PARTS

__all__ = ["words_of"]


def words_of(codec: Codec) -> str | None:
    """The codec in the grammar's words, or None where it has none."""
    prefix = ""
    if isinstance(codec, EntropyCoded):
        prefix, codec = "ec-", codec.inner
    iterations = codec.iterations if isinstance(codec, Residual) else 0
    stages: list[str | None] = []
    while isinstance(codec, Residual):
        if stages and codec.iterations:  # only the outermost sum has a word for them
            return None
        stages.append(_stage(codec.base))
        codec = codec.rest
    stages.append(_stage(codec))
    found = [stage for stage in stages if stage is not None]
    if len(found) < len(stages):
        return None
    return prefix + "+".join(found) + (f"~{iterations}" if iterations else "")


def _stage(codec: Codec) -> str | None:
    """One summand."""
    if isinstance(codec, Uniform | NormalFloat):
        return _grid(codec)
    if isinstance(codec, ChannelScaled | Rotated):
        return _prefixed(codec)
    if isinstance(codec, Sparse24):
        return _sparse24(codec)
    if isinstance(codec, Sparse):
        return _sparse(codec)
    if isinstance(codec, LowRank):
        return _lowrank(codec)
    if isinstance(codec, Pattern):
        return _pattern(codec)
    if isinstance(codec, Vector):
        return _vector(codec)
    if isinstance(codec, Additive):
        return _additive(codec)
    if isinstance(codec, Trellis):
        return _trellis(codec)
    if isinstance(codec, Dense):
        return _key(DENSE, codec.dtype)
    return None


def _grid(codec: Uniform | NormalFloat) -> str:
    rounding = codec.rounding
    size = "row" if codec.group is None else f"g{codec.group}"
    if isinstance(codec, NormalFloat):
        words = [f"nf{codec.bits}", size, *(["learned"] if codec.levels == "learned" else [])]
    else:
        words = [f"int{codec.bits}", size]
        if codec.symmetric != (codec.group is None):
            words.append("sym" if codec.symmetric else "asym")
        words += ["search"] if codec.search else []
    if not isinstance(rounding, Gptq):
        return ":".join(words)
    words += ["actorder"] if rounding.order == "activation" else []
    words += [*_set("damp", rounding.damping, 0.01), *_set("sweeps", rounding.sweeps, 0)]
    return "gptq-" + ":".join(words)


def _prefixed(codec: Codec) -> str | None:
    """Scaled channels and rotations around a grid in words."""
    prefix, options, seen = "", [], set()
    while isinstance(codec, ChannelScaled | Rotated):
        if type(codec) in seen:
            return None
        seen.add(type(codec))
        if isinstance(codec, Rotated):
            prefix += "spin-"
            options += _set("seed", codec.seed, 0)
        else:
            prefix += "awq-"
            options += _set("exp", codec.exponent, None)
        codec = codec.inner
    if not isinstance(codec, Uniform | NormalFloat):
        return None
    return ":".join([prefix + _grid(codec), *options])


def _sparse24(codec: Sparse24) -> str | None:
    options = [*_set("damp", codec.damping, 0.01), *_set("sweeps", codec.sweeps, 4)]
    if options and codec.importance != "sparsegpt":  # of no effect there, and without a word
        return None
    if not isinstance(codec.values, Uniform | NormalFloat | Dense):
        return None
    return ":".join([f"sparse24-{_key(IMPORTANCE, codec.importance)}{_stage(codec.values)}", *options])


def _sparse(codec: Sparse) -> str | None:
    if not isinstance(codec.values, Uniform | NormalFloat | Dense):
        return None
    share = f"{(Decimal(repr(codec.share)) * 100).normalize():f}"
    return f"sparse{share}%-{_key(IMPORTANCE, codec.importance)}{_stage(codec.values)}"


def _lowrank(codec: LowRank) -> str | None:
    factor = _key(PARTS, codec.factor)
    if factor is None:
        return None
    words = [f"{_key(KINDS, codec.kind)}lowrank{'' if codec.rank is None else codec.rank}"]
    words += [*_set("bpw", codec.bpw, None), *_set("energy", codec.energy, None), *_set("error", codec.error, None)]
    words += [*([] if factor == "int8" else [factor]), *_set("damp", codec.damping, 0.01)]
    return ":".join([*words, *(["norm"] if codec.norm_correction else [])])


def _pattern(codec: Pattern) -> str | None:
    scales = _key(PARTS, codec.scales)
    if scales is None:
        return None
    words = [f"pattern{codec.size}x{codec.learned}", *_set("terms", codec.terms, 1), *_set("base", codec.base, None)]
    words += [] if scales == "fp16" else [f"scales={scales}"]
    return ":".join([*words, *(["calibrated"] if codec.calibrated else []), *_set("seed", codec.seed, 0)])


def _vector(codec: Vector) -> str:
    words = [f"{'gptq-' if codec.weighting == 'calibrated' else ''}vq{codec.dimension}x{codec.entries}"]
    words += ["shared"] if codec.shared else ["row"] if codec.scaled else []
    words += ["magnitude"] if codec.weighting == "magnitude" else []
    words += [*_set("rounds", codec.rounds, 2), *_set("damp", codec.damping, 0.01), *_set("seed", codec.seed, 0)]
    return ":".join(words)


def _additive(codec: Additive) -> str:
    words = [f"aq{codec.books}x{codec.dimension}x{codec.entries}", *([] if codec.calibrated else ["datafree"])]
    words += [*_set("beam", codec.beam, 8), *_set("rounds", codec.rounds, 6)]
    return ":".join([*words, *_set("damp", codec.damping, 0.01), *_set("seed", codec.seed, 0)])


def _trellis(codec: Trellis) -> str:
    words = [f"trellis:{codec.step!r}", *([] if codec.calibrated else ["datafree"])]
    words += [*_set("states", codec.states, 256), *_set("rate", codec.rate_weight, 0.3)]
    return ":".join([*words, *_set("damp", codec.damping, 0.01)])


def _set(name: str, value: float | None, default: float | None) -> list[str]:
    """The option that says so, if it must be said."""
    return [] if value == default else [f"{name}={value!r}"]


def _key(table: Mapping[str, object], value: object) -> str | None:
    """The word for a value."""
    return next((word for word, meant in table.items() if meant == value), None)
