"""Hidden states between blocks, in memory up to a limit and on disk beyond it; the same values either way."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tenpak.errors import CalibrationError

__all__ = ["SPILL_BYTES", "Activations"]

SPILL_BYTES = 1 << 30
"""Hidden states beyond this many bytes go to disk by default."""


class Activations:
    """A mapping from (boundary, batch) to hidden states; use it as a context manager.

    Args:
        limit: bytes that stay in memory.
        folder: where a temporary folder for the rest is made; None for the system's.
    """

    def __init__(self, limit: int = SPILL_BYTES, folder: Path | None = None) -> None:
        self._limit = limit
        self._parent = folder
        self._held: dict[tuple[int, int], Tensor] = {}
        self._spilled: dict[tuple[int, int], tuple[Path, torch.dtype]] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __setitem__(self, key: tuple[int, int], value: Tensor) -> None:
        self.discard(key)
        size = value.numel() * value.element_size()
        if self._bytes + size <= self._limit:
            # A copy made by the caller's thread: what stays would else be strewn over the heaps of the workers, among
            # what they need for a moment only, and keep twice its size from being given back.
            self._held[key] = value.clone()
            self._bytes += size
            return
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="activations-", dir=self._parent)
            path = Path(self._folder.name) / f"{key[0]}-{key[1]}.npy"
            np.save(path, value.contiguous().view(torch.uint8).numpy())
        except OSError as error:
            raise CalibrationError(
                f"cannot spill {size:,} bytes of activations to disk: {error.strerror or error}",
                hint="free space there, or calibrate on fewer tokens; finished work is kept and will be reused",
            ) from error
        self._spilled[key] = path, value.dtype

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        if key in self._held:
            return self._held[key]
        path, dtype = self._spilled[key]
        return torch.from_numpy(np.load(path)).view(dtype)

    def find(self, key: tuple[int, int]) -> Tensor | None:
        """Hidden states, or None where there are none."""
        return self[key] if key in self._held or key in self._spilled else None

    def discard(self, key: tuple[int, int]) -> None:
        """Forget hidden states, if they are there."""
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held.numel() * held.element_size()
        spilled = self._spilled.pop(key, None)
        if spilled is not None:
            spilled[0].unlink(missing_ok=True)
