"""Encode and decode speed of codecs on one 4096 × 4096 FP32 Gaussian matrix: median of several, weights per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tenpak.codecs.base import Statistics
from tenpak.recipes import parse

RECIPES = ("int4:g32", "int8:row", "int3:g32", "int4:g32:search", "int4:g16+int2:g16", "nf4:g64", "nf4:g64:learned")
CALIBRATED = ("gptq-int4:g128", "gptq-int4:g32", "gptq-int3:g128")
SIDE = 4096
REPEATS = 7


def run(threads: int = 2) -> dict[str, Any]:
    torch.set_num_threads(threads)
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.02
    rows = {}
    for recipe in RECIPES:
        codec = parse(recipe)
        assert codec is not None
        payload = codec.encode(weight)
        repeats = 3 if "search" in recipe or "learned" in recipe else REPEATS
        rows[recipe] = {
            "encode_weights_per_second": weight.numel() / _median(lambda c=codec: c.encode(weight), repeats),
            "decode_weights_per_second": weight.numel() / _median(lambda c=codec, p=payload: c.decode(p), REPEATS),
            "bpw": payload.bits / weight.numel(),
        }
    rows |= {recipe: _calibrated(recipe, weight) for recipe in CALIBRATED}
    return {"matrix": [SIDE, SIDE], "dtype": "float32", "threads": threads, "recipes": rows}


def _calibrated(recipe: str, weight: torch.Tensor) -> dict[str, float]:
    """A recipe that needs statistics: those of correlated inputs."""
    codec = parse(recipe)
    assert codec is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * SIDE, SIDE, generator=generator) * torch.rand(SIDE, generator=generator)
    x += torch.randn(2 * SIDE, 1, generator=generator)
    statistics = Statistics(hessian=x.T @ x / len(x))
    payload = codec.encode(weight, statistics)
    seconds = _median(lambda: codec.encode(weight, statistics), 3)
    return {
        "encode_seconds": seconds,
        "encode_weights_per_second": weight.numel() / seconds,
        "decode_weights_per_second": weight.numel() / _median(lambda: codec.decode(payload), REPEATS),
        "bpw": payload.bits / weight.numel(),
    }


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
