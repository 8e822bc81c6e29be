"""The codec trellis/1 as docs/format.md describes it: plain integers, one level after the other.

``decode(codec, stream, rows, columns)`` gives the matrix in FP32. Slow and plain on purpose, like numpy_reader.py.
"""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any, NamedTuple

import numpy as np

# By number of states: what a state is changed by where q is 1, and where k is odd.
TAPS = {1: (0, 0), 4: (2, 1), 8: (5, 2), 16: (9, 2), 32: (18, 4), 64: (33, 10), 128: (78, 43), 256: (166, 121)}
QUARTERS = np.array([1, 2**0.25, 2**0.5, 2**0.75])
RATIOS = (4283353945, 4271771996, 4248701965, 4202935003, 4112874773, 3938502376, 3611622603, 3037000500)
STRIPE = 2**20
SIDE_SHAPE = (64, 64, 64, 16)


class Table(NamedTuple):
    """What a symbol of one class and one q is decoded with; entry ``2·reach + 1`` is the escape."""

    shift: int
    reach: int
    starts: list[int]
    frequencies: list[int]
    entries: list[int]  # of each of the 4096 places


def decode(codec: dict[str, Any], stream: bytes, rows: int, columns: int) -> np.ndarray:
    """The matrix of a stream, FP32."""
    check(0 < rows * columns <= len(stream) << 15, "too short for the weight")
    file = io.BytesIO(stream)
    lanes, vectors, *shape = take(file, 6)
    check(1 <= lanes <= 32 and vectors in (4, 6), "lanes or vectors")
    places = take(file, 1)[0] if vectors == 6 else 0
    check(places <= 16, "places")
    means, classes = zip(*(struct.unpack("<hB", take(file, 3)) for _ in range(vectors)), strict=True)
    width = 32 * max(1, -(-STRIPE // rows) // 32)
    counts = [varint(file) for _ in range(1 + -(-columns // width))]
    side, *stripes = [np.frombuffer(take(file, 2 * count), "<u2").tolist() for count in counts]
    check(not file.read(1), "bytes after the last stripe")

    lengths = [rows, columns] * (vectors // 2)
    values = levels(side, 1, SIDE_SHAPE, 1, np.repeat(classes, lengths).tolist(), [0])[:, 0] + np.repeat(means, lengths)
    a, c, row_class, column_class, *fine = np.split(values, np.cumsum(lengths)[:-1])
    b, d = fine or (np.zeros(rows), np.zeros(columns))
    row_classes, column_classes = (row_class - a).tolist(), (column_class - c).tolist()
    parts = [
        levels(words, lanes, tuple(shape), codec["states"], row_classes, column_classes[i * width : (i + 1) * width])
        for i, words in enumerate(stripes)
    ]
    v = np.hstack(parts)
    rho, gamma = scale(codec["step"], a, b / 2**places), scale(1.0, c, d / 2**places)
    largest = float(rho.max()) * float(gamma.max()) * max(int(abs(v).max()), 2**20)
    check(min(rho.min(), gamma.min()) > 0 and largest < np.finfo(np.float32).max, "scales")
    return v.astype(np.float32) * np.outer(rho, gamma)


def scale(base: float, power: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """The scales of rows or columns, FP32."""
    with np.errstate(over="ignore"):
        return (np.ldexp(base * QUARTERS[power % 4], power // 4) * (1 + fine)).astype(np.float32)


def take(file: io.BytesIO, count: int) -> bytes:
    """The next bytes of a stream."""
    data = file.read(count)
    check(len(data) == count, "too short")
    return data


def varint(file: io.BytesIO) -> int:
    """Seven bits a byte, the lowest first, the highest bit of a byte telling that another one follows."""
    value = 0
    for place in range(5):
        (byte,) = take(file, 1)
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value
    raise ValueError("not a sound stream: a varint")


def levels(
    words: list[int],
    lanes: int,
    shape: tuple[int, ...],
    states: int,
    row_classes: list[int],
    column_classes: list[int],
) -> np.ndarray:
    """The levels ``[rows, columns]`` of a stripe."""
    found = np.zeros((len(row_classes), len(column_classes)), dtype=np.int64)
    coder = Coder(words, lanes)
    h0, h1 = TAPS[states]
    for first in range(0, len(column_classes), lanes):
        group = column_classes[first : first + lanes]
        for row, row_class in enumerate(row_classes):
            if row % 1024 == 0:
                state = [0] * lanes
            for lane, column_class in enumerate(group):
                q = state[lane] & 1
                k = coder.index(lane, table(min(max(row_class + column_class, 0), 63), q, shape))
                found[row, first + lane] = k if states == 1 else level(k, q)
                state[lane] = state[lane] >> 1 ^ h0 * q ^ h1 * (k & 1)
    coder.finish()
    return found


def level(k: int, q: int) -> int:
    """The level of an index in a trellis."""
    return 2 * k - q * ((k > 0) - (k < 0))


class Coder:
    """The numbers x of all lanes, and the words that they share."""

    def __init__(self, words: list[int], lanes: int) -> None:
        self.words = iter(words)
        self.x = [self.word() << 16 | self.word() for _ in range(lanes)]
        check(min(self.x) >= 2**16, "the start of a stripe")

    def index(self, lane: int, table: Table) -> int:
        """The next k of a lane."""
        entry = table.entries[self.x[lane] & 4095]
        self.advance(lane, 12, table.starts[entry], table.frequencies[entry])
        y = entry - table.reach
        if y > table.reach:
            n = self.uniform(lane, 5)
            check(n <= 20, "an escape")
            y = table.reach + 2**n + self.uniform(lane, n)
            y = -y if self.uniform(lane, 1) else y
        k = (y << table.shift) + self.uniform(lane, table.shift)
        check(abs(k) <= 2**20, "a level")
        return k

    def uniform(self, lane: int, bits: int) -> int:
        """An integer of so many bits, the highest first, in parts of 12 bits; only the first part may be shorter."""
        value = 0
        while bits:
            part = (bits - 1) % 12 + 1
            low = self.x[lane] & (2**part - 1)
            self.advance(lane, part, low, 1)
            value, bits = value << part | low, bits - part
        return value

    def advance(self, lane: int, precision: int, start: int, frequency: int) -> None:
        """Take an entry out of x."""
        x = self.x[lane]
        x = frequency * (x >> precision) + (x & (2**precision - 1)) - start
        self.x[lane] = x if x >= 2**16 else x << 16 | self.word()

    def word(self) -> int:
        """The next word."""
        word = next(self.words, -1)
        check(word >= 0, "too few words")
        return word

    def finish(self) -> None:
        """Every stripe must end where its encoder began."""
        check(all(x == 2**16 for x in self.x) and next(self.words, None) is None, "the end of a stripe")


@cache
def table(g: int, q: int, shape: tuple[int, ...]) -> Table:
    """The table of class g."""
    shift = max((g - 12) // 4 - 4, 0)
    weights = {y: weight(y, g, q, shift, shape) for y in range(-62, 63)}
    weights[0] = weights[0] if any(weights.values()) else 1
    total = sum(weights.values())
    reach = next(r for r in range(63) if r == 62 or max(weights[r + 1], weights[-r - 1]) * 8192 < total)
    inside = [weights[y] for y in range(-reach, reach + 1)]
    frequencies = [min(max(1, w * 4096 // total), 4095) for w in [*inside, total - sum(inside)]]
    largest = frequencies.index(max(frequencies[:-1]))
    frequencies[largest] += 4096 - sum(frequencies)
    starts = [sum(frequencies[:entry]) for entry in range(len(frequencies))]
    entries = [entry for entry, frequency in enumerate(frequencies) for _ in range(frequency)]
    return Table(shift, reach, starts, frequencies, entries)


def weight(y: int, g: int, q: int, shift: int, shape: tuple[int, ...]) -> int:
    """How likely a symbol is: a bell curve, a flatter one mixed in, and cells of unequal widths around zero."""
    z0, z1, o1, t = shape
    u = (2 * y << shift) + 2**shift - 1 if shift else level(y, q)
    e = u * u * (8557550 if g & 1 else 12102203) >> (10 + (g >> 1))
    cell = 64
    if shift == 0 and y == 0:
        cell = z1 if q else z0
    elif shift == 0 and abs(y) == 1 and q:
        cell = o1
    return cell * ((256 - t) * power(e) + (t * power(e >> 2) >> 1))


def power(e: int) -> int:
    """2^30 · 2^(-e/256), rounded as the format says."""
    if e >> 8 > 30:
        return 0
    value = 2**30
    for i, ratio in enumerate(RATIOS):
        if e >> i & 1:
            value = value * ratio + 2**31 >> 32
    return value >> (e >> 8)


def check(condition: bool, what: str) -> None:
    """Raise ValueError unless the stream is as the format says."""
    if not condition:
        raise ValueError(f"not a sound stream: {what}")
