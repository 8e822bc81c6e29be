"""The codec entropycoded/1 as docs/format.md describes it: plain integers, one symbol after the other.

``fields(inner, stream, rows, columns)`` gives the fields of the inner codec. Slow and plain on purpose, like
numpy_reader.py.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy_trellis import Coder, check, take, varint

STRIPE = 2**20


def fields(inner: dict[str, Any], stream: bytes, rows: int, columns: int) -> dict[str, np.ndarray]:
    """The fields that a stream holds."""
    file, found = io.BytesIO(stream), {}
    layout = layout_of(inner, rows, columns)
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())
    check(size <= len(stream) << 15, "too short for the weight")
    for name, (dtype, shape) in layout.items():
        height = shape[0] if len(shape) > 1 else 1
        planes = [plane(file, height, math.prod(shape) // height) for _ in range(np.dtype(dtype).itemsize)]
        found[name] = np.stack(planes, -1).view(dtype).reshape(shape)
    check(not file.read(1), "too long")
    return found


def layout_of(codec: dict[str, Any], rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each field of a codec, in their order; BF16 as the bits of it."""
    match codec["id"]:
        case "dense/1":
            return {"values": ({"float32": "<f4", "float16": "<f2"}.get(codec["dtype"], "<u2"), (rows, columns))}
        case "rotated/1":
            return layout_of(codec["inner"], rows, columns)
        case "residual/1":
            named = prefixed("base_", codec["base"], rows, columns) | prefixed("rest_", codec["rest"], rows, columns)
        case "channelscaled/1":
            named = {"channel_scales": ("u1", (columns,))} | prefixed("inner_", codec["inner"], rows, columns)
        case "lowrank/1":
            rank = rank_of(codec, rows, columns)
            left, right = (
                prefixed("left_", codec["factor"], rows, rank),
                prefixed("right_", codec["factor"], rank, columns),
            )
            named = {"rank": ("<i4", (1,))} | left | right
        case "sparse24/1":
            words, pairs = divmod(math.ceil(columns / 4), 17)
            nibbles = 11 * words + math.ceil((6**pairs - 1).bit_length() / 4)
            kept = prefixed("values_", codec["values"], rows, 2 * (columns // 4) + min(2, columns % 4))
            named = {"pairs": ("u1", (rows, math.ceil(nibbles / 2)))} | kept
        case "sparse/1":
            kept = max(1, round(codec["share"] * columns))
            low, size = places(columns, kept)
            named = {"high": ("u1", (rows, math.ceil(size / 8)))}
            named |= {"low": ("u1", (rows, math.ceil(kept * low / 8)))} if low else {}
            named |= prefixed("values_", codec["values"], rows, kept)
        case "pattern/1":
            size = codec["size"]
            down, across = math.ceil(rows / size), math.ceil(columns / size)
            learned = min(codec["learned"], down * across)
            count = learned + (2 * size**2 if codec["base"] is None else codec["base"])
            terms = min(codec["terms"], count)
            named = {"patterns": ("<f2", (learned, size, size))} if learned else {}
            named["codes"] = ("u1", (down, math.ceil(terms * across * max(1, (count - 1).bit_length()) / 8)))
            named |= prefixed("scales_", codec["scales"], down, terms * across)
        case "vector/1" | "additive/1":
            books, entries, dimension = codec.get("books", 1), codec["entries"], codec["dimension"]
            additive = codec["id"] == "additive/1"
            named = {"scales": ("<f2", (rows,))} if additive or codec["scaled"] else {}
            shape = (books, entries, dimension)
            named |= {"codebooks": ("<f2", shape)} if additive else {"codebook": ("<f2", shape[1:])}
            codes = math.ceil(columns / dimension) * books * (entries.bit_length() - 1)
            named["codes"] = ("u1", (rows, math.ceil(codes / 8)))
        case _:
            groups = 1 if codec["group"] is None else math.ceil(columns / codec["group"])
            named = {"scales": ("<f2", (rows, groups))}
            if codec["id"] == "uniform/1" and not codec["symmetric"]:
                named["offsets"] = ("<f2", (rows, groups))
            if codec["id"] == "normalfloat/1" and codec["levels"] == "learned":
                named["levels"] = ("<f2", (2 ** codec["bits"],))
            named["codes"] = ("u1", (rows, math.ceil(columns * codec["bits"] / 8)))
    return dict(sorted(named.items(), key=lambda field: -np.dtype(field[1][0]).itemsize))


def places(columns: int, kept: int) -> tuple[int, int]:
    """Of a sparse row: the low bits of each place, with which all take the least, and the bits of the map."""
    sizes = [kept + (columns - kept) // 2**low for low in range(17)]
    low = min(range(17), key=lambda low: (kept * low + sizes[low], low))
    return low, sizes[low]


def rank_of(codec: dict[str, Any], rows: int, columns: int) -> int:
    """The rank of a low-rank codec, where its configuration tells it."""
    most = min(rows, columns, 8192)
    if "rank" in codec:
        return min(codec["rank"], most)

    def bits(rank: int) -> int:
        layout = layout_of({**codec, "rank": rank}, rows, columns)
        return 8 * sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())

    return max([1, *(rank for rank in range(1, most + 1) if bits(rank) <= codec["bpw"] * rows * columns)])


def prefixed(prefix: str, codec: dict[str, Any], rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout of a codec inside another."""
    return {prefix + name: field for name, field in layout_of(codec, rows, columns).items()}


def plane(file: io.BytesIO, rows: int, columns: int) -> np.ndarray:
    """The bytes ``[rows, columns]`` of a section."""
    (mode,) = take(file, 1)
    if mode == 0:
        return np.frombuffer(take(file, rows * columns), np.uint8).reshape(rows, columns)
    width, power = mode % 16, mode // 16
    (lanes,) = take(file, 1)
    check(1 <= width <= 8 and power <= 4 and 1 <= lanes <= 32, "a header")
    packed = bits(np.frombuffer(take(file, math.ceil(rows * power / 8)), np.uint8)[None])[0, : rows * power]
    classes = (packed.reshape(rows, power) @ (1 << np.arange(power))).tolist()
    tables = [table(file, 2**width) for _ in range(2**power)]
    count = math.ceil(8 * columns / width)
    height = max(1, STRIPE // count)
    heights = [min(height, rows - first) for first in range(0, rows, height)]
    words = [np.frombuffer(take(file, 2 * size), "<u2") for size in [varint(file) for _ in heights]]
    symbols, first = np.zeros((rows, count), np.int64), 0
    for size, part in zip(heights, words, strict=True):
        coder = Coder(part.tolist(), lanes)
        for left in range(0, count, lanes):
            for row in range(first, first + size):
                for column in range(left, min(left + lanes, count)):
                    symbols[row, column] = symbol(coder, column - left, tables[classes[row]])
        coder.finish()
        first += size
    stream = (symbols[:, :, None] >> np.arange(width) & 1).reshape(rows, -1)
    check(not stream[:, 8 * columns :].any(), "what fills up a row")
    return np.packbits(stream[:, : 8 * columns].astype(np.uint8), axis=1, bitorder="little")


def bits(data: np.ndarray) -> np.ndarray:
    """The bits of each row, least significant first."""
    return np.unpackbits(data, axis=1, bitorder="little").astype(np.int64)


def symbol(coder: Coder, lane: int, frequencies: list[int]) -> int:
    """The next symbol of a lane."""
    start, low = 0, coder.x[lane] & 4095
    for found, frequency in enumerate(frequencies):
        if low < start + frequency:
            coder.advance(lane, 12, start, frequency)
            return found
        start += frequency
    raise AssertionError("frequencies add up to 4096")


def table(file: io.BytesIO, size: int) -> list[int]:
    """The frequencies of so many symbols."""
    halves = Halves(file)
    weights: list[int] = []
    p = 64
    while len(weights) < size:
        half = halves.one()
        if half == 15:
            length = halves.one()
            weights += [0] * (length + 1 if length < 15 else 16 + halves.two())
            continue
        p = halves.two() if half == 14 else p + half - 6
        check(0 <= p <= 111, "a weight")
        weights.append((8 + p % 8) * 2 ** (p // 8))
    check(len(weights) == size and any(weights) and not any(halves.left), "a table")
    n = sum(weight > 0 for weight in weights)
    found = [1 + weight * (4096 - n) // sum(weights) if weight else 0 for weight in weights]
    largest = found.index(max(found))
    found[largest] += 4096 - sum(found)
    if found[largest] == 4096:
        found[largest], found[largest ^ 1] = 4095, 1
    return found


class Halves:
    """The lower and the upper half of each byte of a file; ``left`` is what remains of the last one read."""

    def __init__(self, file: io.BytesIO) -> None:
        self.file, self.left = file, list[int]()

    def one(self) -> int:
        """The next half."""
        if not self.left:
            (byte,) = take(self.file, 1)
            self.left = [byte // 16, byte % 16]
        return self.left.pop()

    def two(self) -> int:
        """Eight bits, the lower ones first."""
        return self.one() + 16 * self.one()
