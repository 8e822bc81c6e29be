"""The compiled core: trellis quantization, entropy coding, products; where it is missing, the plain reference.

Arguments are contiguous tensors on the CPU; shapes are checked by the core. Sums are added in a fixed order and no
products are fused, so every instruction set and the reference give the same bits, but for ``product``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tenpak.kernels import reference

__all__ = [
    "STATES",
    "frequencies",
    "histogram",
    "instruction_sets",
    "machine",
    "product",
    "quantize",
    "rans_decode",
    "rans_encode",
    "symbols_decode",
    "symbols_encode",
    "using",
]

STATES = (1, *reference.MACHINES)
_reference_only = False


@cache
def _compiled() -> Any:
    """The compiled module, or None where it was not built."""
    try:
        return importlib.import_module("tenpak._native")
    except ImportError:
        return None


def instruction_sets() -> tuple[str, ...]:
    """What this machine can run, slowest first: ``reference`` (numpy), ``generic``, ``avx2``, ``avx512``."""
    compiled = _compiled()
    return ("reference", *(compiled.instruction_sets() if compiled is not None else ()))


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Use one of ``instruction_sets`` for a while, in all threads.

    Raises:
        ValueError: this machine cannot run it.
    """
    global _reference_only
    if instruction_set not in instruction_sets():
        raise ValueError(f"{instruction_set!r} is not among {', '.join(instruction_sets())}")
    was, before = _reference_only, None
    if instruction_set == "reference":
        _reference_only = True
    else:
        before, _reference_only = _compiled().use(instruction_set), False
    try:
        yield
    finally:
        _reference_only = was
        if before is not None:
            _compiled().use(before)


def _call(name: str, *arguments: Any) -> Any:
    compiled = None if _reference_only else _compiled()
    if compiled is not None:
        return getattr(compiled, name)(*arguments)
    if not _reference_only:
        _warn_slow()
    return reference.call(name, *arguments)


@cache
def _warn_slow() -> None:
    warnings.warn(
        "tenpak was installed without its compiled core and is about a thousand times slower at this; "
        "install a C++20 compiler and reinstall",
        stacklevel=2,
    )


def machine(states: int) -> tuple[int, int]:
    """h0 and h1 of a trellis: parity b moves state s to (s >> 1) ^ (s & 1 ? h0 : 0) ^ (b ? h1 : 0)."""
    return reference.MACHINES[states]


def quantize(
    weight: Tensor,
    target: Tensor,
    error: Tensor,
    levels: Tensor,
    feedback: Tensor,
    row_step: Tensor,
    column_step: Tensor,
    rates: Tensor,
    row_class: Tensor,
    column_class: Tensor,
    states: int,
    segment: int,
) -> None:
    r"""Quantize a block of columns along a trellis, one column after another with exact feedback.

    The level of a weight is an integer v; it stands for v · row_step · column_step. v is even (2k) or odd or zero
    (2k - sgn k), as the state of the trellis says, which runs along the rows and is moved by the parity of k. The path
    of a column minimises Σ (u - v)² + rate, u the target in steps.

    Args:
        weight: FP32 ``[columns, rows]``: a column is contiguous.
        target: the weight and the feedback of earlier blocks, ``[columns, rows]``; used up.
        error: gets weight minus reconstruction, ``[columns, rows]``.
        levels: gets the levels, int32 ``[columns, rows]``.
        feedback: FP32 ``[columns, columns]``; ``[k, j]`` is what the error of column j adds to the target of k > j.
        row_step: FP32 ``[rows]``.
        column_step: FP32 ``[columns]``.
        rates: FP32 ``[classes, 2, symbols]``: cost of coding \|k\| by quantizer, in squared steps; or ``[0, 2, 1]``.
        row_class: int32 ``[rows]``; a weight's class is the sum of its row's and its column's.
        column_class: int32 ``[columns]``.
        states: of the trellis, one of ``STATES``; 1 is a uniform quantizer.
        segment: rows after which the trellis starts anew.
    """
    _call(
        "quantize", weight, target, error, levels, feedback, row_step, column_step, rates, row_class, column_class,
        states, segment,
    )  # fmt: skip


