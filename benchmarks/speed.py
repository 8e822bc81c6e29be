"""Encode and decode speed of codecs on one 4096 × 4096 FP32 Gaussian matrix: median of several, weights per second.

And that of a product with one input, made from the runtime form (``runtime="memory"``).
"""

from __future__ import annotations

from typing import Any

import torch
from trellis import timed

from tenpak.codecs.base import Codec, Payload, Statistics
from tenpak.recipes import parse

RECIPES = ("int4:g32", "int8:row", "int3:g32", "int4:g32:search", "int4:g16+int2:g16", "nf4:g64", "nf4:g64:learned")
CALIBRATED = ("gptq-int4:g128", "gptq-int4:g32", "gptq-int3:g128")
SLOW = ("vq4x256", "lowrank128:int8", "lowrank128:int8+gptq-int2:g128:search~10")  # once each
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
            "encode_weights_per_second": weight.numel() / timed(lambda c=codec: c.encode(weight), repeats)[1],
            "decode_weights_per_second": weight.numel() / timed(lambda c=codec, p=payload: c.decode(p), REPEATS)[1],
            "product_weights_per_second": weight.numel() / _product(codec, payload),
            "bpw": payload.bits / weight.numel(),
        }
    rows |= {recipe: _calibrated(recipe, weight, 3) for recipe in CALIBRATED}
    rows |= {recipe: _calibrated(recipe, weight, 1) for recipe in SLOW}
    return {"matrix": [SIDE, SIDE], "dtype": "float32", "threads": threads, "recipes": rows}


def _calibrated(recipe: str, weight: torch.Tensor, repeats: int) -> dict[str, float]:
    """A recipe that may need statistics: those of correlated inputs."""
    codec = parse(recipe)
    assert codec is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * SIDE, SIDE, generator=generator) * torch.rand(SIDE, generator=generator)
    x += torch.randn(2 * SIDE, 1, generator=generator)
    statistics = Statistics(hessian=x.T @ x / len(x))
    if repeats > 1:
        codec.encode(weight, statistics)  # the first call of anything is slow
    payload, seconds = timed(lambda: codec.encode(weight, statistics), repeats)
    return {
        "encode_seconds": seconds,
        "encode_weights_per_second": weight.numel() / seconds,
        "decode_weights_per_second": weight.numel() / timed(lambda: codec.decode(payload), REPEATS)[1],
        "product_weights_per_second": weight.numel() / _product(codec, payload),
        "bpw": payload.bits / weight.numel(),
    }


def _product(codec: Codec, payload: Payload) -> float:
    """Seconds of a product with one input, at its second use."""
    x, prepared = torch.randn(1, SIDE, generator=torch.Generator().manual_seed(2)), codec.prepare(payload)
    codec.matmul(x, prepared)
    return timed(lambda: codec.matmul(x, prepared), REPEATS)[1]
