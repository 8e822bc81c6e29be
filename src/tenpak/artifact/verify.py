"""Is this folder, bit for bit, what was written? Streams every byte once, in constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenpak.artifact.reader import Artifact, open_artifact
from tenpak.checkpoint.header import TensorInfo

__all__ = ["Verification", "changed_files", "verify"]

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``: what was checked, and every problem found (none: the artifact is intact)."""

    tensors: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(folder: str | Path, *, progress: Callable[[str, int, int], None] | None = None) -> Verification:
    """Check every tensor and file of an artifact against the hashes in its manifest.

    Args:
        folder: the artifact.
        progress: called with what is done, and bytes of tensors done and in all.

    Raises:
        ArtifactError: there is no artifact, or its manifest or headers are broken, so that nothing can be compared.
    """
    artifact = open_artifact(folder)
    expected = artifact.manifest.hashes
    problems = []
    done, total = 0, sum(info.nbytes for info in artifact.tensors.values())
    for name, info in artifact.tensors.items():
        if _hash(info.file, info) != expected[name]:
            problems.append(f"the bytes of tensor {name!r} are not those that were written")
        done += info.nbytes
        if progress is not None:
            progress("checking", done, total)
    for name in changed_files(artifact):
        there = (artifact.folder / name).is_file()
        problems.append(f"file {name!r} is {'not the one that was written' if there else 'missing'}")
    return Verification(len(artifact.tensors), artifact.bytes, tuple(problems))


def changed_files(artifact: Artifact) -> list[str]:
    """Those of the manifest's ``files`` that are gone or not what was written."""
    paths = {name: artifact.folder / name for name in artifact.manifest.files}
    sums = artifact.manifest.files
    return [name for name, path in paths.items() if not path.is_file() or _hash(path) != sums[name]]


def _hash(path: Path, info: TensorInfo | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(info.start if info else 0)
        left = info.nbytes if info else path.stat().st_size
        while left > 0:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
