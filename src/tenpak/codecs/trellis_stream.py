"""The stream of ``trellis/1``: a weight as bytes, its levels entropy-coded. docs/format.md describes it."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenpak.codecs.streams import ByteReader, damaged, lane_count, varint
from tenpak.errors import InvalidPayloadError
from tenpak.kernels import core
from tenpak.kernels.parallel import each

__all__ = ["CLASSES", "SEGMENT", "UNIT", "Coded", "read", "representable", "write"]

SEGMENT = 1024  # rows after which the trellis starts anew
_STRIPE = 1 << 20  # about as many levels are coded in one part
CLASSES = 64
UNIT = 12  # the class of a standard deviation of one step
_SHAPE = (48, 22, 64, 8)
_SIDE_SHAPE = (64, 64, 64, 16)
_FINEST = 16  # binary places of the fine part of a scale
_MOST_POWER = 400  # 2^±100
_MOST_SCALE = 2.0**100  # FP32 holds a level of it
_MOST_LEVELS = 1 << 15  # per byte: a symbol takes 2^-11.5 bits at least
_VECTORS = ("row_power", "column_power", "row_class", "column_class", "row_delta", "column_delta")


def _zeros() -> Tensor:
    return torch.zeros(0, dtype=torch.int32)


@dataclass
class Coded:
    """A weight as integers.

    Attributes:
        step: of the codec.
        states: of the trellis.
        row_power: a of row scale step·2^(a/4)·(1 + b/2^places), int32 ``[out]``.
        column_power: c of column scale 2^(c/4)·(1 + d/2^places), int32 ``[in]``.
        levels: int32 ``[out, in]``; as it was read, int8 or int16 where these hold it.
        row_class: int32 ``[out]``; a level's class is the sum of its row's and its column's.
        column_class: int32 ``[in]``.
        row_delta: b, int32 ``[out]``, or empty: all zero.
        column_delta: d, int32 ``[in]``, or empty like the rows': all zero.
        places: binary places of b and d, 0 to 16.
        shape: of the tables.
    """

    step: float
    states: int
    row_power: Tensor
    column_power: Tensor
    levels: Tensor
    row_class: Tensor = field(default_factory=_zeros)
    column_class: Tensor = field(default_factory=_zeros)
    row_delta: Tensor = field(default_factory=_zeros)
    column_delta: Tensor = field(default_factory=_zeros)
    places: int = 7
    shape: tuple[int, int, int, int] = _SHAPE

    @property
    def row_scale(self) -> Tensor:
        """FP32 ``[out]``."""
        return _scale(self.step, self.row_power, self.row_delta, self.places)

    @property
    def column_scale(self) -> Tensor:
        """FP32 ``[in]``."""
        return _scale(1.0, self.column_power, self.column_delta, self.places)


def _scale(base: float, power: Tensor, delta: Tensor, places: int) -> Tensor:
    # Exact: powers of two, one of four constants, one rounding to FP32 at the end.
    roots = torch.tensor([1.0, 2**0.25, 2**0.5, 2**0.75], dtype=torch.float64)
    scale = torch.ldexp(base * roots[power.long() % 4], torch.div(power, 4, rounding_mode="floor"))
    return (scale * (1 + delta.double() / 2**places) if len(delta) else scale).float()


def representable(coded: Coded) -> bool:
    """Whether FP32 holds its scales, their products, and all levels times these."""
    row, column = coded.row_scale, coded.column_scale
    if not bool((row > 0).all() and (column > 0).all()):
        return False
    low, high = torch.aminmax(coded.levels)
    largest = float(row.double().max()) * float(column.double().max()) * max(-int(low), int(high), 2**20)
    return largest < torch.finfo(torch.float32).max


# Bytes ---------------------------------------------------------------------------------------------------------------


def write(coded: Coded) -> Tensor:
    """The stream, uint8 ``[bytes]``."""
    rows, columns = coded.levels.shape
    lanes = lane_count(rows, columns)
    shape = torch.tensor(coded.shape, dtype=torch.uint8)
    vectors = [getattr(coded, name) for name in _VECTORS if len(getattr(coded, name))]
    # Where a weight is large its levels are, whatever its step: what is left of a class beside its power is smaller.
    vectors[2], vectors[3] = vectors[2] + vectors[0], vectors[3] + vectors[1]
    side, table = _write_side(vectors)

    def encode(stripe: tuple[int, int]) -> Tensor:
        columns = slice(*stripe)
        levels, classes = coded.levels[:, columns].contiguous(), coded.column_class[columns].contiguous()
        return core.rans_encode(levels, coded.row_class, classes, shape, coded.states, lanes, SEGMENT)

    parts = each(encode, _stripes(rows, columns))
    places = bytes([coded.places]) if len(vectors) > 4 else b""
    head = struct.pack("<BB4B", lanes, len(vectors), *coded.shape) + places + table
    head += b"".join(map(varint, [len(side) // 2, *(len(part) // 2 for part in parts)]))
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), side, *parts])


def read(stream: Tensor, shape: tuple[int, int], step: float, states: int) -> Coded:
    """What ``write`` wrote.

    Raises:
        InvalidPayloadError: the stream is damaged.
    """
    rows, columns = shape
    if not 0 < rows * columns <= len(stream) * _MOST_LEVELS or rows < 0:
        raise _damaged(f"it cannot hold a weight [{rows}, {columns}]")
    data = ByteReader("trellis/1", stream)
    lanes, count, zero0, zero1, one1, tail = data.take(6).tolist()
    if not 1 <= lanes <= 32 or count not in (4, 6):
        raise _damaged("its header")
    places = int(data.take(1)) if count == 6 else 0
    if places > _FINEST:
        raise _damaged("its header")
    sizes = [rows, columns] * (count // 2)
    ranges = [struct.unpack("<hB", bytes(data.take(3).tolist())) for _ in sizes]
    side_words, *words = [data.varint() for _ in range(1 + len(_stripes(rows, columns)))]
    vectors = _read_side(data.take(2 * side_words), sizes, ranges)
    vectors[2], vectors[3] = vectors[2] - vectors[0], vectors[3] - vectors[1]
    parts = [data.take(2 * size) for size in words]
    if data.at != len(stream):
        raise _damaged("its length")
    shape_bytes = (zero0, zero1, one1, tail)
    levels = _read_levels(parts, vectors[2], vectors[3], shape_bytes, states, lanes)
    named = dict(zip(_VECTORS, vectors, strict=False))
    coded = Coded(step, states, levels=levels, shape=shape_bytes, places=places, **named)
    if any(int(v.min()) <= -(2**places) for v in vectors[4:]) or not representable(coded):
        raise _damaged("its scales")
    return coded


def _read_levels(
    parts: list[Tensor], row_class: Tensor, column_class: Tensor, shape: Sequence[int], states: int, lanes: int
) -> Tensor:
    """Levels, int8 or as wide as they need, of the parts that hold the stripes."""
    rows, columns = len(row_class), len(column_class)
    tables = torch.tensor(shape, dtype=torch.uint8)
    stripes = _stripes(rows, columns)
    # Fresh memory takes longer to get than levels to decode: 32 bits a level are for one stripe after another.
    scratch = threading.local()
    levels = torch.empty(rows, columns, dtype=torch.int8)

    def decode(part: tuple[tuple[int, int], Tensor]) -> Tensor | None:
        (start, stop), words = part
        if not hasattr(scratch, "levels"):
            scratch.levels = torch.empty(rows * stripes[0][1], dtype=torch.int32)
        out: Tensor = scratch.levels[: rows * (stop - start)].view(rows, stop - start)
        classes = column_class[start:stop].contiguous()
        if core.rans_decode(words, row_class, classes, tables, states, lanes, SEGMENT, out) is None:
            raise _damaged("its levels")
        dtype = _narrowest(out)
        if dtype != torch.int8:
            return out.to(dtype, copy=True)
        levels[:, start:stop] = out
        return None

    wide = each(decode, list(zip(stripes, parts, strict=True)))
    for dtype in (torch.int16, torch.int32):
        if any(part is not None and part.dtype == dtype for part in wide):
            levels = levels.to(dtype)
    for (start, stop), part in zip(stripes, wide, strict=True):
        if part is not None:
            levels[:, start:stop] = part
    return levels


def _narrowest(levels: Tensor) -> torch.dtype:
    """int8 or int16 where these hold all levels and their negatives, otherwise int32."""
    low, high = torch.aminmax(levels)
    most = max(-int(low), int(high))
    return torch.int8 if most < 128 else torch.int16 if most < 32768 else torch.int32


def _stripes(rows: int, columns: int) -> list[tuple[int, int]]:
    """Columns that are coded in one part."""
    width = max(-(-_STRIPE // rows) // 32, 1) * 32
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def _write_side(vectors: list[Tensor]) -> tuple[Tensor, bytes]:
    """The vectors entropy-coded with a normal table each, and mean and class of each."""
    ranges = []
    for vector in vectors:
        values = vector.double()
        mean = round(float(values.mean()))
        deviation = max(float((values - mean).square().mean().sqrt()), 0.05)
        ranges.append((mean, min(max(round(4 * math.log2(2 * deviation)) + UNIT, 0), CLASSES - 1)))
    values = torch.cat([vector - mean for vector, (mean, _) in zip(vectors, ranges, strict=True)])
    classes = torch.cat([torch.full_like(v, cls) for v, (_, cls) in zip(vectors, ranges, strict=True)])
    shape = torch.tensor(_SIDE_SHAPE, dtype=torch.uint8)
    side = core.rans_encode(values[:, None].contiguous(), classes, torch.zeros(1, dtype=torch.int32), shape, 1, 1, 1)
    return side, b"".join(struct.pack("<hB", mean, cls) for mean, cls in ranges)


def _read_side(data: Tensor, sizes: list[int], ranges: list[tuple[int, int]]) -> list[Tensor]:
    classes = torch.cat([torch.full((n,), cls, dtype=torch.int32) for n, (_, cls) in zip(sizes, ranges, strict=True)])
    shape = torch.tensor(_SIDE_SHAPE, dtype=torch.uint8)
    values = core.rans_decode(data, classes, torch.zeros(1, dtype=torch.int32), shape, 1, 1, 1)
    if values is None:
        raise _damaged("its side information")
    parts = torch.split(values.flatten(), sizes)
    return [v + mean for v, (mean, _) in zip(parts, ranges, strict=True)]


def _damaged(what: str) -> InvalidPayloadError:
    return damaged("trellis/1", what)
