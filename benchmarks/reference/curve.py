"""The loss of a training by its tokens, as SVG without any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["curve", "points"]

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 50
COLOURS = {"training": "#2b6cb0", "validation": "#c03a2b"}
Points = Sequence[tuple[float, float]]


def points(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Tokens in millions and loss in nats per token, of the lines of a log."""
    names = {"training": "loss", "validation": "validation"}
    return {
        name: [(line["tokens"] / 1e6, line[field]) for line in log if field in line] for name, field in names.items()
    }


def curve(title: str, series: Mapping[str, Points]) -> str:
    """Both losses in one picture; an axis from zero for tokens, one around the data for losses."""
    everything = [point for points_ in series.values() for point in points_]
    right = max((x for x, _ in everything), default=0.0) or 1.0
    low = math.floor(min((y for _, y in everything), default=0.0))
    high = max(math.ceil(max((y for _, y in everything), default=0.0)), low + 1)

    def x(at: float) -> float:
        return LEFT + at / right * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (loss - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(low, high + 1):
        lines.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(_text(LEFT - 8, y(loss) + 4, str(loss), "end"))
    lines += [_text(x(at), HEIGHT - BOTTOM + 18, f"{at:.3g}", "middle") for at in _ticks(right)]
    lines.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, "million tokens", "middle"))
    lines.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">loss, nats per token</text>'
    )
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x(at):.1f},{y(loss):.1f}" for at, loss in line)
        colour = COLOURS.get(name, "#222")
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if name == "validation":  # few points: each is marked
            lines += [f'<circle cx="{x(at):.1f}" cy="{y(loss):.1f}" r="3.5" fill="{colour}"/>' for at, loss in line]
        lines.append(_text(WIDTH - RIGHT - 10, TOP + 18 + 18 * number, name, "end", colour))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _ticks(end: float) -> list[float]:
    """From 0 to ``end`` in four to ten steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(end))
    step = power * (0.1 if end < 2 * power else 0.5 if end < 5 * power else 1)
    step *= 2 if end / step > 10 else 1
    return [step * number for number in range(int(end / step * (1 + 1e-9)) + 1)]


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
