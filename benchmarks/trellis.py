"""The flagship codec on normal weights: how near to the bound of rate and distortion, and how fast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from tenpak.codecs.base import Statistics
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.trellis_stream import SEGMENT, read
from tenpak.kernels import core

SIZE = 4096


def run() -> dict[str, Any]:
    return {"speed": speed(), "gaussian": gaussian()}


def gaussian() -> dict[str, Any]:
    """Real bytes of independent normal weights against ½·log2(variance / squared error)."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rows = {}
    for bits, step in ((2, 0.571), (3, 0.2785), (4, 0.1382)):
        payload, seconds = timed(lambda step=step: Trellis(step, calibrated=False).encode(weight))
        decoded = Trellis(step, calibrated=False).decode(payload)
        rate = payload.bits / weight.numel()
        error = float((weight - decoded).double().square().mean() / weight.double().square().mean())
        ideal = entropy(payload.tensors["stream"], step)
        rows[bits] = {
            "bits_per_weight": rate,
            "above_bound": rate + math.log2(error) / 2,
            "over_conditional_entropy": rate / ideal - 1,
            "encode_seconds": seconds,
        }
    return {"shape": [SIZE, SIZE], "bits": rows}


def entropy(stream: torch.Tensor, step: float) -> float:
    """Bits per level that an ideal coder would need who knew how often each index occurs in each quantizer."""
    levels = read(stream, (SIZE, SIZE), step, 256).levels
    zero = torch.zeros(SIZE, dtype=torch.int32)
    counts = core.histogram(levels, zero, zero, 256, SEGMENT, 128).double().view(-1, 128)[:2]
    shares = counts / counts.sum(1, keepdim=True)
    bits = -(counts * shares.clamp(1e-300).log2()).sum() + counts[:, 1:].sum()  # and a sign where there is one
    return float(bits) / levels.numel()


def speed() -> dict[str, Any]:
    """Encode with feedback on all threads, decode on one; the median of three."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator) * 0.02
    inputs = torch.randn(2 * SIZE, SIZE, generator=generator) * (1 + torch.arange(SIZE) % 7)
    known = Statistics(
        count=len(inputs), hessian=inputs.T @ inputs / len(inputs), output_curvature=torch.full((SIZE,), 1e-4)
    )
    codec = Trellis(3e-4)
    payload, encode = timed(lambda: codec.encode(weight, known), repeat=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decode = timed(lambda: codec.prepare(payload), repeat=3)[1]
    finally:
        torch.set_num_threads(threads)
    return {
        "shape": [SIZE, SIZE],
        "threads": threads,
        "bits_per_weight": payload.bits / weight.numel(),
        "encode_weights_per_second": weight.numel() / encode,
        "decode_weights_per_second_and_core": weight.numel() / decode,
    }


def timed(work: Callable[[], Any], repeat: int = 1) -> tuple[Any, float]:
    """A result and the median of the seconds that it took."""
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - started)
    return found, sorted(seconds)[len(seconds) // 2]
