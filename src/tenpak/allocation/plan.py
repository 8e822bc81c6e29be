"""The plan: every tensor of the checkpoint, and the codec it gets or the reason why it stays dense.

A bare recipe covers the matrices of the blocks, experts included. Embeddings and the head take ``int8:row`` unless they
are set. ``--set PATTERN=RECIPE`` decides for the tensors that the pattern matches; the last match wins. A pattern is
compared with the tensor's name, with the name without ``.weight``, and with every dotted tail of both.

Vectors (norms, biases) stay dense, in their own dtype; where the flagship codec has a tensor, those in FP32 are stored
in BF16.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tenpak.artifact.schema import CODES_SUFFIX, shared_name
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.source import TORCH_DTYPES, dtype_name
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Codec
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import RecipeError

__all__ = [
    "EMBEDDING_CODEC",
    "Override",
    "Plan",
    "PlanEntry",
    "is_parameter",
    "is_vector",
    "make_plan",
    "matches",
    "narrow_dtype",
    "stored_rows",
]

EMBEDDING_CODEC = Uniform(bits=8, group=None, symmetric=True)


@dataclass(frozen=True)
class Override:
    """What ``--set PATTERN=RECIPE`` says; a codec of None leaves the tensor dense."""

    pattern: str
    codec: Codec | None


@dataclass(frozen=True)
class PlanEntry:
    """One tensor: its codec, or None and the reason; a dense tensor may be stored in a narrower dtype than its own."""

    weight: Weight
    codec: Codec | None
    reason: str = ""
    narrowed: str | None = None

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype in which a dense tensor is stored."""
        return self.narrowed or self.weight.dtype

    @property
    def estimated_bits(self) -> int | None:
        """Of all payloads; None where the tensor is dense, or where only coding can tell."""
        bits = None if self.codec is None else self.codec.estimate_bits(self.weight.matrix_shape)
        return None if bits is None else self.weight.matrices * bits


@dataclass(frozen=True)
class Plan:
    """An entry per tensor of the checkpoint, in the order in which they are stored."""

    entries: tuple[PlanEntry, ...]

    @property
    def parameters(self) -> int:
        """Elements of the model's parameters, tied ones once; buffers and unused tensors do not count."""
        return sum(e.weight.numel for e in self.entries if is_parameter(e.weight))


def stored_rows(
    plan: Plan, bits: Callable[[int, PlanEntry], int | None]
) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of every tensor that an artifact stores, as ``writer.predicted_bytes`` takes them.

    What weights of a codec share comes once, before the first of them.

    Args:
        plan: all tensors; tied ones are not stored.
        bits: payload bits of an entry, by its place in the plan; None where they are not known: those of the source.
    """
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    sharing: list[Codec] = []
    for number, entry in enumerate(plan.entries):
        weight, size = entry.weight, entry.weight.numel * DTYPE_BYTES[entry.weight.dtype]
        if weight.tied_to is not None:
            continue
        if entry.codec is None:
            rows.append((weight.name, entry.dtype, weight.shape, weight.numel * DTYPE_BYTES[entry.dtype]))
            continue
        if entry.codec.shared_fields and entry.codec not in sharing:
            group = len(sharing)
            sharing.append(entry.codec)
            rows += [
                (shared_name(group, f.name), dtype_name(f.dtype), f.shape, f.nbytes) for f in entry.codec.shared_fields
            ]
        found = bits(number, entry)
        stored = size if found is None else found // 8
        rows.append((weight.name + CODES_SUFFIX, "U8", (stored,), stored))
    return rows


def make_plan(weights: Sequence[Weight], codec: Codec | None, overrides: Sequence[Override] = ()) -> Plan:
    """Give every weight its codec.

    Raises:
        RecipeError: an override matches nothing that can be compressed, or only some experts of a layer.
    """
    for override in overrides:
        _require_match(override, weights)
    entries = tuple(_entry(weight, codec, overrides) for weight in weights)
    _require_whole_stacks(entries)
    if any(isinstance(entry.codec, Trellis) for entry in entries):
        # Vectors in FP32 are a per cent and more of a small model: too much beside a codec that counts every bit.
        entries = tuple(replace(entry, narrowed=narrow_dtype(entry.weight)) for entry in entries)
    return Plan(entries)


def _entry(weight: Weight, codec: Codec | None, overrides: Sequence[Override]) -> PlanEntry:
    if weight.kind == "dense":
        return PlanEntry(weight, None, weight.reason)
    for override in reversed(overrides):
        if matches(override.pattern, weight.name):
            reason = "" if override.codec else f"set dense by {override.pattern!r}"
            return PlanEntry(weight, override.codec, reason)
    if codec is None:
        return PlanEntry(weight, None, "the recipe is dense")
    if weight.kind in ("embedding", "head"):
        return PlanEntry(weight, EMBEDDING_CODEC)
    return PlanEntry(weight, codec)


def _require_whole_stacks(entries: Sequence[PlanEntry]) -> None:
    """Experts that become one parameter of the model are compressed together or not at all."""
    dense: dict[str, bool] = {}
    for entry in entries:
        weight = entry.weight
        if weight.kind == "expert" and dense.setdefault(weight.parameter, entry.codec is None) != (entry.codec is None):
            raise RecipeError(
                f"{weight.name!r} and other experts of {weight.parameter!r} cannot be partly dense",
                hint="widen the pattern to all experts of the layer",
            )


def is_parameter(weight: Weight) -> bool:
    """Whether the tensor is a parameter of the model: not a buffer, not unused, not the copy of a tied weight."""
    return bool(weight.parameter) and weight.tied_to is None and weight.reason != "a buffer"


def is_vector(weight: Weight) -> bool:
    """Whether the tensor is a whole floating-point parameter of one dimension: a norm or a bias."""
    floating = TORCH_DTYPES[weight.dtype].is_floating_point
    return len(weight.shape) == 1 and floating and is_parameter(weight) and not weight.restructured


def narrow_dtype(weight: Weight) -> Literal["BF16"] | None:
    """Safetensors name of the dtype in which a vector is stored beside the flagship codec; None for its own."""
    return "BF16" if weight.kind == "dense" and weight.dtype == "F32" and is_vector(weight) else None


def matches(pattern: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(tail, pattern) for tail in _tails(name))


def _tails(name: str) -> Iterator[str]:
    for full in {name, name.removesuffix(".weight")}:
        parts = full.split(".")
        for start in range(len(parts)):
            yield ".".join(parts[start:])


def _require_match(override: Override, weights: Sequence[Weight]) -> None:
    matched = [weight for weight in weights if matches(override.pattern, weight.name)]
    if any(weight.kind != "dense" for weight in matched):
        return
    if matched:
        raise RecipeError(
            f"{override.pattern!r} matches only tensors that cannot be compressed, such as {matched[0].name!r}: "
            f"{matched[0].reason}"
        )
    names = [weight.name for weight in weights if weight.kind != "dense"]
    tails = {tail for name in names for tail in _tails(name) if not any(part.isdigit() for part in tail.split("."))}
    near = difflib.get_close_matches(override.pattern.strip("*."), sorted(tails), n=3, cutoff=0.5)
    hint = f"near: {', '.join(near)}" if near else f"names look like {names[0]!r}" if names else None
    raise RecipeError(f"{override.pattern!r} matches no tensor", hint=hint)
