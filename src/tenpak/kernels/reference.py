"""The compiled core in plain numpy: what it must equal, bit by bit, and what takes its place where it is missing.

docs/format.md states the rules; names are those of ``kernels.core``, which documents the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "frequencies", "histogram", "product", "quantize", "rans_decode", "rans_encode", "symbols_decode", "symbols_encode",
]  # fmt: skip

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Symbols = NDArray[np.uint8]
Words = NDArray[np.uint16]

# States → h0 and h1: the parity-check polynomials without their last bit.
MACHINES = {4: (2, 1), 8: (5, 2), 16: (9, 2), 32: (18, 4), 64: (33, 10), 128: (78, 43), 256: (166, 121)}
_PRECISION, _LOWER, _CLASSES, _REACH, _ESCAPE_BITS, _LARGEST = 12, 1 << 16, 64, 62, 20, 1 << 20
_ROUNDER, _LIMIT = np.float32(12582912.0), np.float32(1048576.0)


def quantize(
    weight: Floats, target: Floats, error: Floats, levels: Integers, feedback: Floats, row_step: Floats,
    column_step: Floats, rates: Floats, row_class: Integers, column_class: Integers, states: int, segment: int,
) -> None:  # fmt: skip
    """Quantize a block of columns, one after another."""
    columns, rows = weight.shape
    for j in range(columns):
        step = row_step * column_step[j]
        u = np.clip(target[j] / step, -_LIMIT, _LIMIT)
        if states == 1:
            level = _nearest(u)
        else:
            level = np.empty_like(u)
            found, cost = _candidates(u)
            if len(rates):
                classes = np.clip(row_class + column_class[j], 0, len(rates) - 1)
                _weigh(u, found, cost, rates[classes])
            for start in range(0, rows, segment):
                part = slice(start, min(start + segment, rows))
                level[part] = _viterbi(found[:, part], cost[:, part], states)
        error[j] = weight[j] - level * step
        levels[j] = level
        target[j + 1 :] += error[j] * feedback[j + 1 :, j : j + 1]


def _nearest(x: Floats) -> Floats:
    return (x + _ROUNDER) - _ROUNDER


def _candidates(u: Floats) -> tuple[Floats, Floats]:
    """Of each quantizer and parity (2·Q + parity) the nearest level and its squared error, ``[4, rows]``."""
    size, quarter = np.abs(u), np.float32(0.25)
    two, four = np.float32(2), np.float32(4)
    outer = np.maximum(_nearest((size - 3) * quarter), 0) * four + 3
    inner = np.maximum(_nearest((size - 1) * quarter), 0) * four + 1
    levels: Floats = np.stack(
        [
            _nearest(u * quarter) * four,
            _nearest((u - two) * quarter) * four + two,
            np.copysign(np.where(size < np.float32(1.5), np.float32(0), outer), u),
            np.copysign(inner, u),
        ]
    ).astype(np.float32)
    cost: Floats = np.square(u - levels)
    return levels, cost


def _weigh(u: Floats, levels: Floats, cost: Floats, rates: Floats) -> None:
    """Add the rates; a level nearer to zero may then be the better one of its set."""
    last, rows = rates.shape[2] - 1, np.arange(len(u))

    def rate(level: Floats, q: int) -> Floats:
        index = (np.abs(level).astype(np.int64) + q) // 2
        found: Floats = rates[rows, q, np.minimum(index, last)]
        return found

    for member in range(4):
        q, v = member >> 1, levels[member]
        inner = np.abs(v) - np.float32(4)
        if member == 2:
            inner = np.where((inner < 0) & (np.abs(v) >= 3), np.float32(0), inner)
        exists = inner >= (0, 2, 0, 1)[member]
        w = np.copysign(np.maximum(inner, 0), v)
        here, other = cost[member] + rate(v, q), (u - w) ** 2 + rate(w, q)
        better = exists & (other < here)
        levels[member] = np.where(better, w, v)
        cost[member] = np.where(better, other, here)


def _viterbi(levels: Floats, cost: Floats, states: int) -> Floats:
    """The cheapest path through the trellis: its levels."""
    h0, h1 = MACHINES[states]
    rows = levels.shape[1]
    state = np.arange(states)
    q = (state >= states // 2).astype(np.int64)
    before = state ^ np.where(q == 1, h0, 0)
    even, odd = (before << 1) | q, ((before ^ h1) << 1) | q
    path = np.full(states, 1e30, np.float32)
    path[0] = 0
    taken = np.empty((rows, states), bool)
    for i in range(rows):
        a, b = path[even] + cost[2 * q, i], path[odd] + cost[2 * q + 1, i]
        taken[i] = b < a
        path = np.where(taken[i], b, a)
    best = int(np.argmin(path))
    chosen = np.empty(rows, np.float32)
    for i in reversed(range(rows)):
        parity = int(taken[i, best])
        chosen[i] = levels[2 * q[best] + parity, i]
        best = int((odd if parity else even)[best])
    return chosen


# Entropy coding -----------------------------------------------------------------------------------------------------


@cache
def _powers() -> list[int]:
    """2^(30 - f/256) for f = 0 … 255, by integer products of the roots 2^(-1/256) … 2^(-1/2) in units of 2^-32."""
    roots = (4283353945, 4271771996, 4248701965, 4202935003, 4112874773, 3938502376, 3611622603, 3037000500)
    table = []
    for f in range(256):
        value = 1 << 30
        for bit, root in enumerate(roots):
            if f >> bit & 1:
                value = (value * root + (1 << 31)) >> 32
        table.append(value)
    return table


def _density(level: int, cls: int, tail: int) -> int:
    """A normal density of class ``cls`` mixed with one of twice its width, in integers."""
    energy = (level * level * (12102203, 8557550)[cls & 1]) >> (10 + (cls >> 1))  # in 1/256 octaves

    def power(t: int) -> int:
        return 0 if t >> 8 > 30 else _powers()[t & 255] >> (t >> 8)

    return (256 - tail) * power(energy) + ((tail * power(energy >> 2)) >> 1)


def _shift(cls: int) -> int:
    """How many low bits of k are coded uniformly."""
    return max((cls - 12) // 4 - 4, 0)


def _weight(symbol: int, cls: int, q: int, shape: tuple[int, ...]) -> int:
    shift, level, cell = _shift(cls), 2 * symbol, 64
    if shift:
        level = level * (1 << shift) + (1 << shift) - 1
    else:
        level -= q * ((symbol > 0) - (symbol < 0))
        if symbol == 0:
            cell = shape[q]
        elif q and abs(symbol) == 1:
            cell = shape[2]
    return cell * _density(level, cls, shape[3])


@cache
def _frequencies(cls: int, q: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    weights = {symbol: _weight(symbol, cls, q, shape) for symbol in range(-_REACH, _REACH + 1)}
    total = sum(weights.values())
    if total == 0:
        total = weights[0] = 1
    reach = 0
    while reach < _REACH and any(weights[s] << (_PRECISION + 1) >= total for s in (reach + 1, -reach - 1)):
        reach += 1
    inside = [weights[symbol] for symbol in range(-reach, reach + 1)]
    found = [max((weight << _PRECISION) // total, 1) for weight in inside]
    escape = min(max(((total - sum(inside)) << _PRECISION) // total, 1), (1 << _PRECISION) - 1)
    found[found.index(max(found))] += (1 << _PRECISION) - sum(found) - escape
    return (*found, escape)


def frequencies(cls: int, quantizer: int, shape: Symbols) -> list[int]:
    """Frequencies of the symbols -reach … reach and of the escape."""
    return list(_frequencies(cls, quantizer, tuple(int(part) for part in shape)))


class _State:
    """The state machine of one lane."""

    def __init__(self, states: int) -> None:
        self.trellis, self.state = states != 1, 0
        self.h0, self.h1 = MACHINES[4 if states == 1 else states]

    @property
    def quantizer(self) -> int:
        return self.state & 1 if self.trellis else 0

    def index(self, level: int) -> int:
        if not self.trellis:
            return level
        sign = (level > 0) - (level < 0)
        return sign * ((abs(level) + self.quantizer) // 2)

    def level(self, k: int) -> int:
        if not self.trellis:
            return k
        return 2 * k - self.quantizer * ((k > 0) - (k < 0))

    def move(self, k: int) -> None:
        if self.trellis:
            self.state = (self.state >> 1) ^ (self.h0 if self.state & 1 else 0) ^ (self.h1 if k & 1 else 0)


def _walk(shape: tuple[int, ...], lanes: int, states: int, segment: int) -> Iterator[tuple[int, int, int, _State]]:
    """Row, column, lane and its machine of every level, in the order of decoding."""
    rows, columns = shape
    for first in range(0, columns, lanes):
        machines = [_State(states) for _ in range(min(lanes, columns - first))]
        for i in range(rows):
            for lane, machine in enumerate(machines):
                if i % segment == 0:
                    machine.state = 0
                yield i, first + lane, lane, machine


def _class_of(row: int, column: int) -> int:
    return max(0, min(row + column, _CLASSES - 1))


def rans_encode(
    levels: Integers, row_class: Integers, column_class: Integers, shape: Symbols, states: int, lanes: int, segment: int
) -> bytes:
    """Levels to bytes."""
    steps: list[tuple[int, int, int, int]] = []  # lane, start, frequency, precision, in the order of decoding
    for i, column, lane, machine in _walk(levels.shape, lanes, states, segment):
        k = machine.index(int(levels[i, column]))
        cls = _class_of(int(row_class[i]), int(column_class[column]))
        steps += _symbol(lane, k, cls, frequencies(cls, machine.quantizer, shape))
        machine.move(k)
    return _words(steps, lanes)


def _words(steps: list[tuple[int, int, int, int]], lanes: int) -> bytes:
    """What codes the steps, which are given in the order of decoding."""
    words: list[int] = []
    x = [_LOWER] * lanes
    for lane, start, frequency, precision in reversed(steps):
        if x[lane] >= frequency << (32 - precision):
            words.append(x[lane] & 0xFFFF)
            x[lane] >>= 16
        x[lane] = ((x[lane] // frequency) << precision) + x[lane] % frequency + start
    for value in reversed(x):
        words += [value & 0xFFFF, value >> 16]
    return np.array(words[::-1], "<u2").tobytes()


def _symbol(lane: int, k: int, cls: int, table: list[int]) -> list[tuple[int, int, int, int]]:
    """What coding ``k`` takes: its symbol, or an escape with length, bits and sign, then its low bits."""
    reach, shift = len(table) // 2 - 1, _shift(cls)
    symbol = k >> shift
    escaped = abs(symbol) > reach
    place = len(table) - 1 if escaped else symbol + reach
    steps = [(lane, sum(table[:place]), table[place], _PRECISION)]
    if escaped:
        beyond = abs(symbol) - reach
        width = beyond.bit_length() - 1
        steps += [*_bits(lane, width, 5), *_bits(lane, beyond - (1 << width), width), *_bits(lane, symbol < 0, 1)]
    return steps + _bits(lane, k & ((1 << shift) - 1), shift)


def _bits(lane: int, value: int, count: int) -> list[tuple[int, int, int, int]]:
    """Uniform bits, at most twelve at a time, the highest first."""
    steps = []
    while count > 0:
        part = min(count, 12)
        steps.append((lane, value & ((1 << part) - 1), 1, part))
        value, count = value >> part, count - part
    return steps[::-1]


class _Broken(Exception):
    """The words are not what an encoder writes."""


class _Reader:
    def __init__(self, words: list[int], lanes: int) -> None:
        self.words, self.at = words, 0
        self.x = [(self.word() << 16) | self.word() for _ in range(lanes)]
        if min(self.x) < _LOWER:
            raise _Broken

    def word(self) -> int:
        if self.at == len(self.words):
            raise _Broken
        self.at += 1
        return self.words[self.at - 1]

    def drop(self, lane: int, place: int, frequency: int, precision: int) -> None:
        x = frequency * (self.x[lane] >> precision) + place
        self.x[lane] = (x << 16) | self.word() if x < _LOWER else x

    def symbol(self, lane: int, table: list[int]) -> int:
        slot, place = self.x[lane] & ((1 << _PRECISION) - 1), 0
        while slot >= table[place]:
            slot, place = slot - table[place], place + 1
        self.drop(lane, slot, table[place], _PRECISION)
        return place

    def bits(self, lane: int, count: int) -> int:
        value = 0
        while count > 0:
            part = (count - 1) % 12 + 1
            value = (value << part) | (self.x[lane] & ((1 << part) - 1))
            self.drop(lane, 0, 1, part)
            count -= part
        return value

    def finished(self) -> bool:
        return self.at == len(self.words) and all(x == _LOWER for x in self.x)


def rans_decode(
    words: Words, levels: Integers, row_class: Integers, column_class: Integers, shape: Symbols,
    states: int, lanes: int, segment: int,
) -> bool:  # fmt: skip
    """Words to levels; False where they are not what an encoder writes."""
    try:
        reader = _Reader(words.tolist(), lanes)
        for i, column, lane, machine in _walk(levels.shape, lanes, states, segment):
            cls = _class_of(int(row_class[i]), int(column_class[column]))
            k = _read(reader, lane, cls, frequencies(cls, machine.quantizer, shape))
            levels[i, column] = machine.level(k)
            machine.move(k)
    except _Broken:
        return False
    return reader.finished()


def _read(reader: _Reader, lane: int, cls: int, table: list[int]) -> int:
    place, reach, shift = reader.symbol(lane, table), len(table) // 2 - 1, _shift(cls)
    symbol = place - reach
    if place == len(table) - 1:
        width = reader.bits(lane, 5)
        if width > _ESCAPE_BITS:
            raise _Broken
        beyond = (1 << width) | reader.bits(lane, width)
        symbol = -(reach + beyond) if reader.bits(lane, 1) else reach + beyond
    k = (symbol << shift) | reader.bits(lane, shift)
    if abs(k) > _LARGEST:
        raise _Broken
    return k


def symbols_encode(symbols: Symbols, row_class: Integers, frequencies: Words, lanes: int) -> bytes:
    """Symbols to bytes."""
    starts = np.cumsum(frequencies, 1) - frequencies
    order = [(lane, (row_class[i], symbols[i, j])) for i, j, lane, _ in _walk(symbols.shape, lanes, 1, 1)]
    return _words([(lane, int(starts[at]), int(frequencies[at]), _PRECISION) for lane, at in order], lanes)


def symbols_decode(words: Words, symbols: Symbols, row_class: Integers, frequencies: Words, lanes: int) -> bool:
    """Words to symbols; False where they are not what an encoder writes."""
    tables = frequencies.tolist()
    try:
        reader = _Reader(words.tolist(), lanes)
        for i, column, lane, _ in _walk(symbols.shape, lanes, 1, 1):
            symbols[i, column] = reader.symbol(lane, tables[row_class[i]])
    except _Broken:
        return False
    return reader.finished()


def histogram(
    levels: Integers, counts: NDArray[np.int64], row_class: Integers, column_class: Integers, states: int, segment: int
) -> None:
    """How often each size of k occurs by class and quantizer."""
    h0, h1 = MACHINES[4 if states == 1 else states]
    state = np.zeros(levels.shape[1], np.int64)
    counts[:] = 0
    for i, level in enumerate(levels.astype(np.int64)):
        if i % segment == 0:
            state[:] = 0
        q = state & 1
        size = np.abs(level) if states == 1 else (np.abs(level) + q) // 2
        cls = np.clip(row_class[i].astype(np.int64) + column_class, 0, _CLASSES - 1)
        np.add.at(counts, (cls, q, np.minimum(size, counts.shape[2] - 1)), 1)
        if states != 1:
            state = (state >> 1) ^ q * h0 ^ (size & 1) * h1


def product(x: Floats, levels: NDArray[Any], row_scale: Floats, column_scale: Floats, y: Floats, threads: int) -> None:
    """(x · column scale) · levelsᵀ · row scale; numpy has threads of its own."""
    y[:] = ((x * column_scale) @ (levels.T.astype(np.float32) - 128 * (levels.dtype == np.uint8))) * row_scale


def call(name: str, *arguments: Any) -> Any:
    """Call a function of this module with torch tensors in place of arrays."""
    return globals()[name](*(a.numpy() if hasattr(a, "numpy") else a for a in arguments))
