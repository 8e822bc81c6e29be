"""Bit packing: rows of small codes to rows of bytes and back.

Code ``i`` of a row occupies bits ``[i·bits, (i+1)·bits)`` of the row's stream, least significant bit first; bit ``k``
of the stream is bit ``k mod 8`` of byte ``k div 8``. Every row starts at a byte, so rows can be read one by one (an
embedding look-up needs that), and the unused high bits of a row's last byte are zero.

Eight codes fill exactly ``bits`` bytes. They are squeezed together by doubling (SIMD within a register): two codes
inside each 16-bit word, then two of those inside each 32-bit word, then inside each 64-bit word. Each step is a shift,
an "or" and a mask over contiguous memory, which torch vectorises; 4 bits need the first step only, 2 bits the first
two, 8 bits none. Words are reinterpreted in place, so this assumes a little-endian machine, as the artifact does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["pack", "packed_size", "unpack"]


def packed_size(n: int, bits: int) -> int:
    """Bytes that ``n`` codes of ``bits`` bits take: ``ceil(n·bits / 8)``."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 ``[rows, n]`` each below ``2**bits``, into uint8 ``[rows, ceil(n·bits/8)]``.

    Args:
        codes: the codes; a value of ``2**bits`` or more would spill into its neighbours, which is not checked.
        bits: bits per code, 1 to 8.

    Raises:
        ValueError: ``codes`` is not a uint8 matrix or ``bits`` is out of range.
    """
    _check(codes, bits)
    if bits == 8:
        return codes.contiguous()
    rows, n = codes.shape
    per_word = 8 if bits in _GENERIC else 8 // bits
    words = _aligned(codes, per_word)
    if bits in _GENERIC:
        word = _squeeze(words, bits, steps=3)
        packed = word.view(torch.uint8).view(rows, -(-n // 8), 8)[:, :, :bits].flatten(1)
        return packed[:, : packed_size(n, bits)].contiguous()
    # The word's low byte holds everything; conversion to uint8 keeps just that byte.
    return _squeeze(words, bits, steps=per_word.bit_length() - 1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack uint8 ``[rows, ceil(n·bits/8)]`` into codes, uint8 ``[rows, n]``: the inverse of ``pack``.

    Raises:
        ValueError: ``packed`` is not a uint8 matrix of that width or ``bits`` is out of range.
    """
    _check(packed, bits)
    if packed.shape[1] != packed_size(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_size(n, bits)} bytes a row, got {packed.shape[1]}")
    if bits == 8:
        return packed.contiguous()
    rows = packed.shape[0]
    if bits in _GENERIC:
        count = -(-n // 8)
        stream = pad(packed, (0, count * bits - packed.shape[1])).view(rows, count, bits)
        # Bytes are assembled into words by arithmetic-free copying: `bits` bytes low, zeros above.
        word = pad(stream, (0, 8 - bits)).view(rows, count * 8).view(torch.int64)
        codes = _spread(word, bits, steps=3)
    else:
        steps = (8 // bits).bit_length() - 1
        codes = _spread(packed.to(_WORDS[steps]), bits, steps)
    return codes[:, :n].contiguous()


_WORDS = (torch.uint8, torch.int16, torch.int32, torch.int64)  # the word after so many doubling steps
_GENERIC = (3, 5, 6, 7)  # widths that do not divide 8; 1 bit divides it in three steps


def _squeeze(codes: Tensor, bits: int, steps: int) -> Tensor:
    """Words of ``_WORDS[steps]`` whose low bits hold the ``2**steps`` codes of as many bytes."""
    word = codes
    for step in range(1, steps + 1):
        word = word.view(_WORDS[step])
        width = bits << (step - 1)  # of each of the two halves that are now brought together
        low = (1 << width) - 1
        word = (word & low) | ((word >> ((4 << step) - width)) & (low << width))
    return word


def _spread(word: Tensor, bits: int, steps: int) -> Tensor:
    """The inverse of ``_squeeze``: one code per byte."""
    for step in range(steps, 0, -1):
        width = bits << (step - 1)
        half = 4 << step
        low = (1 << width) - 1
        word = (word & low) | ((word << (half - width)) & (low << half))
        word = word.view(_WORDS[step - 1])
    return word


def _aligned(codes: Tensor, multiple: int) -> Tensor:
    """``codes`` with rows zero-padded to a multiple, contiguous and aligned for reinterpretation as words."""
    missing = -codes.shape[1] % multiple
    if missing:
        return pad(codes, (0, missing))
    codes = codes.contiguous()
    return codes.clone() if codes.storage_offset() % 8 else codes


def _check(codes: Tensor, bits: int) -> None:
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"packing takes a uint8 matrix, got {codes.dtype} {tuple(codes.shape)}")
    if not 1 <= bits <= 8:
        raise ValueError(f"packing takes 1 to 8 bits, got {bits}")
