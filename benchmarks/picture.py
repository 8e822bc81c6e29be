"""Pictures of results, as SVG without any library: KL by size on logarithmic axes."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["frontier"]

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
# Told apart by shape as well as by colour.
STYLES = {
    "trellis": ("#0b6e4f", "circle"),
    "gptq": ("#c03a2b", "square"),
    "nearest": ("#7f5ab6", "triangle"),
    "normalfloat": ("#b7791f", "diamond"),
    "nncodec": ("#2b6cb0", "cross"),
}


def frontier(result: dict[str, Any]) -> str:
    """KL by bits per weight of all methods."""
    parameters = _parameters(result)
    series = {
        name: sorted((8 * point["bytes"] / parameters, point["kl"]) for point in points)
        for name, points in result["methods"].items()
    }
    low = 10 ** math.floor(math.log10(min(y for points in series.values() for _, y in points)))
    high = 10.0
    left, right = 1.5, 9.5

    def x(bits: float) -> float:
        return LEFT + (bits - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        part = (math.log10(min(kl, high)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>KL divergence by bits per weight, {result['model']}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for bits in range(2, 10):
        lines.append(_line(x(bits), TOP, x(bits), HEIGHT - BOTTOM))
        lines.append(_text(x(bits), HEIGHT - BOTTOM + 18, str(bits), "middle"))
    power = round(math.log10(low))
    for exponent in range(power, 2):
        lines.append(_line(LEFT, y(10.0**exponent), WIDTH - RIGHT, y(10.0**exponent)))
        lines.append(_text(LEFT - 8, y(10.0**exponent) + 4, f"{10.0**exponent:g}", "end"))
    lines.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, "bits per weight, everything in the files counted", "middle"))
    lines.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">KL, nats per token</text>'
    )
    for number, (name, points) in enumerate(series.items()):
        colour, shape = STYLES[name]
        path = " ".join(f"{x(bits):.1f},{y(kl):.1f}" for bits, kl in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines += [_mark(x(bits), y(kl), colour, shape) for bits, kl in points]
        at = TOP + 22 + 20 * number
        lines.append(_mark(WIDTH - 130, at, colour, shape))
        lines.append(_text(WIDTH - 116, at + 4, name, "start"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _parameters(result: dict[str, Any]) -> float:
    point = result["methods"]["trellis"][0]
    return 8 * point["bytes"] / point["bpw"]


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{text}</text>'


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    points = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "triangle": [(0, -5), (5, 4), (-5, 4)],
        "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
    }
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    if shape == "cross":
        return f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2.5"/>'
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points[shape])
    return f'<polygon points="{corners}" fill="{colour}"/>'
