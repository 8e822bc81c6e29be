"""What surrounds the weights: header bytes per tensor in the weight files, and resident memory of loaded models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT

import tenpak
from tenpak.evaluation.memory import measure_memory

MODEL = ROOT / "models" / "tinystories-3.7m"


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tenpak-footprint-") as folder:
        out = Path(folder) / "artifact"
        report = tenpak.compress(MODEL, out)
        artifact = tenpak.open_artifact(out)
        dense = sum(artifact.tensors[name].nbytes for name in artifact.manifest.dense)
        weights = len(artifact.manifest.weights)
        overhead = report.bytes - report.payload_bits // 8 - dense
        memory = {
            "original": measure_memory(MODEL, runtime="original", dtype="float32"),
            "memory": measure_memory(out, runtime="memory", dtype="float32"),
            "speed": measure_memory(out, runtime="speed", dtype="float32"),
        }
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
        "resident": {name: found.to_json() for name, found in memory.items()},
    }
