"""``report.json``: sizes as the file system says, what is dense and why, and the measured quality.

Every ratio counts every byte of the artifact's weight files, headers included, against the checkpoint's own weight
files and against FP32, which is 4 bytes × parameters with tied weights once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenpak.artifact.reader import open_artifact
from tenpak.artifact.sizes import Sizes
from tenpak.artifact.writer import PAGE_NAME

__all__ = ["Report", "measured"]


@dataclass(frozen=True)
class Report(Sizes):
    """An artifact's sizes and quality.

    Attributes:
        artifact: its folder.
        source: name of the compressed model.
        recipe: what it was compressed with.
        parameters: of the model, tied ones once.
        bytes: of the weight files.
        checkpoint_bytes: of the source's weight files.
        folder_bytes: of everything in the folder when the weights were published; a page added later does not count.
        payload_bits: of all compressed tensors, and of what they share, once.
        compressed_parameters: elements of all compressed tensors.
        codecs: codec id → bytes, what tensors share once.
        dense: tensor → bytes and reason.
        seconds: to encode and write.
        reused: tensors that an earlier run had finished.
        calibration: what the codecs were calibrated on, or None.
        quality: what ``tenpak evaluate`` measured, and ``overlap``; or None.
        search: budget and trials (step and cost of each, the last one taken), or None where a recipe was given.
    """

    artifact: str
    source: str
    recipe: str
    parameters: int
    bytes: int
    checkpoint_bytes: int
    folder_bytes: int
    payload_bits: int
    compressed_parameters: int
    codecs: Mapping[str, int]
    dense: Mapping[str, Mapping[str, Any]]
    seconds: float | None = None
    quality: Mapping[str, Any] | None = None
    reused: int = 0
    calibration: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None

    @property
    def overlap(self) -> float | None:
        """The share of the evaluation text that occurs in the calibration text; None where it is not known."""
        return None if self.quality is None else self.quality.get("overlap")

    def with_search(self, search: Mapping[str, Any] | None) -> Report:
        """The same report with the search that met a budget."""
        return replace(self, search=search)

    def with_quality(self, quality: Mapping[str, Any] | None) -> Report:
        """The same report with a measured quality."""
        return replace(self, quality=quality)

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact,
            "source": self.source,
            "recipe": self.recipe,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "folder_bytes": self.folder_bytes,
            "bpw": self.bpw,
            "ratio_fp32": self.ratio_fp32,
            "ratio_checkpoint": self.ratio_checkpoint,
            "payload_bits": self.payload_bits,
            "compressed_parameters": self.compressed_parameters,
            "codecs": dict(self.codecs),
            "dense": {name: dict(entry) for name, entry in self.dense.items()},
            "seconds": self.seconds,
            "reused": self.reused,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "search": None if self.search is None else dict(self.search),
            "overlap": self.overlap,
            "quality": None if self.quality is None else dict(self.quality),
        }


def measured(
    folder: str | Path, checkpoint_bytes: int | None = None, *, seconds: float | None = None, reused: int = 0
) -> Report:
    """The report of an artifact on disk. Raises as ``open_artifact`` does."""
    artifact = open_artifact(folder)
    manifest = artifact.manifest
    codecs: dict[str, int] = defaultdict(int)
    for entry in manifest.weights.values():
        codecs[str(entry.codec["id"])] += entry.bits // 8
    shared = {name: artifact.tensors[name].nbytes for name in manifest.shared}
    for name, (weight, *_) in manifest.sharers.items():
        codecs[str(manifest.weights[weight].codec["id"])] += shared[name]
    return Report(
        artifact=str(folder),
        source=manifest.source.name,
        recipe=manifest.recipe,
        parameters=manifest.source.parameters,
        bytes=artifact.bytes,
        checkpoint_bytes=manifest.source.bytes if checkpoint_bytes is None else checkpoint_bytes,
        folder_bytes=sum(path.stat().st_size for path in artifact.folder.iterdir() if path.name != PAGE_NAME),
        payload_bits=sum(entry.bits for entry in manifest.weights.values()) + 8 * sum(shared.values()),
        compressed_parameters=sum(math.prod(entry.shape) for entry in manifest.weights.values()),
        codecs=dict(codecs),
        dense={
            name: {"bytes": artifact.tensors[name].nbytes, "reason": entry.reason}
            for name, entry in manifest.dense.items()
        },
        seconds=seconds,
        quality=manifest.quality,
        reused=reused,
        calibration=manifest.calibration,
    )
