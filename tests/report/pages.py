"""Artifacts, diagnoses and profiles made up for the tests of pages: no model stands behind them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from artifacts import blank_manifest, matrix

from tenpak.artifact.reader import open_artifact
from tenpak.artifact.schema import Source
from tenpak.artifact.writer import MAX_SHARD_BYTES, ArtifactWriter
from tenpak.recipes import parse

HOSTILE = "<script>alert(1)</script>"
KINDS = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32),
}  # fmt: skip
QUALITY = {
    "bytes": 1, "bpw": 3.2, "ratio_fp32": 10.0, "ratio_checkpoint": 5.0, "ppl_original": 6.1234,
    "ppl_original_se": 0.05, "ppl": 6.2345, "ppl_se": 0.05, "ppl_increase": 0.0181, "ppl_increase_se": 0.0009,
    "kl": 0.0123, "kl_se": 0.0004, "top1": 0.951, "top1_se": 0.001, "tokens": 65536, "window": 256, "stride": 128,
    "dtype": "float32", "text": "evaluation.txt", "text_sha256": "ab" * 32,
}  # fmt: skip


def write_model(
    folder: Path,
    *,
    layers: int = 4,
    recipes: Mapping[str, str] | None = None,
    name: str = "someone/model",
    prefix: str = "model.layers",
    quality: Mapping[str, Any] | None = QUALITY,
    recorded: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """An artifact with the tensors of a small llama, one recipe for each kind (``int4:g16`` where none is said)."""
    recipes = recipes or {}
    with ArtifactWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        add(writer, "model.embed_tokens.weight", (64, 16), recipes.get("embed", "int8:row"))
        for layer in range(layers):
            for kind, shape in KINDS.items():
                add(writer, f"{prefix}.{layer}.{kind}.weight", shape, recipes.get(kind, "int4:g16"), seed=layer)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add_dense(f"{prefix}.{layer}.{norm}.weight", torch.ones(16, dtype=torch.bfloat16), "1-D")
        writer.add_dense("model.norm.weight", torch.ones(16), "1-D")
        parameters = 64 * 16 + layers * (sum(math.prod(s) for s in KINDS.values()) + 32) + 16
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        source = Source(name=name, sha256=sha256, bytes=4 * parameters, parameters=parameters)
        manifest = blank_manifest(source=source, quality=None if quality is None else dict(quality))
        writer.publish(manifest, {"model_type": "none"})
    if recorded is not None:
        (folder / "report.json").write_text(json.dumps(recorded))
    return folder


def add(writer: ArtifactWriter, name: str, shape: tuple[int, ...], recipe: str, seed: int = 0) -> None:
    codec = parse(recipe)
    if codec is None:
        writer.add_dense(name, matrix(*shape, seed=seed), "--set said so")
    else:
        payload = codec.encode(matrix(*shape, seed=seed), None)
        writer.add_weight(name, [payload], shape=shape, dtype="F32", transposed=False)


def search(count: int = 5) -> dict[str, Any]:
    """What ``report.json`` tells of a search."""
    costs = [4200 - 700 / (number + 1) * (-1) ** number for number in range(count)]
    return {
        "search": {"budget": "10x", "trials": [{"value": 0.01 / (n + 1), "cost": c} for n, c in enumerate(costs)]},
        "environment": {"python": "3.11.7", "machine": "x86_64", "threads": 2, "written": "2026-01-02T03:04:05Z"},
        "seconds": 12.5,
    }


def diagnosis(artifact: Path) -> dict[str, Any]:
    """A diagnosis of an artifact with figures that have the shapes of real ones."""
    manifest = open_artifact(artifact).manifest
    blocks = {name.split(".")[2] for name in manifest.weights if name.count(".") > 3}
    layers = [
        {
            "name": f"model.layers.{depth}", "depth": depth, "cosine": 1 - 0.0004 * (depth + 1) ** 1.3,
            "norm_ratio": 1 - 0.001 * depth, "relative_error": 0.012 * (depth + 1) ** 0.8,
            "peak_original": 8 + 3 * math.sin(depth), "peak": 8.4 + 3 * math.sin(depth + 0.1),
            "outliers_original": 0.001, "outliers": 0.0011,
        }
        for depth in range(len(blocks))
    ]  # fmt: skip
    weights = [
        {
            "name": name, "shape": list(entry.shape), "codec": "int4:g16", "bytes": entry.bits // 8,
            "bits_per_weight": entry.bits / math.prod(entry.shape), "relative_error": 0.08 + 0.03 * math.sin(number),
            "kurtosis": 3.1, "outlier_share": 0.001, "effective_rank": 11.5, "energy": [[0.1, 0.4], [1.0, 1.0]],
            "kl": 1e-4 * (1.5 + math.sin(number)) if number % 3 else None,
        }
        for number, (name, entry) in enumerate(manifest.weights.items())
    ]  # fmt: skip
    told = "Once upon a time there was a little girl who lived in a house by the sea. "
    return {
        "original": "someone/model", "artifact": str(artifact), "text": "evaluation.txt", "tokens": 4096,
        "layers": layers, "weights": weights,
        "culprit": {"layer": "model.layers.2", "why": "its down_proj loses most"},
        "step": {
            "prompt": "Once upon a",
            "original": [{"token": " time", "probability": 0.91}, {"token": " day", "probability": 0.03}],
            "compressed": [{"token": " time", "probability": 0.9}, {"token": "\n", "probability": 0.04}],
            "entropy_original": 0.5, "entropy": 0.6, "kl": 0.01, "diverges_at": None, "agreed": "",
        },
        "generation": [
            {
                "prompt": "Once upon a time", "original": told + "She had a red ball.\nEvery day she played.",
                "compressed": told + "She liked to sing.\nEvery night she sang.", "first_divergence": 18,
                "repetition_original": 0.05, "repetition": 0.08, "distinct_2_original": 0.93, "distinct_2": 0.9,
            },
            {
                "prompt": "The cat", "original": " sat on the mat.", "compressed": " sat on the mat.",
                "first_divergence": None,
            },
        ],
        "verdict": ["Nothing is wrong: the drift grows evenly with depth."],
    }  # fmt: skip


def profile(artifact: Path) -> dict[str, Any]:
    """A profile of the model with three recipes for every tensor and a few measurements."""
    manifest = open_artifact(artifact).manifest
    candidates = {"int3:g16": 4.0, "int4:g16": 5.0, "int8:row": 8.5}
    tensors, measured = [], []
    for number, (name, entry) in enumerate(manifest.weights.items()):
        numel = math.prod(entry.shape)
        difficulty = (2 + math.sin(number)) * 1e-6
        options = [
            {"recipe": recipe, "bytes": int(numel * bpw / 8), "loss": difficulty * numel * 4 ** (4 - bpw)}
            for recipe, bpw in candidates.items()
        ]
        shape = list(entry.shape)
        tensors.append(
            {"name": name, "dtype": "F32", "shape": shape, "bytes": 4 * numel, "group": name, "options": options}
        )
        if number % 2:
            option = options[number % 3]
            told = {"tensor": name, "recipe": option["recipe"], "predicted": option["loss"]}
            measured.append({**told, "kl": option["loss"] * (1.1 + 0.3 * math.cos(number))})
    source = {"name": manifest.source.name, "sha256": manifest.source.sha256, "text": "calibration.txt"}
    return {
        "source": {**source, "parameters": manifest.source.parameters, "tokens": 1000},
        "candidates": list(candidates), "tensors": tensors, "measured": measured,
    }  # fmt: skip


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path
