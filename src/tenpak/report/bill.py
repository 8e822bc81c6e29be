"""The size bill: what every byte of an artifact's weight files is spent on.

A file is 8 bytes that say how long its header is, the header's JSON, spaces that pad it to a multiple of 8, then the
tensors back to back. Compressed tensors, and those that they share, are counted by codec and, within a codec, by the
fields of its payloads; dense ones by dtype. The items add up to the sizes that the file system states, exactly, or
there is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tenpak.artifact.blob import field_bytes
from tenpak.artifact.reader import Artifact
from tenpak.artifact.schema import WeightEntry
from tenpak.errors import CorruptArtifactError

__all__ = ["Bill", "FileBill", "Item", "size_bill"]


@dataclass(frozen=True)
class Item:
    """One row of the bill.

    Attributes:
        what: ``payload``, ``dense`` or ``header``.
        name: the codec, the dtype, or the part of the header.
        tensors: how many; 0 for headers.
        bytes: of all of them.
        fields: of a codec's payloads: name → bytes, together ``bytes``.
    """

    what: str
    name: str
    tensors: int
    bytes: int
    fields: Mapping[str, int]


@dataclass(frozen=True)
class FileBill:
    """One weight file in bytes: its payloads, dense tensors, header and padding are its size."""

    name: str
    payload: int
    dense: int
    header: int
    padding: int
    size: int


@dataclass(frozen=True)
class Bill:
    """All items, and the same by file; either way the sum is ``bytes``."""

    items: tuple[Item, ...]
    files: tuple[FileBill, ...]

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.size for file in self.files)


def size_bill(artifact: Artifact, labels: Mapping[str, str]) -> Bill:
    """The bill of an opened artifact.

    Args:
        artifact: its headers and manifest.
        labels: what the codec of each compressed tensor is called.

    Raises:
        CorruptArtifactError: a file was changed while it was read, so that its items do not add up.
    """
    files = tuple(_file_bill(artifact, path) for path in artifact.files)
    payloads: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for name, entry in artifact.manifest.weights.items():
        label = labels[name]
        payloads.setdefault(label, Counter()).update(_fields(entry))
        counts[label] += 1
    for name, (weight, *_) in artifact.manifest.sharers.items():
        field = next(field for field, stored in artifact.manifest.weights[weight].shared.items() if stored == name)
        payloads[labels[weight]][field] += artifact.tensors[name].nbytes
        counts[labels[weight]] += 1
    dense, dense_counts = Counter[str](), Counter[str]()
    for name, kept in artifact.manifest.dense.items():
        dense[kept.dtype] += artifact.tensors[name].nbytes
        dense_counts[kept.dtype] += 1
    items = [
        *(Item("payload", name, counts[name], f.total(), dict(f.most_common())) for name, f in payloads.items()),
        *(Item("dense", name, dense_counts[name], count, {}) for name, count in dense.items()),
    ]
    items.sort(key=lambda item: (item.what != "payload", -item.bytes, item.name))
    prefix = 8 * len(files)
    items += [
        Item("header", "JSON of safetensors", 0, sum(file.header for file in files) - prefix, {}),
        Item("header", "its length", 0, prefix, {}),
        Item("header", "padding", 0, sum(file.padding for file in files), {}),
    ]
    if sum(item.bytes for item in items) != sum(file.size for file in files):
        raise CorruptArtifactError(f"the weight files of {artifact.folder.name} changed while they were read")
    return Bill(tuple(items), files)


def _fields(entry: WeightEntry) -> Counter[str]:
    found: Counter[str] = Counter()
    for layout in entry.payloads:
        for spec in layout.fields:
            found[spec.name] += layout.count * field_bytes(spec)
    return found


def _file_bill(artifact: Artifact, path: Path) -> FileBill:
    here = {name: info for name, info in artifact.tensors.items() if info.file == path}
    dense = sum(info.nbytes for name, info in here.items() if name in artifact.manifest.dense)
    payload = sum(info.nbytes for info in here.values()) - dense
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    padding = len(text) - len(text.rstrip(b" "))
    header = 8 + len(text) - padding
    size = path.stat().st_size
    if payload + dense + header + padding != size:
        raise CorruptArtifactError(f"{path.name} changed while it was read", hint="run the command again")
    return FileBill(path.name, payload, dense, header, padding, size)
