"""A figure of a page: a plotly.js specification as plain data; nothing is drawn here.

Conventions that ``page.js`` relies on: a colour that begins with ``@`` names a variable of the page's style sheet, so
that figures follow light, dark and print; text that comes from outside (names of tensors, recipes, models) goes through
``plain``, because plotly reads a subset of HTML in labels. Colour never stands alone: there is a symbol, a pattern, a
dash or a number with it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenpak.report.card import size
from tenpak.report.contents import short_kinds

__all__ = [
    "COLOURS",
    "DASHES",
    "LEGEND",
    "PATTERNS",
    "SYMBOLS",
    "Figure",
    "axis",
    "heat_map",
    "is_wide",
    "log_axis",
    "loss_axis",
    "pattern",
    "plain",
    "raised",
    "size_axis",
]

COLOURS = 8  # @c0 … @c7 in the style sheet
PATTERNS = ("", "/", "x", "-", ".", "\\", "+", "|")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
_SEQUENTIAL = [[number / 4, f"@h{number}"] for number in range(5)]
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ROW = 24  # height of a heat map's row, pixels


@dataclass(frozen=True)
class Figure:
    """A figure: plotly traces and layout, its height in pixels, and what it shows, for those who cannot see it.

    On a wide screen two stand side by side, unless ``place`` says ``wide`` or ``third``.
    """

    id: str
    title: str
    summary: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int
    place: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "data": list(self.data), "layout": {**self.layout, "height": self.height}}


def pattern(shape: str | Sequence[str], colour: str | Sequence[str]) -> dict[str, Any]:
    """Shapes of ``PATTERNS`` over the colours of areas."""
    # Not fillmode "overlay": there plotly.js complains of a list of colours.
    return {"shape": shape, "size": 9, "solidity": 0.12, "fgcolor": "@surface", "fgopacity": 0.45, "bgcolor": colour}


def plain(text: str) -> str:
    """Text as plotly shows it literally."""
    return html.escape(text, quote=False).replace("\n", " ")


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def is_wide(values: Sequence[float]) -> bool:
    """Whether numbers are better drawn by their logarithms."""
    return min(values) > 0 and max(values) > 12 * min(values)


def heat_map(
    key: str, title: str, summary: str, cells: Mapping[tuple[str, str], float], spec: str, words: tuple[str, str]
) -> Figure:
    """(row, column) → number as a table of colours with the numbers in it; ``words`` name a row and the number."""
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    order = list(short_kinds(columns).values())
    columns.sort(key=lambda column: order.index(column) if column in order else len(order))
    values = [[cells.get((row, column)) for column in columns] for row in rows]
    texts = [["" if v is None else format(v, spec) for v in line] for line in values]
    row_word, unit = words
    names = [plain(column) for column in columns]
    trace = {
        "type": "heatmap",
        "x": names,
        "y": [plain(row) for row in rows],
        "z": values,
        "text": texts,
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "hovertemplate": f"{row_word} %{{y}}, %{{x}}<br>%{{text}} {unit}<extra></extra>",
        "colorscale": _SEQUENTIAL,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
        "hoverongaps": False,
    }
    layout = {
        "xaxis": {
            "type": "category",
            "side": "top",
            "showgrid": False,
            "fixedrange": True,
            "tickfont": {"size": 11},
        },
        "yaxis": axis(row_word, type="category", autorange="reversed", showgrid=False, fixedrange=True),
        "margin": {"l": 48, "r": 4, "t": 40, "b": 8},
    }
    return Figure(key, title, summary, [trace], layout, 70 + max(_ROW * len(rows), 60))


def size_axis(xs: Sequence[float]) -> dict[str, Any]:
    """An axis of bytes with round sizes at its ticks, logarithmic where sizes are far apart."""
    low, high = min(xs), max(xs)
    if high > 4 * low > 0:
        return log_axis("bytes of weight files", xs, 0.2, size)
    width = high - low or 0.1 * high or 1.0
    ends = [low - 0.15 * width, high + 0.25 * width]
    ticks = _round_numbers(*ends)
    texts = [size(round(tick)) for tick in ticks]
    if len(set(texts)) < len(texts):
        texts = [f"{tick:,.0f}" for tick in ticks]
    return axis("bytes of weight files", range=ends, tickvals=ticks, ticktext=texts)


def loss_axis(ys: Sequence[float], title: str) -> dict[str, Any]:
    """An axis of losses, from zero or, where they are far apart, logarithmic."""
    if is_wide(ys):
        return log_axis(title, ys, 0.15)
    top = max(ys) or 1.0
    return axis(title, range=[-0.08 * top, 1.25 * top], zeroline=True)


def log_axis(
    title: str, values: Sequence[float], pad: float, text: Callable[[int], str] | None = None
) -> dict[str, Any]:
    """A logarithmic axis around positive values, with powers of ten at its ticks, or also 2 and 5 times these.

    Args:
        title: of the axis.
        values: all positive.
        pad: how much wider than the values it is, as a part of their width.
        text: writes a tick; by default as a plain or a scientific number.
    """
    low, high = math.log10(min(values)), math.log10(max(values))
    wider = max(pad * (high - low), 0.1)
    low, high = low - wider, high + wider
    exponents = range(math.floor(low), math.ceil(high) + 1)
    powers = [e for e in exponents if low <= e <= high]
    factors = (1,) if len(powers) > 2 else (1, 2, 5)
    ticks = [(factor, e) for e in exponents for factor in factors if low <= math.log10(factor) + e <= high]
    return axis(
        title,
        type="log",
        range=[low, high],
        tickvals=[factor * 10.0**e for factor, e in ticks],
        ticktext=[_power(factor, e) if text is None else text(round(factor * 10.0**e)) for factor, e in ticks],
    )


def _power(factor: int, exponent: int) -> str:
    if -4 <= exponent <= 3:
        return f"{factor * 10.0**exponent:.{max(-exponent, 0)}f}"
    power = f"10{raised(exponent)}"
    return power if factor == 1 else f"{factor}·{power}"


def raised(exponent: int) -> str:
    """An exponent in raised digits."""
    return str(exponent).translate(_RAISED)


def _round_numbers(low: float, high: float) -> list[float]:
    """Round numbers between two others, about five."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
