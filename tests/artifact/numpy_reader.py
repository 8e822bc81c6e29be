"""An independent reader of artifacts, written from docs/format.md: numpy and the standard library only.

``Reader(folder).decode(name)`` gives a compressed tensor as FP32, ``dense(name)`` one that is stored as it was.
It checks what the format says a reader checks. It is slow and plain on purpose. numpy_trellis.py and
numpy_entropycoded.py are parts of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy_entropycoded
import numpy_trellis

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "BOOL": 1}  # fmt: skip
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
         "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}  # fmt: skip

NORMAL_LEVELS = {
    2: "-1 0 0.43581817 1",
    3: "-1 -0.53502274 -0.24693143 0 0.18333748 0.38199395 0.6229857 1",
    4: "-1 -0.6961928 -0.52507293 -0.39491743 -0.28444132 -0.1847734 -0.09104998 0 "
    "0.079580314 0.16093014 0.24611226 0.33791512 0.44070974 0.5626169 0.72295666 1",
}


class Reader:
    """An opened artifact: ``manifest`` as parsed, ``tensors`` by stored name as (dtype, shape, file, start, end)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder / "manifest.json")
        self.tensors: dict[str, tuple[str, list[int], Path, int, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors.update(read_header(file))
        stored = {f"{name}_codes" for name in self.manifest["weights"]} | set(self.manifest["dense"])
        stored |= set(self.manifest.get("shared", {}))
        require(stored == set(self.tensors), "manifest and weight files list different tensors")
        for name, sha256 in self.manifest["files"].items():
            require(hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256, f"{name} was changed")

    def read(self, stored: str, sha256: str) -> bytes:
        """The bytes of a stored tensor, compared with their hash."""
        _, _, file, start, end = self.tensors[stored]
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        require(hashlib.sha256(data).hexdigest() == sha256, f"{stored} was changed")
        return data

    def dense(self, name: str) -> np.ndarray:
        """A tensor stored as it was; BF16 comes as FP32."""
        entry = self.manifest["dense"][name]
        return array(self.read(name, entry["sha256"]), entry["dtype"], entry["shape"])

    def shared(self, stored: str) -> np.ndarray:
        """A tensor that compressed ones share."""
        entry = self.manifest["shared"][stored]
        require(self.tensors[stored][:2] == (entry["dtype"], entry["shape"]), f"{stored} is not what is listed")
        return array(self.read(stored, entry["sha256"]), entry["dtype"], entry["shape"])

    def decode(self, name: str) -> np.ndarray:
        """A compressed tensor, FP32, in the shape and orientation of the source checkpoint."""
        entry = self.manifest["weights"][name]
        blob = self.read(f"{name}_codes", entry["sha256"])
        require(8 * len(blob) == entry["bits"], "bits")
        rows, columns = entry["shape"][-2:]
        if entry["transposed"]:
            rows, columns = columns, rows
        shared = {field: self.shared(stored) for field, stored in entry.get("shared", {}).items()}
        matrices, position = [], 0
        for layout in entry["payloads"]:
            for _ in range(layout["count"]):
                fields = dict(shared)
                for spec in layout["fields"]:
                    size = math.prod(spec["shape"]) * BYTES[spec["dtype"]]
                    require(position + size <= len(blob), "blob is too short")
                    fields[spec["name"]] = array(blob[position : position + size], spec["dtype"], spec["shape"])
                    position += size
                matrix = decode_matrix(entry["codec"], fields, rows, columns)
                matrices.append(matrix.T if entry["transposed"] else matrix)
        require(position == len(blob), "blob is too long")
        return np.stack(matrices).reshape(entry["shape"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after checking the hash of its own bytes."""
    raw = path.read_bytes()
    body, seal = raw[:-77], raw[-77:]
    sha256 = hashlib.sha256(body + b"}").hexdigest()
    require(seal == b',"sha256":"' + sha256.encode() + b'"}', "the manifest was changed")
    manifest: dict[str, Any] = json.loads(raw)
    require(manifest["format_version"] == (2 if "shared" in manifest else 1), "another version of the format")
    return manifest


def read_header(file: Path) -> dict[str, tuple[str, list[int], Path, int, int]]:
    """The tensors of a safetensors file; start and end count from the beginning of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        require(length <= size - 8, "the header is longer than the file")
        header = json.loads(stream.read(length))
    require(header.pop("__metadata__") == {"format": "pt"}, "metadata")
    found, position = {}, 8 + length
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        require(start == position and end - start == math.prod(entry["shape"]) * BYTES[entry["dtype"]], name)
        found[name] = (entry["dtype"], entry["shape"], file, start, end)
        position = end
    require(position == size, "the file has another size than its header says")
    return found


def array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """Little-endian, row-major bytes as an array; BF16 is the upper half of an FP32."""
    if dtype == "BF16":
        return widened(np.frombuffer(data, "<u2")).reshape(shape)
    return np.frombuffer(data, NUMPY[dtype]).reshape(shape)


def widened(field: np.ndarray) -> np.ndarray:
    """The bits of BF16 as FP32, anything else as it is."""
    return (field.astype(np.uint32) << 16).view(np.float32) if field.dtype == np.dtype("<u2") else field


def decode_matrix(codec: dict[str, Any], fields: dict[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """One payload as an FP32 matrix ``[rows, columns]``."""
    if codec["id"] == "dense/1":
        return fields["values"].astype(np.float32)
    if codec["id"] == "residual/1":
        base = {name[5:]: field for name, field in fields.items() if name.startswith("base_")}
        rest = {name[5:]: field for name, field in fields.items() if name.startswith("rest_")}
        return decode_matrix(codec["base"], base, rows, columns) + decode_matrix(codec["rest"], rest, rows, columns)
    if codec["id"] == "channelscaled/1":
        inner = {name[6:]: field for name, field in fields.items() if name.startswith("inner_")}
        exponents, fractions = np.divmod(fields["channel_scales"].astype(np.int64), 16)
        scales = ((16 + fractions) * 2**exponents).astype(np.float32) / np.float32(16)
        return decode_matrix(codec["inner"], inner, rows, columns) * scales
    if codec["id"] == "rotated/1":
        return rotate_back(decode_matrix(codec["inner"], fields, rows, columns), codec["seed"])
    if codec["id"] == "lowrank/1":
        left, right = (
            {name[len(prefix) :]: field for name, field in fields.items() if name.startswith(prefix)}
            for prefix in ("left_", "right_")
        )
        (rank,) = fields["rank"].tolist()
        return product(
            decode_matrix(codec["factor"], left, rows, rank), decode_matrix(codec["factor"], right, rank, columns)
        )
    if codec["id"] == "trellis/1":
        return numpy_trellis.decode(codec, fields["stream"].tobytes(), rows, columns)
    if codec["id"] == "entropycoded/1":
        inner = numpy_entropycoded.fields(codec["inner"], fields["stream"].tobytes(), rows, columns)
        return decode_matrix(codec["inner"], {name: widened(field) for name, field in inner.items()}, rows, columns)
    if codec["id"] == "sparse24/1":
        kept = {name[7:]: field for name, field in fields.items() if name.startswith("values_")}
        values = decode_matrix(codec["values"], kept, rows, 2 * (columns // 4) + min(2, columns % 4))
        return spread(values, fields["pairs"], columns)
    if codec["id"] == "sparse/1":
        kept = max(1, round(codec["share"] * columns))
        inner = {name[7:]: field for name, field in fields.items() if name.startswith("values_")}
        return put_at(decode_matrix(codec["values"], inner, rows, kept), fields, columns)
    if codec["id"] == "pattern/1":
        return put_together(codec, fields, rows, columns)
    if codec["id"] in ("vector/1", "additive/1"):
        return sum_entries(codec, fields, rows, columns)
    bits = codec["bits"]
    codes = unpack(fields["codes"], bits, columns)
    size = columns if codec["group"] is None else codec["group"]
    group = np.arange(columns) // size  # of each column
    scales = fields["scales"].astype(np.float32)[:, group]
    if codec["id"] == "normalfloat/1":
        learned = codec["levels"] == "learned"
        levels = fields["levels"] if learned else np.array(NORMAL_LEVELS[bits].split(), dtype=np.float32)
        return levels.astype(np.float32)[codes] * scales
    require(codec["id"] == "uniform/1", f"unknown codec {codec['id']}")
    if codec["symmetric"]:
        return scales * (codes.astype(np.float32) - np.float32(2 ** (bits - 1)))
    return fields["offsets"].astype(np.float32)[:, group] + scales * codes.astype(np.float32)


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The product of two factors: their 20-bit integers, summed exactly, rounded once."""
    a, a_exponent = integers(left, 1)
    b, b_exponent = integers(right, 0)
    return np.ldexp(a @ b + 0.0, a_exponent + b_exponent).astype(np.float32)


def integers(factor: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers of at most 2^20, FP64, and the exponents they are to be multiplied with, along an axis."""
    exponent = np.frexp(np.abs(factor.astype(np.float64)).max(axis, keepdims=True))[1] - 20
    return np.rint(np.ldexp(factor.astype(np.float64), -exponent)), exponent


def sum_entries(codec: dict[str, Any], fields: dict[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Vectors of a row, each an entry of a codebook or the sum of one of each book, times the row's scale."""
    codebooks = fields["codebook"][None] if codec["id"] == "vector/1" else fields["codebooks"]
    books, entries, dimension = codebooks.shape
    vectors = -(-columns // dimension)
    codes = unpack(fields["codes"], entries.bit_length() - 1, vectors * books).reshape(rows, vectors, books)
    total = codebooks[0].astype(np.float32)[codes[..., 0]]
    for book in range(1, books):
        total = total + codebooks[book].astype(np.float32)[codes[..., book]]
    weight = total.reshape(rows, vectors * dimension)[:, :columns]
    return weight * fields["scales"].astype(np.float32)[:, None] if "scales" in fields else weight


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Codes ``[rows, columns]`` of packed rows: a stream of bits per row, least significant first."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : columns * bits]
    return stream.reshape(len(packed), columns, bits) @ (1 << np.arange(bits))


def spread(values: np.ndarray, packed: np.ndarray, columns: int) -> np.ndarray:
    """Kept values at their places: pairs are digits in base six, seventeen in each 44 bits of a row."""
    weight = np.zeros((len(values), columns), dtype=np.float32)
    for row, raw in enumerate(packed):
        stream = int.from_bytes(raw.tobytes(), "little")
        for block in range(-(-columns // 4)):
            word = stream >> (44 * (block // 17)) & (2**44 - 1)
            pair = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))[word // 6 ** (block % 17) % 6]
            for value, place in zip(values[row, 2 * block : 2 * block + 2], pair, strict=False):
                weight[row, 4 * block + place] = value
    return weight


def put_at(values: np.ndarray, fields: dict[str, np.ndarray], columns: int) -> np.ndarray:
    """Kept values at their places: 1s in a row's map, each with the low bits of how many zeros come before it."""
    rows, kept = values.shape
    low, size = numpy_entropycoded.places(columns, kept)
    weight = np.zeros((rows, columns), dtype=np.float32)
    rest = unpack(fields["low"], low, kept) if low else np.zeros((rows, kept), dtype=int)
    for row, bits in enumerate(unpack(fields["high"], 1, size)):
        (ones,) = np.nonzero(bits)
        require(len(ones) == kept, "another number of weights")
        last = -1
        for i, one in enumerate(ones):
            place = int(one - i << low) + int(rest[row, i]) + i
            require(last < place < columns, "places do not rise within the row")
            weight[row, place], last = values[row, i], place
    return weight


def put_together(codec: dict[str, Any], fields: dict[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Blocks as sums of patterns, then cut to the matrix."""
    size = codec["size"]
    down, across = -(-rows // size), -(-columns // size)
    base = 2 * size**2 if codec["base"] is None else codec["base"]
    table = base_patterns(size)[:base]
    table = np.concatenate([table, fields["patterns"]]) if "patterns" in fields else table
    terms = min(codec["terms"], len(table))
    bits = max(1, (len(table) - 1).bit_length())
    codes = unpack(fields["codes"], bits, terms * across).reshape(down, terms, across)
    require(bool((codes < len(table)).all()), "there is no such pattern")
    inner = {name[7:]: field for name, field in fields.items() if name.startswith("scales_")}
    scales = decode_matrix(codec["scales"], inner, down, terms * across).reshape(down, terms, across)
    weight = None
    for term in range(terms):
        product = table[codes[:, term]].astype(np.float32) * scales[:, term, :, None, None]
        weight = product if weight is None else weight + product
    return weight.transpose(0, 2, 1, 3).reshape(down * size, across * size)[:rows, :columns]


def base_patterns(size: int) -> np.ndarray:
    """Cosine waves in multiples of 1/64, coarse to fine, then single weights."""
    places = range(size)
    wave = np.array([[round(64 * math.cos(math.pi * (2 * i + 1) * k / (2 * size))) for i in places] for k in places])
    order = sorted((k + m, k, m) for k in places for m in places)
    waves = [np.outer(wave[k], wave[m]) / 4096 for _, k, m in order]
    return np.concatenate([np.array(waves), np.eye(size**2).reshape(-1, size, size)]).astype(np.float32)


def rotate_back(weight: np.ndarray, seed: int) -> np.ndarray:
    """Each row w as S1 B1 S2 B2 w (S1 B1 w for a power of two)."""
    columns = weight.shape[1]
    size = 1 << (columns.bit_length() - 1)
    signs = np.array([sign(seed, k) for k in range(2 * columns)], dtype=np.float32)
    if size < columns:
        weight = np.hstack([weight[:, :-size], hadamard(weight[:, -size:])]) * signs[columns:]
    return np.hstack([hadamard(weight[:, :size]), weight[:, size:]]) * signs[:columns]


def hadamard(rows: np.ndarray) -> np.ndarray:
    """Each row times the orthonormal Hadamard matrix of its length, a power of two."""
    size = rows.shape[1]
    half = 1
    while half < size:
        low = np.array([i for i in range(size) if not i & half], dtype=int)
        done = np.empty_like(rows)
        done[:, low], done[:, low + half] = rows[:, low] + rows[:, low + half], rows[:, low] - rows[:, low + half]
        rows, half = done, 2 * half
    return rows * np.float32(2.0 ** (-math.log2(size) / 2))


def sign(seed: int, k: int) -> float:
    """The sign of output k of splitmix64."""
    z = (seed + (k + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return -1.0 if (z ^ (z >> 31)) >> 63 else 1.0


def require(condition: bool, what: str) -> None:
    """Raise ValueError unless the artifact is as the format says."""
    if not condition:
        raise ValueError(f"not a sound artifact: {what}")
