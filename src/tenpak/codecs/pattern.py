"""``pattern/1``: square blocks of the weight as sums of a few patterns, ``block ≈ Σ_t scale_t·pattern_t``.

This is pattern matching by itself, as the codec that stands for it: patterns of a dictionary, part of which is made by
code and part found in the weight (see ``patterns``). Weights of trained models have next to no spatial structure for it
to find, so it loses to quantization at any size; as a first stage of a sum it costs about what it saves.

The weight is cut into blocks of size b, R = ceil(out/b) rows of C = ceil(in/b) blocks; at the borders only what lies
within the weight counts. There are K = base + L patterns: the first ``base`` ones are ``patterns.base_patterns``, the
L = min(learned, R·C) others are stored. Each block has T = min(terms, K) of them. Row by row of blocks, first terms
first (term t of block c is in column t·C + c)::

    patterns  FP16  [L, b, b]           where L > 0
    scales_…  the tensors of ``scales``, which encodes the scales [R, T·C]
    codes     uint8 [R, ceil(T·C·n/8)]  indices of patterns, n = bits of K - 1, at least 1; packed
    w = (s_0·p_0 + s_1·p_1) + …         in FP32, from left to right, products and sums each rounded

Bits per weight: T·(n + bits of a scale)/b², and 16·L·b² bits for the tensor. Wider dtypes come first.

Scales are fitted to least squares, all terms at once, weighted by output curvature and the Hessian's diagonal where
``calibrated``; then ``scales`` encodes them as a matrix like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_hessian, require_matrix
from tenpak.codecs.dense import Dense
from tenpak.codecs.grouping import TILE, column_importance, row_importance
from tenpak.codecs.nesting import inner_payload, joined, joined_fields, require_inner, split
from tenpak.codecs.patterns import base_patterns, discover, match, to_blocks
from tenpak.codecs.validation import require_bool, require_integer
from tenpak.errors import CodecError, InvalidPayloadError, RecipeError
from tenpak.kernels import pack, packed_size, unpack

__all__ = ["Pattern"]

_PREFIX = "scales_"
_MOST = 1 << 16


@dataclass(frozen=True)
class _Prepared:
    payload: Payload
    codes: Tensor
    table: Tensor
    scales: Any


@dataclass(frozen=True)
class Pattern(Codec):
    """Blocks as sums of patterns.

    Attributes:
        size: of the square blocks, 2 to 32.
        learned: patterns that are found in the weight and stored; fewer where it has fewer blocks.
        base: patterns made by code, 0 to 2·size², or None for all of these.
        terms: patterns per block, 1 to 8.
        scales: encodes the scales; it cannot use statistics.
        calibrated: weigh errors by the Hessian's diagonal and the output curvature.
        seed: of the search for patterns, 0 to 2^32 - 1.

    Raises:
        RecipeError: a field is of the wrong type or out of range, there is no pattern at all, or more than 65536.
    """

    id: ClassVar[str] = "pattern/1"

    size: int
    learned: int = 224
    base: int | None = None
    terms: int = 1
    scales: Codec = field(default_factory=lambda: Dense("float16"))
    calibrated: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer(self.id, "size", self.size, 2, 32)
        require_integer(self.id, "learned", self.learned, 0, _MOST)
        if self.base is not None:
            require_integer(self.id, "base", self.base, 0, 2 * self.size**2)
        require_integer(self.id, "terms", self.terms, 1, 8)
        require_inner(self, self.scales, "scales")
        require_bool(self.id, "calibrated", self.calibrated)
        require_integer(self.id, "seed", self.seed, 0, (1 << 32) - 1)
        if not 1 <= self.made + self.learned <= _MOST:
            raise RecipeError(
                f"codec {self.id}: base and learned must be 1 to {_MOST} patterns together, got"
                f" {self.made + self.learned}",
                hint="change learned",
            )
        if self.scales.needs_statistics:
            raise RecipeError(
                f"codec {self.id}: {self.scales.id} cannot use statistics of the inputs for scales of blocks",
                hint="give scales a rounding to nearest",
            )

    @property
    def made(self) -> int:
        """Patterns made by code."""
        return 2 * self.size**2 if self.base is None else self.base

    @property
    def needs_statistics(self) -> bool:
        """Whether errors are weighed."""
        return self.calibrated

    @property
    def uses_curvature(self) -> bool:
        """Whether errors are weighed."""
        return self.calibrated

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...] | None:
        """Patterns, codes and the fields of ``scales``; None where its rate is only known after coding."""
        layout = self._layout(shape)
        return joined_fields(layout.fields, _PREFIX, self.scales.fields((layout.down, layout.terms * layout.across)))

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Find patterns, match every block, encode the scales; takes some three FP32 copies of the weight.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, the statistics do not fit it, or ``scales``
                refuses the scales.
            MissingStatisticsError: it is ``calibrated`` and nothing is known.
        """
        require_matrix(weight)
        layout = self._layout((weight.shape[0], weight.shape[1]))
        found = discover(to_blocks(weight.detach(), self.size), layout.learned, self.seed)
        return self.encode_with(weight, found.half().view(-1, self.size, self.size), statistics)

    def encode_with(self, weight: Tensor, patterns: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight`` with patterns that are given in place of those found in it, so that weights share them.

        Args:
            weight: finite floating-point matrix ``[out, in]``.
            patterns: finite FP16 ``[n, size, size]``, at least as many as ``shared`` gives; others are not used.
            statistics: as for ``encode``.

        Raises:
            CodecError: as ``encode``; or there are fewer patterns, or of another size.
            MissingStatisticsError: as ``encode``.
        """
        require_matrix(weight)
        layout = self._layout((weight.shape[0], weight.shape[1]))
        blocks = to_blocks(weight.detach(), self.size)
        given = self.shared(patterns, (weight.shape[0], weight.shape[1])).to(weight.device)
        own = {"patterns": given} if layout.learned else {}
        table = self._table(own, weight.device)
        ids, scales = match(blocks, self._weights(weight, statistics), table.flatten(1), layout.terms)
        own["codes"] = _packed(_by_term(ids, layout), layout.bits)
        # A border where nothing counts, or a block of zeros, has any pattern, and a scale that says so.
        return self.payload(weight, joined(own, _PREFIX, self.scales.encode(_by_term(scales, layout))))

    def shared(self, patterns: Tensor, shape: tuple[int, int]) -> Tensor:
        """Those of common patterns ``[n, size, size]`` that the payload of a weight of this shape holds: the first.

        Raises:
            CodecError: there are too few, or they are of another size.
        """
        wanted = self._layout(shape).learned
        if tuple(patterns.shape[1:]) != (self.size, self.size) or len(patterns) < wanted:
            raise CodecError(
                f"{self.id} of size {self.size} needs {wanted} patterns for a weight {shape}, got"
                f" {tuple(patterns.shape)}",
                hint="use the dictionary that the weights were compressed with, or one of that size",
            )
        return patterns[:wanted]

    def references(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """What each block is made of: places of patterns int64, base ones first, and scales FP32, ``[blocks, terms]``.

        Raises:
            InvalidPayloadError: as ``decode``.
        """
        layout, own, scales = self._split(payload)
        ids = _unpacked(own["codes"], layout, layout.patterns)
        values = self.scales.decode(scales).view(ids.shape)
        return ids.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)

    def decode(self, payload: Payload) -> Tensor:
        """The weight, FP32 ``[out, in]``."""
        layout, own, scales = self._split(payload)
        table = self._table(own, own["codes"].device)
        every = self.scales.decode(scales)
        size, (rows, columns) = self.size, payload.shape
        weight = torch.empty((layout.down, size, layout.across * size), dtype=torch.float32, device=table.device)
        step = max(1, TILE // (layout.across * size * size))
        for start in range(0, layout.down, step):
            part = slice(start, start + step)
            ids = _unpacked(own["codes"][part], layout, len(table))
            blocks = _sum(table, ids, every[part].view(ids.shape))
            weight[part] = blocks.transpose(1, 2).flatten(2)
        return weight.flatten(0, 1)[:rows, :columns].clone(memory_format=torch.contiguous_format)

    def prepare(self, payload: Payload) -> _Prepared:
        """The payload, codes, the patterns FP32 ``[K, size, size]``, and the runtime form of the scales."""
        _, own, scales = self._split(payload)
        return _Prepared(payload, own["codes"], self._table(own, own["codes"].device), self.scales.prepare(scales))

    def matmul(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``, with the decoded weight."""
        return super().matmul(x, prepared.payload)

    def rows(self, indices: Tensor, prepared: _Prepared) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are put together."""
        rows, columns = prepared.payload.shape
        # Looking up the row itself refuses what is beyond the last one, though its block is there.
        flat = torch.arange(rows, device=indices.device)[indices.reshape(-1)]
        above, within = flat // self.size, flat % self.size
        layout = self._layout(prepared.payload.shape)
        ids = _unpacked(prepared.codes[above], layout, len(prepared.table))
        scales = self.scales.rows(above, prepared.scales).view(ids.shape)
        lines = _sum(prepared.table, ids, scales, within)
        return lines.flatten(1)[:, :columns].reshape(*indices.shape, columns)

    def _layout(self, shape: tuple[int, int]) -> _Layout:
        down, across = (-(-extent // self.size) for extent in shape)
        learned = max(0, min(self.learned, down * across))
        return _Layout(self.size, down, across, learned, self.made + learned, min(self.terms, self.made + learned))

    def _table(self, own: dict[str, Tensor], device: torch.device) -> Tensor:
        """All patterns, FP32 ``[K, size, size]``."""
        base = base_patterns(self.size, self.made).to(device)
        return torch.cat((base, own["patterns"].float())) if "patterns" in own else base

    def _weights(self, weight: Tensor, statistics: Statistics | None) -> Tensor | None:
        """How much the error of each weight counts, FP32 ``[blocks, size²]``; None where all count the same."""
        rows, columns = weight.shape
        by_row = torch.ones(rows, 1, device=weight.device)
        by_column = torch.ones(1, columns, device=weight.device)
        if self.calibrated:
            statistics = require_hessian(f"a calibrated {self.id} needs", statistics, "set calibrated to false")
            found = column_importance(statistics, columns, weight.device)
            by_column = by_column if found is None else found[None]
            found = row_importance(statistics, rows, weight.device)
            by_row = by_row if found is None else found[:, None]
        elif rows % self.size == 0 and columns % self.size == 0:
            return None
        return to_blocks(by_row * by_column, self.size)

    def _split(self, payload: Payload) -> tuple[_Layout, dict[str, Tensor], Payload]:
        """The layout, the codec's own tensors, checked, and the payload of ``scales``, which checks its own."""
        layout = self._layout(payload.shape)
        own, tensors = split(payload, layout.fields, _PREFIX)
        shape = layout.down, layout.terms * layout.across
        return layout, own, inner_payload(self.scales, payload, tensors, shape)


@dataclass(frozen=True)
class _Layout:
    """What follows from configuration and shape: blocks, patterns K of which so many are learned, terms per block."""

    size: int
    down: int
    across: int
    learned: int
    patterns: int
    terms: int

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return max(1, (self.patterns - 1).bit_length())

    @property
    def fields(self) -> tuple[Field, ...]:
        """The codec's own tensors."""
        stored = (Field("patterns", torch.float16, (self.learned, self.size, self.size)),) if self.learned else ()
        width = packed_size(self.terms * self.across, self.bits)
        return (*stored, Field("codes", torch.uint8, (self.down, width)))


def _by_term(values: Tensor, layout: _Layout) -> Tensor:
    """``[blocks, terms]`` as ``[down, terms·across]``."""
    return values.view(layout.down, layout.across, layout.terms).transpose(1, 2).flatten(1)


def _packed(ids: Tensor, bits: int) -> Tensor:
    """Indices int64 ``[rows, n]``, least significant bit first, uint8 ``[rows, ceil(n·bits/8)]``."""
    single = (ids[..., None] >> torch.arange(bits, device=ids.device)) & 1
    return pack(single.flatten(1).to(torch.uint8), 1)


def _unpacked(codes: Tensor, layout: _Layout, patterns: int) -> Tensor:
    """Indices of block rows, int64 ``[rows, terms, across]``.

    Raises:
        InvalidPayloadError: there is no such pattern.
    """
    count, bits = layout.terms * layout.across, layout.bits
    single = unpack(codes, 1, count * bits).view(-1, count, bits)
    ids = torch.zeros(single.shape[:2], dtype=torch.int64, device=codes.device)
    for bit in range(bits):
        ids |= single[..., bit].long() << bit
    if bool((ids >= patterns).any()):
        raise InvalidPayloadError(
            f"codes of {Pattern.id} name patterns beyond the {patterns} that there are",
            hint="the artifact is damaged or was written by another version",
        )
    return ids.view(-1, layout.terms, layout.across)


def _sum(table: Tensor, ids: Tensor, scales: Tensor, within: Tensor | None = None) -> Tensor:
    """Σ scale·pattern in order, ``[rows, across, size, size]``; with ``within``, only that line, ``[…, size]``."""
    total: Tensor | None = None
    for term in range(ids.shape[1]):
        chosen = table[ids[:, term]] if within is None else table[ids[:, term], within[:, None]]
        product = chosen * scales[:, term].view(*ids.shape[::2], *([1] * (chosen.ndim - 2)))
        total = product if total is None else total + product
    assert total is not None  # there is a term at least
    return total
