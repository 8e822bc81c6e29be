"""Bit packing: rows of small codes to rows of bytes and back.

Code ``i`` of a row occupies bits ``[i·bits, (i+1)·bits)`` of the row's stream, least significant bit first; bit ``k``
of the stream is bit ``k mod 8`` of byte ``k div 8``. Every row starts at a byte, so rows can be read one by one (an
embedding look-up needs that), and the unused high bits of a row's last byte are zero.

Eight codes fill exactly ``bits`` bytes. They are squeezed together by doubling (SIMD within a register): two codes
inside each 16-bit word, then two of those inside each 32-bit word, then inside each 64-bit word. Each step is a shift,
an "or" and a mask over contiguous memory, which torch vectorises; 4 bits need the first step only, 2 bits the first
two, 8 bits none. Words are reinterpreted in place, so this assumes a little-endian machine, as the artifact does.

Codes of 9 to 16 bits (indices into large codebooks) are packed as ``bits`` codes of one bit each, which is the same
stream; there are few of them, one for several weights.
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
    """Pack codes ``[rows, n]`` each below ``2**bits``, into uint8 ``[rows, ceil(n·bits/8)]``.

    Args:
        codes: the codes, uint8, or int32 where they have more than 8 bits; a value of ``2**bits`` or more would spill
            into its neighbours, which is not checked.
        bits: bits per code, 1 to 16.

    Raises:
        ValueError: ``codes`` is not a matrix of that type or ``bits`` is out of range.
    """
    _check(codes, bits, _code_dtype(bits))
    if bits > 8:
        single = (codes.unsqueeze(-1) >> _places(bits, codes.device)) & 1
        return pack(single.to(torch.uint8).flatten(1), 1)
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
    """Unpack uint8 ``[rows, ceil(n·bits/8)]`` into codes ``[rows, n]``, uint8, int32 above 8 bits: ``pack``'s inverse.

    Raises:
        ValueError: ``packed`` is not a uint8 matrix of that width or ``bits`` is out of range.
    """
    _check(packed, bits, torch.uint8)
    if packed.shape[1] != packed_size(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_size(n, bits)} bytes a row, got {packed.shape[1]}")
    if bits > 8:
        single = unpack(packed, 1, n * bits).view(len(packed), n, bits)
        return (single.int() << _places(bits, packed.device)).sum(-1, dtype=torch.int32)
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


def _code_dtype(bits: int) -> torch.dtype:
    """The type of codes of so many bits."""
    return torch.uint8 if bits <= 8 else torch.int32


def _places(bits: int, device: torch.device) -> Tensor:
    """0 … bits - 1."""
    return torch.arange(bits, dtype=torch.int32, device=device)


def _check(codes: Tensor, bits: int, dtype: torch.dtype) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"packing takes 1 to 16 bits, got {bits}")
    if codes.ndim != 2 or codes.dtype != dtype:
        raise ValueError(f"packing {bits} bits takes a {dtype} matrix, got {codes.dtype} {tuple(codes.shape)}")
