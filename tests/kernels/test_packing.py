"""Packing equals a plain reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenpak.kernels import pack, packed_size, unpack


def reference(row: list[int], bits: int) -> bytes:
    """Code i of a row at bits [i·bits, (i+1)·bits), least significant first: one big integer."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    return stream.to_bytes((len(row) * bits + 7) // 8, "little")


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(1, 16))
    n = draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    return bits, draw(st.lists(row, min_size=1, max_size=4))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(rows_of_codes())
def test_pack_equals_the_reference_and_unpack_inverts_it(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    packed = pack(torch.tensor(rows, dtype=torch.uint8 if bits <= 8 else torch.int32), bits)
    assert packed.is_contiguous()
    assert [bytes(row.tolist()) for row in packed] == [reference(row, bits) for row in rows]
    unpacked = unpack(packed, bits, len(rows[0]))
    assert unpacked.is_contiguous()
    assert unpacked.tolist() == rows


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 8, 31, 1000])
def test_largest_and_smallest_codes(bits: int, n: int) -> None:
    for code in (0, 2**bits - 1):
        packed = pack(torch.full((2, n), code, dtype=torch.uint8), bits)
        assert packed.shape == (2, packed_size(n, bits))
        assert bytes(packed[0].tolist()) == reference([code] * n, bits)
        assert (unpack(packed, bits, n) == code).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_views_pack_like_copies(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (9, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    odd = torch.cat((torch.zeros(3, dtype=torch.uint8), codes.flatten()))[3:].view(9, 24)  # at an odd address
    for view in (codes[1::2], codes[:, 3:], codes.t(), odd):
        expected = pack(view.clone(memory_format=torch.contiguous_format), bits)
        assert torch.equal(pack(view, bits), expected)
    packed = pack(codes, bits)
    wide = torch.cat((torch.zeros(9, 1, dtype=torch.uint8), packed), 1)
    assert torch.equal(unpack(wide[:, 1:], bits, 24), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_rows(bits: int) -> None:
    packed = pack(torch.zeros(0, 11, dtype=torch.uint8), bits)
    assert packed.shape == (0, packed_size(11, bits))
    assert unpack(packed, bits, 11).shape == (0, 11)


def test_misuse_is_refused() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    for call in (
        lambda: pack(codes, 0),
        lambda: pack(codes, 9),
        lambda: pack(codes.int(), 17),
        lambda: pack(codes.int(), 4),
        lambda: pack(codes[0], 4),
        lambda: unpack(codes, 4, 15 + 2),
        lambda: unpack(codes, 4, 14),
        lambda: unpack(codes.float(), 8, 8),
    ):
        with pytest.raises(ValueError, match=r"packing (takes|\d+ bits takes)|codes of"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", range(1, 9))
def test_gpu_packs_like_the_cpu(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 77), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert torch.equal(pack(codes.cuda(), bits).cpu(), packed)
    assert torch.equal(unpack(packed.cuda(), bits, 77).cpu(), codes)
