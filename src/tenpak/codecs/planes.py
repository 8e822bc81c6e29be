"""Byte planes, uint8 ``[rows, columns]``, as entropy-coded bytes or, where that saves nothing, as they are.

A row of a plane is cut into symbols of 1 to 8 bits, whatever width codes shortest: packed codes fall into the symbols
that they were packed from, without a word about what they mean. Rows belong to one of up to 16 classes, each with a
frequency table of its own: rows of one scale each differ in how much of their range they use, and bytes of scales
differ from row to row. The classes are those of k-means in bits instead of distances: a row belongs where its symbols
are shortest, a table is that of the rows which belong to it.

A table holds a weight for each symbol, with eight steps an octave, which costs less than 0.001 bits per symbol against
exact frequencies; half a byte is enough for most, as it says how much a weight differs from the one before. Symbols are
coded by interleaved rANS (Duda 2013, arXiv 1311.2540), see ``kernels.core.symbols_encode``. docs/format.md has the
layout.

Everything is computed in integers (or in FP64 that holds them exactly): a plane has the same bytes everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import pad

from tenpak.codecs.streams import ByteReader, lane_count, varint
from tenpak.kernels import core, pack, packed_size, unpack
from tenpak.kernels.parallel import each

__all__ = ["read", "write"]

_STRIPE = 1 << 20  # about as many symbols are coded in one part
_TOTAL = 4096  # what frequencies add up to
_SYMBOLS = 256
_MOST_CLASSES = 4  # as a power of two
_MOST_SYMBOLS = 1 << 15  # per byte of a stream: a symbol takes 2^-11.5 bits at least
_LEAST = 9  # bytes of any plane that is coded: mode, lanes, a table, a length, the state of a lane
_SAMPLE_BYTES = 1 << 16  # what width and classes are chosen on
_MOST_ROWS = 4096  # whose symbols are counted at a time
_ROUNDS = 6
_UNIT = 1 << 16  # of lengths, per bit: fine enough that the shortest possible symbol is not free
_ABSENT = 1 << 28  # what a symbol costs that a table lacks
# Half bytes of a table: 0 to 13 are steps -6 to 7 from the weight before, the first one from the middle.
_STEPS, _JUMP, _GAP, _MIDDLE = 14, 14, 15, 64
_WEIGHTS = torch.tensor([(8 + i % 8) << i // 8 for i in range(112)])
_LENGTHS = torch.tensor([_ABSENT, *(round(_UNIT * (12 - math.log2(f))) for f in range(1, _TOTAL))], dtype=torch.float64)


@dataclass(frozen=True)
class _Model:
    """How a plane is cut and its rows are told apart.

    Attributes:
        width: of symbols, in bits.
        lengths: what symbols cost by class, FP64 ``[classes, 2^width]``: a row belongs where it is shortest.
    """

    width: int
    lengths: Tensor


def write(plane: Tensor) -> Tensor:
    """The section of a plane, uint8 ``[bytes]``: at most a byte more than the plane."""
    raw = torch.cat([torch.zeros(1, dtype=torch.uint8), plane.flatten()])
    model = _model(plane)
    coded = None if model is None else _coded(plane, model)
    return raw if coded is None or len(coded) >= len(raw) else coded


def read(data: ByteReader, rows: int, columns: int) -> Tensor:
    """The plane, uint8 ``[rows, columns]``, whose section comes next.

    The caller has seen to it that the stream can hold a plane of this size.

    Raises:
        InvalidPayloadError: the section is not what ``write`` writes.
    """
    mode = int(data.take(1))
    if mode == 0:
        return data.take(rows * columns).view(rows, columns)
    width, power = mode & 15, mode >> 4
    lanes = int(data.take(1))
    if not 1 <= width <= 8 or power > _MOST_CLASSES or not 1 <= lanes <= 32:
        raise data.damaged("the header of a plane")
    count = _symbols_per_row(columns, width)
    parts = _stripes(rows, count)
    if rows * count > len(data.stream) * _MOST_SYMBOLS:
        raise data.damaged("it cannot hold as many symbols as a plane has")
    row_class = torch.zeros(rows, dtype=torch.int32)
    if power:
        row_class = unpack(data.take(packed_size(rows, power))[None].contiguous(), power, rows)[0].int()
    tables = torch.stack([_read_table(data, 1 << width) for _ in range(1 << power)])
    frequencies = _frequencies(tables)
    words = [data.take(2 * size) for size in [data.varint() for _ in parts]]
    plane = torch.empty(rows, columns, dtype=torch.uint8)

    def decode(item: tuple[slice, Tensor]) -> None:
        part, coded = item
        symbols = core.symbols_decode(coded, count, row_class[part].contiguous(), frequencies, lanes)
        if symbols is None:
            raise data.damaged("the symbols of a plane")
        packed = pack(symbols, width)
        if bool(packed[:, columns:].any()):
            raise data.damaged("what fills up the rows of a plane")
        plane[part] = packed[:, :columns]

    each(decode, list(zip(parts, words, strict=True)))
    return plane


# Writing -------------------------------------------------------------------------------------------------------------


def _coded(plane: Tensor, model: _Model) -> Tensor:
    """The section of a plane that is coded."""
    rows, columns = plane.shape
    width, classes = model.width, len(model.lengths)
    count = _symbols_per_row(columns, width)
    parts = _stripes(rows, count)
    row_class = torch.zeros(rows, dtype=torch.int32)
    counts = torch.zeros(classes, 1 << width, dtype=torch.int64)
    for part in (part for whole in parts for part in _sliced(whole, _MOST_ROWS)):
        found = _histogram(_cut(plane[part], width), width)
        row_class[part] = _costs(found, model.lengths).argmin(1).int()
        counts.index_add_(0, row_class[part], found)
    tables, common = _tables(counts), _tables(counts.sum(0, keepdim=True))
    lengths = (counts * _lengths(tables)).sum(), (counts * _lengths(common)).sum()
    if _size(float(lengths[1]), common, rows) <= _size(float(lengths[0]), tables, rows):
        # Classes that some rows asked for may not suit the others.
        classes, tables, row_class = 1, common, torch.zeros_like(row_class)
    frequencies, lanes = _frequencies(tables), lane_count(parts[0].stop, count)

    def encode(part: slice) -> Tensor:
        return core.symbols_encode(_cut(plane[part], width), row_class[part].contiguous(), frequencies, lanes)

    coded = each(encode, parts)
    power = classes.bit_length() - 1
    head = bytes([width | power << 4, lanes])
    if power:
        head += bytes(pack(row_class.to(torch.uint8)[None], power)[0].tolist())
    head += b"".join(map(_table_bytes, tables)) + b"".join(varint(len(part) // 2) for part in coded)
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *coded])


def _model(plane: Tensor) -> _Model | None:
    """How the plane is coded shortest, judged by some of its rows; None where it is better left as it is."""
    rows, columns = plane.shape
    if plane.numel() <= _LEAST:
        return None
    sampled = min(rows, _MOST_ROWS, max(_SAMPLE_BYTES // columns, 1))
    sample = plane[_spread(rows, sampled)]
    best, least, counts = None, float(8 * _UNIT * plane.numel()), None
    for width in range(1, 9):
        found = _histogram(_cut(sample, width), width)
        tables = _tables(found.sum(0, keepdim=True))
        cost = _cost(found, tables, rows)
        if cost < least:
            best, least, counts = _Model(width, _lengths(tables)), cost, found
    if best is None or counts is None:
        return None
    common = best.lengths
    for power in range(1, _MOST_CLASSES + 1):
        if sampled < 2 << power:  # every class is to have two rows at least
            break
        tables = _classified(counts, common, 1 << power)
        cost = _cost(counts, tables, rows)
        if cost >= least:
            break
        best, least = _Model(best.width, _lengths(tables)), cost
    return best


def _spread(rows: int, count: int) -> Tensor:
    """So many rows, one of every few; not always the first of these, as patterns may repeat, heads for one."""
    index = torch.arange(count)
    return index * rows // count + (index * 40503 >> 4) % (rows // count)


def _classified(counts: Tensor, common: Tensor, classes: int) -> Tensor:
    """Tables, ``[classes, symbols]``, of the classes that rows with these ``counts``, ``[rows, symbols]``, fall into.

    Rows that are shifted against each other are told apart from a start in the order of their mean symbol, rows that
    are wider than others from one in the order of what they cost by the ``common`` lengths; the better one is taken.
    """
    mean = (counts * torch.arange(counts.shape[1])).sum(1) * _TOTAL // counts.sum(1)
    found = []
    for start in (mean, _costs(counts, common)[:, 0]):
        row_class = torch.empty(len(counts), dtype=torch.int64)
        row_class[start.argsort(stable=True)] = torch.arange(len(counts)) * classes // len(counts)
        for _ in range(_ROUNDS):
            tables = _tables(torch.zeros(classes, counts.shape[1], dtype=torch.int64).index_add_(0, row_class, counts))
            row_class = _costs(counts, _lengths(tables)).argmin(1)
        found.append(tables)
    return min(found, key=lambda tables: _cost(counts, tables, len(counts)))


def _costs(counts: Tensor, lengths: Tensor) -> Tensor:
    """What rows cost by class, FP64 ``[rows, classes]`` in 2^-16 bits: integers, so exact in any order."""
    return counts.double() @ lengths.T


def _cost(counts: Tensor, tables: Tensor, rows: int) -> float:
    """What so many rows take, in 2^-16 bits, if ``counts`` are typical of them."""
    symbols = _costs(counts, _lengths(tables)).amin(1).sum()
    return _size(float(symbols) * rows / len(counts), tables, rows)


def _size(symbols: float, tables: Tensor, rows: int) -> float:
    """What symbols of that cost take with their tables and the classes of so many rows, in 2^-16 bits."""
    return symbols + _UNIT * (8 * sum(map(len, map(_table_bytes, tables))) + (len(tables).bit_length() - 1) * rows)


def _histogram(symbols: Tensor, width: int) -> Tensor:
    """How often each symbol occurs in each row, int64 ``[rows, 2^width]``."""
    rows, size = len(symbols), 1 << width
    places = symbols.int() + torch.arange(0, rows * size, size, dtype=torch.int32)[:, None]
    return torch.bincount(places.flatten(), minlength=rows * size).view(rows, size)


def _cut(plane: Tensor, width: int) -> Tensor:
    """The symbols of the rows of a plane, uint8 ``[rows, symbols]``; the last one of a row is filled up with zeros."""
    columns = plane.shape[1]
    count = _symbols_per_row(columns, width)
    return unpack(pad(plane, (0, packed_size(count, width) - columns)).contiguous(), width, count)


def _symbols_per_row(columns: int, width: int) -> int:
    return -(-8 * columns // width)


def _stripes(rows: int, symbols: int) -> list[slice]:
    """Rows that are coded in one part, of so many symbols each."""
    return _sliced(slice(0, rows), max(_STRIPE // symbols, 1))


def _sliced(part: slice, height: int) -> list[slice]:
    return [slice(start, min(start + height, part.stop)) for start in range(part.start, part.stop, height)]


# Tables: for each symbol the number of its weight, or -1 where it does not occur --------------------------------------


def _tables(counts: Tensor) -> Tensor:
    """Tables, int64 ``[classes, symbols]``, of symbols that occur so often."""
    counts = counts.clone()
    counts[counts.sum(1) == 0, 0] = 1  # a class that no row is in has a table nevertheless
    # Weights are in sixteenths of the frequency beyond the 1 that each symbol gets.
    wanted = (counts * (16 * _TOTAL) // counts.sum(1, keepdim=True) - 16).clamp(min=int(_WEIGHTS[0]))
    nearest = torch.bucketize(2 * wanted, _WEIGHTS[1:] + _WEIGHTS[:-1])
    return torch.where(counts > 0, nearest, -1)


def _frequencies(tables: Tensor) -> Tensor:
    """Frequencies, uint16 ``[classes, 256]``: one for each symbol that occurs, the others by weight."""
    occurs = tables >= 0
    weights = torch.where(occurs, _WEIGHTS[tables.clamp(min=0)], 0)
    found = torch.zeros(len(tables), _SYMBOLS, dtype=torch.int64)
    shared = _TOTAL - occurs.sum(1, keepdim=True)
    found[:, : tables.shape[1]] = occurs + weights * shared // weights.sum(1, keepdim=True)
    largest = found.argmax(1)
    rows = torch.arange(len(tables))
    found[rows, largest] += _TOTAL - found.sum(1)
    # A symbol that is alone leaves a little to another: one that took no bits at all would decode without end.
    alone = found[rows, largest] == _TOTAL
    found[rows, largest] -= alone.long()
    found[rows, largest ^ 1] += alone.long()
    return found.to(torch.uint16)


def _lengths(tables: Tensor) -> Tensor:
    """What each symbol costs, FP64 ``[classes, symbols]`` in 2^-16 bits."""
    return _LENGTHS[torch.where(tables >= 0, _frequencies(tables)[:, : tables.shape[1]].long(), 0)]


def _table_bytes(table: Tensor) -> bytes:
    """A table as it is stored, in half bytes: a step from the weight before, or a weight, or a gap."""
    halves: list[int] = []
    last, gap = _MIDDLE, 0
    for weight in table.tolist():
        if weight < 0:
            gap += 1
            continue
        step = weight - last + _STEPS // 2 - 1
        halves += _gap(gap) + ([step] if 0 <= step < _STEPS else [_JUMP, weight & 15, weight >> 4])
        last, gap = weight, 0
    halves += _gap(gap)
    return bytes(low | high << 4 for low, high in zip_longest(halves[::2], halves[1::2], fillvalue=0))


def _gap(length: int) -> list[int]:
    """Half bytes for so many symbols that do not occur."""
    if length < 16:
        return [_GAP, length - 1] if length else []
    return [_GAP, 15, (length - 16) & 15, (length - 16) >> 4]


def _read_table(data: ByteReader, symbols: int) -> Tensor:
    """The table that comes next, int64 ``[symbols]``."""
    halves = [half for byte in data.ahead(2 * symbols) for half in (byte & 15, byte >> 4)]  # 3 a symbol at most
    rest = iter(halves)
    table: list[int] = []
    last = _MIDDLE
    try:
        while len(table) < symbols:
            half = next(rest)
            if half == _GAP:
                length = next(rest) + 1
                table += [-1] * (length if length < 16 else 16 + next(rest) + 16 * next(rest))
                continue
            last = next(rest) + 16 * next(rest) if half == _JUMP else last + half - _STEPS // 2 + 1
            if not 0 <= last < len(_WEIGHTS):
                raise data.damaged("a table")
            table.append(last)
    except StopIteration:
        raise data.damaged("a table") from None
    left = len(list(rest))
    data.take((len(halves) - left) // 2 + left % 2)
    if len(table) > symbols or max(table) < 0 or (left % 2 and halves[-left]):
        raise data.damaged("a table")
    return torch.tensor(table)
