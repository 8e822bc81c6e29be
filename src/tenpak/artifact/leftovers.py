"""Folders that killed runs leave behind: told from those in use by a lock, which dies with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked", "remove_unused"]


def remove_unused(parent: Path, pattern: str) -> None:
    """Delete the folders of a pattern that no process has locked: runs that were killed left them behind."""
    for folder in parent.glob(pattern):
        if folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError), locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process at the latest.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
