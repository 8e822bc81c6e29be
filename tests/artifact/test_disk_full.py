"""A disk that really is full: the file system refuses, and one clear error comes out and nothing stays behind."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from artifacts import blank_manifest, write_small

from tenpak.artifact.verify import verify
from tenpak.artifact.writer import ArtifactWriter
from tenpak.errors import ArtifactError


def write_large(out: Path, *, overwrite: bool = False) -> None:
    """An artifact of 6 MiB in three shards."""
    with ArtifactWriter(out, overwrite=overwrite, max_shard_bytes=2 << 20) as writer:
        for number in range(6):
            writer.add_dense(f"t{number}", torch.full((1 << 18,), float(number)), "1-D")
        writer.publish(blank_manifest(), {})


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes of a file fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the signal would end the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [1, 4096, 1 << 20, 3 << 19, (2 << 20) - 1])
def test_file_that_cannot_grow(size: int, tmp_path: Path) -> None:
    with (
        files_limited_to(size),
        pytest.raises(ArtifactError, match=r"cannot write .*artifact: File too large") as caught,
    ):
        write_large(tmp_path / "artifact")
    assert "nothing was left behind" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_limit_that_is_large_enough(tmp_path: Path) -> None:
    with files_limited_to((2 << 20) + 4096):
        write_large(tmp_path / "artifact")
    assert verify(tmp_path / "artifact").ok


@pytest.mark.parametrize("out", ["other", "artifact"])
def test_full_disk(out: str, small_disk: Path) -> None:
    artifact = write_small(small_disk / "artifact")
    found = sorted(path.name for path in small_disk.iterdir())
    with pytest.raises(ArtifactError, match="No space left"):
        write_large(small_disk / out, overwrite=True)
    assert sorted(path.name for path in small_disk.iterdir()) == found
    assert verify(artifact).ok
