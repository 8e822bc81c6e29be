"""Pictures of results, as SVG without any library: KL by size, on a logarithmic axis."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from findings import key

__all__ = ["findings", "frontier"]

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
# Told apart by shape as well as by colour.
STYLES = {
    "trellis": ("#0b6e4f", "circle"),
    "gptq": ("#c03a2b", "square"),
    "nearest": ("#7f5ab6", "triangle"),
    "normalfloat": ("#b7791f", "diamond"),
    "nncodec": ("#2b6cb0", "cross"),
    "grids with feedback": ("#c03a2b", "square"),
    "grids without": ("#7f5ab6", "triangle"),
    "codebooks": ("#b7791f", "diamond"),
    "sums of stages": ("#2b6cb0", "cross"),
    "low rank": ("#444444", "bar"),
    "2:4": ("#a23b72", "down"),
    "patterns": ("#777777", "ring"),
}
Points = Sequence[tuple[float, float]]


def frontier(result: dict[str, Any]) -> str:
    """KL by bits per weight of all methods."""
    point = result["methods"]["trellis"][0]
    parameters = 8 * point["bytes"] / point["bpw"]
    series = {
        name: sorted((8 * point["bytes"] / parameters, point["kl"]) for point in points)
        for name, points in result["methods"].items()
    }
    return _plot(f"KL divergence by bits per weight, {result['model']}", series, (1.5, 9.5), joined=True)


def findings(result: dict[str, Any]) -> str:
    """KL by bits per weight of every recipe for whole models, on the larger model."""
    case, rows = list(result["models"].items())[-1]
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for claim in result["claims"]:
        row = rows[key(claim["name"], claim["options"])]
        if "dense" not in claim["options"]:
            series[family(claim["options"])].append((row["bpw"], row["kl"]))
    ordered = {name: series[name] for name in STYLES if name in series}
    return _plot(f"KL divergence by bits per weight of every codec, {case}", ordered, (1.5, 11.5), joined=False)


def family(options: Sequence[str]) -> str:
    """What kind of recipe options ask for."""
    if "--target" in options:
        return "trellis"
    recipe = options[1].partition("~")[0]
    if "+" in recipe:
        return "sums of stages"
    for name, words in {
        "patterns": ("pattern",),
        "low rank": ("lowrank",),
        "2:4": ("sparse24",),
        "codebooks": ("vq", "aq"),
        "grids with feedback": ("gptq-",),
    }.items():
        if any(word in recipe for word in words):
            return name
    return "grids without"


def _plot(title: str, series: Mapping[str, Points], bits: tuple[float, float], *, joined: bool) -> str:
    low = 10 ** math.floor(math.log10(min(y for points in series.values() for _, y in points)))
    high = 10.0

    def x(at: float) -> float:
        return LEFT + (at - bits[0]) / (bits[1] - bits[0]) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        part = (math.log10(min(kl, high)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for at in range(math.ceil(bits[0]), math.floor(bits[1]) + 1):
        lines.append(_line(x(at), TOP, x(at), HEIGHT - BOTTOM))
        lines.append(_text(x(at), HEIGHT - BOTTOM + 18, str(at), "middle"))
    for exponent in range(round(math.log10(low)), 2):
        lines.append(_line(LEFT, y(10.0**exponent), WIDTH - RIGHT, y(10.0**exponent)))
        lines.append(_text(LEFT - 8, y(10.0**exponent) + 4, f"{10.0**exponent:g}", "end"))
    lines.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, "bits per weight, everything in the files counted", "middle"))
    lines.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">KL, nats per token</text>'
    )
    for number, (name, points) in enumerate(series.items()):
        colour, shape = STYLES[name]
        path = " ".join(f"{x(at):.1f},{y(kl):.1f}" for at, kl in points)
        if joined:
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines += [_mark(x(at), y(kl), colour, shape) for at, kl in points]
        at = TOP + 22 + 20 * number
        lines.append(_mark(WIDTH - 160, at, colour, shape))
        lines.append(_text(WIDTH - 146, at + 4, name, "start"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{text}</text>'


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    points = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "triangle": [(0, -5), (5, 4), (-5, 4)],
        "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
        "down": [(0, 5), (5, -4), (-5, -4)],
        "bar": [(-6, -2), (6, -2), (6, 2), (-6, 2)],
    }
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    if shape == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="none" stroke="{colour}" stroke-width="2"/>'
    if shape == "cross":
        return f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2.5"/>'
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points[shape])
    return f'<polygon points="{corners}" fill="{colour}"/>'
