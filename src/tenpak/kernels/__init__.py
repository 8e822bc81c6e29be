"""Kernels: the few operations on codes that must be fast, each with a plain reference in the tests that it equals."""

from __future__ import annotations

from tenpak.kernels.packing import pack, packed_size, unpack

__all__ = ["pack", "packed_size", "unpack"]