def rans_encode(
    levels: Tensor, row_class: Tensor, column_class: Tensor, shape: Tensor, states: int, lanes: int, segment: int
) -> Tensor:
    """Entropy-code levels.

    Args:
        levels: int32 ``[rows, columns]``.
        row_class: int32 ``[rows]``; the class of a level's table is the sum of its row's and its column's, cut to 0-63.
        column_class: int32 ``[columns]``.
        shape: of the tables, uint8 ``[4]``.
        states: of the trellis.
        lanes: columns that are coded interleaved.
        segment: rows after which the trellis starts anew.

    Returns:
        uint8 ``[bytes]``, an even number of them.
    """
    data = bytearray(_call("rans_encode", levels, row_class, column_class, shape, states, lanes, segment))
    return torch.frombuffer(data, dtype=torch.uint8)


def rans_decode(
    data: Tensor,
    row_class: Tensor,
    column_class: Tensor,
    shape: Tensor,
    states: int,
    lanes: int,
    segment: int,
    out: Tensor | None = None,
) -> Tensor | None:
    """Levels, int32 ``[rows, columns]``, from what ``rans_encode`` gave; None where it did not give that.

    They are written to ``out`` where there is one: fresh memory takes longer to get than levels to decode.
    """
    levels = torch.empty(len(row_class), len(column_class), dtype=torch.int32) if out is None else out
    if len(data) % 2:
        return None
    words = data.clone().view(torch.uint16)
    good = _call("rans_decode", words, levels, row_class, column_class, shape, states, lanes, segment)
    return levels if good else None


def symbols_encode(symbols: Tensor, row_class: Tensor, frequencies: Tensor, lanes: int) -> Tensor:
    """Entropy-code bytes with tables that are given.

    Args:
        symbols: uint8 ``[rows, columns]``; each that occurs in a class has a frequency there.
        row_class: int32 ``[rows]``: which table a row is coded with.
        frequencies: uint16 ``[classes, 256]``: below 4096, of each class adding up to it.
        lanes: columns that are coded interleaved.

    Returns:
        uint8 ``[bytes]``, an even number of them.
    """
    data = bytearray(_call("symbols_encode", symbols, row_class, frequencies, lanes))
    return torch.frombuffer(data, dtype=torch.uint8)


def symbols_decode(data: Tensor, columns: int, row_class: Tensor, frequencies: Tensor, lanes: int) -> Tensor | None:
    """Symbols, uint8 ``[rows, columns]``, from what ``symbols_encode`` gave; None where it did not give that."""
    symbols = torch.empty(len(row_class), columns, dtype=torch.uint8)
    if len(data) % 2:
        return None
    good = _call("symbols_decode", data.clone().view(torch.uint16), symbols, row_class, frequencies, lanes)
    return symbols if good else None


def histogram(levels: Tensor, row_class: Tensor, column_class: Tensor, states: int, segment: int, sizes: int) -> Tensor:
    r"""How often each \|k\| occurs in levels by class and quantizer, int64 ``[64, 2, sizes]``.

    Larger ones count as the last. Arguments are those of ``rans_encode``.
    """
    counts = torch.empty(64, 2, sizes, dtype=torch.int64)
    _call("histogram", levels, counts, row_class, column_class, states, segment)
    return counts


def product(x: Tensor, levels: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """FP32 ``[count, out]``: ``x @ W.T`` of a weight that stays in its levels.

    It depends on the instruction set within rounding, and not on the number of threads.

    Args:
        x: FP32 ``[count, in]``.
        levels: int8, int16 or int32 ``[out, in]``, or uint8, which are 128 more than levels; a weight is
            level · row_scale · column_scale.
        row_scale: FP32 ``[out]``.
        column_scale: FP32 ``[in]``.
    """
    y = torch.empty(len(x), len(levels))
    _call("product", x, levels, row_scale, column_scale, y, torch.get_num_threads())
    return y


def frequencies(cls: int, quantizer: int, shape: Tensor) -> list[int]:
    """Frequencies, of 4096, of the symbols -reach … reach and of the escape, for a class (0-63) and quantizer."""
    return list(_call("frequencies", cls, quantizer, shape))
