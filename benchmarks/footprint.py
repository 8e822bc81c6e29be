"""What surrounds the weights in the weight files: header bytes per tensor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT

import tenpak

MODEL = ROOT / "models" / "tinystories-3.7m"


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tenpak-footprint-") as folder:
        out = Path(folder) / "artifact"
        report = tenpak.compress(MODEL, out)
        artifact = tenpak.open_artifact(out)
        dense = sum(artifact.tensors[name].nbytes for name in artifact.manifest.dense)
        weights = len(artifact.manifest.weights)
        overhead = report.bytes - report.payload_bits // 8 - dense
    return {
        "model": MODEL.name,
        "recipe": report.recipe,
        "bytes": report.bytes,
        "payload_bytes": report.payload_bits // 8,
        "dense_bytes": dense,
        "weight_tensors": weights,
        "dense_tensors": len(artifact.manifest.dense),
        "overhead_bytes": overhead,
        "overhead_bytes_per_weight_tensor": overhead / weights,
    }
