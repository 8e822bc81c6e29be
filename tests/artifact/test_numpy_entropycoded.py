"""What docs/format.md says of entropycoded/1 is enough: plain integers give, byte for byte, what tenpak decodes."""

from __future__ import annotations

import io

import numpy as np
import numpy_entropycoded
import pytest
import torch
from torch import Tensor

from tenpak.codecs import planes
from tenpak.codecs.streams import ByteReader
from tenpak.errors import InvalidPayloadError


def rows_of_kinds(rows: int, columns: int) -> Tensor:
    """Bytes of rows that differ: narrow, wide and shifted ones, some of one value."""
    generator = torch.Generator().manual_seed(rows)
    spread = torch.tensor([0.0, 0.3, 1.0, 3.0]).repeat(rows)[:rows, None]
    middle = torch.arange(rows)[:, None] % 5 * 2
    return ((torch.randn(rows, columns, generator=generator) * spread).round() + middle).long().to(torch.uint8)


def ours(section: bytes, rows: int, columns: int) -> np.ndarray | None:
    data = ByteReader("entropycoded/1", torch.frombuffer(bytearray(section), dtype=torch.uint8))
    try:
        found = planes.read(data, rows, columns)
    except InvalidPayloadError:
        return None
    return found.numpy() if data.at == len(section) else None


def theirs(section: bytes, rows: int, columns: int) -> np.ndarray | None:
    file = io.BytesIO(section)
    try:
        found = numpy_entropycoded.plane(file, rows, columns)
    except ValueError:
        return None
    return None if file.read(1) else found


@pytest.mark.parametrize("stripe", [64, 1000, 1 << 20])
@pytest.mark.parametrize("shape", [(40, 50), (1, 300), (300, 1), (65, 33)])
def test_planes(stripe: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one stripe and in many, of one class and of several."""
    monkeypatch.setattr(planes, "_STRIPE", stripe)
    monkeypatch.setattr(numpy_entropycoded, "STRIPE", stripe)
    plane = rows_of_kinds(*shape)
    section = bytes(planes.write(plane).tolist())
    assert section[0] != 0
    assert len(section) < plane.numel()
    for found in (ours(section, *shape), theirs(section, *shape)):
        assert np.array_equal(found, plane.numpy())


def test_both_refuse_the_same() -> None:
    """Or make the same of it."""
    shape, generator = (12, 40), np.random.default_rng(0)
    section = planes.write(rows_of_kinds(*shape)).numpy()
    refused = 0
    for place in range(len(section)):
        damaged = section.copy()
        damaged[place] ^= generator.integers(1, 256)
        here, there = (read(damaged.tobytes(), *shape) for read in (ours, theirs))
        assert (here is None) == (there is None), place
        assert here is None or np.array_equal(here, there)
        refused += here is None
    assert refused > 0.8 * len(section)
