"""Several artifacts against each other: which are beaten, and the figures of a comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenpak.report.contents import Contents, short_kinds
from tenpak.report.figure import (
    COLOURS,
    LEGEND,
    PATTERNS,
    SYMBOLS,
    Figure,
    axis,
    heat_map,
    loss_axis,
    pattern,
    plain,
    size_axis,
)
from tenpak.report.treemap import Legend

__all__ = ["Entry", "bit_bars", "entries", "kind_map", "overview", "rivals"]


@dataclass(frozen=True)
class Entry:
    """An artifact of a comparison.

    Attributes:
        letter: what the figures call it.
        name: what the tables call it.
        contents: all of it.
        beaten_by: letters of those of the same source and text that are no larger and no further from the original,
            and better in one of both.
    """

    letter: str
    name: str
    contents: Contents
    beaten_by: tuple[str, ...] = ()

    @property
    def kl(self) -> float | None:
        """Nats per token; None where it was not measured."""
        return None if self.contents.quality is None else self.contents.quality.kl


def entries(artifacts: Sequence[Contents]) -> list[Entry]:
    """Artifacts grouped by source, in the order in which sources come, by falling size within."""
    sources = list(dict.fromkeys(contents.manifest.source.sha256 for contents in artifacts))
    ordered = sorted(artifacts, key=lambda c: (sources.index(c.manifest.source.sha256), -c.report.bytes))
    names = [contents.name for contents in ordered]
    found = [
        Entry(_letter(number), c.name if names.count(c.name) == 1 else c.report.artifact, c)
        for number, c in enumerate(ordered)
    ]
    return [replace(entry, beaten_by=tuple(other.letter for other in found if _beats(other, entry))) for entry in found]


def _letter(number: int) -> str:
    """A, B … Z, AA and so on."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(65 + digit) + text
    return text


def _beats(one: Entry, other: Entry) -> bool:
    a, b = one.contents, other.contents
    if a.quality is None or b.quality is None or a.quality.kl is None or b.quality.kl is None:
        return False
    if a.manifest.source.sha256 != b.manifest.source.sha256 or a.quality.text_sha256 != b.quality.text_sha256:
        return False
    first, second = (a.report.bytes, a.quality.kl), (b.report.bytes, b.quality.kl)
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def rivals(group: Sequence[Entry], number: int) -> Figure | None:
    """KL against bytes of the artifacts of one source; None where none was measured."""
    known = [entry for entry in group if entry.kl is not None]
    if not known:
        return None
    xs, ys = [float(entry.contents.report.bytes) for entry in known], [entry.kl or 0.0 for entry in known]
    data = [_front(known, xs), _lettered(known, xs, "bytes", ",")]
    source = group[0].contents.manifest.source.name
    layout = {
        "xaxis": size_axis(xs),
        "yaxis": loss_axis(ys, "KL divergence, nats per token"),
        "showlegend": False,
    }
    best = [entry.letter for entry in known if not entry.beaten_by]
    summary = f"Lower left is better. Nothing here beats {', '.join(best)}."
    return Figure(f"rivals-{number}", f"Loss against size: {source}", summary, data, layout, 400)


def overview(groups: Sequence[Sequence[Entry]]) -> Figure | None:
    """KL against bits per weight, a symbol for each source; None where fewer than two sources were measured."""
    measured = [[entry for entry in group if entry.kl is not None] for group in groups]
    if sum(bool(group) for group in measured) < 2:
        return None
    data = []
    for number, group in enumerate(measured):
        group = sorted(group, key=lambda entry: bool(entry.beaten_by))  # the legend shows the first
        if group:
            xs = [entry.contents.report.bpw for entry in group]
            trace = _lettered(group, xs, "bits per weight", ".3f", number)
            data.append({**trace, "name": plain(group[0].contents.manifest.source.name), "showlegend": True})
    every = [entry for group in measured for entry in group]
    layout = {
        "xaxis": axis("bits per weight, everything counted"),
        "yaxis": loss_axis([entry.kl or 0.0 for entry in every], "KL divergence, nats per token"),
        "legend": LEGEND,
    }
    summary = "Lower left is better; what models of different sizes lose compares only roughly."
    return Figure("overview", "All sources: loss against bits per weight", summary, data, layout, 440, "wide")


def bit_bars(every: Sequence[Entry]) -> tuple[Figure, tuple[Legend, ...]]:
    """What the bits per weight of each artifact are spent on: codecs, dense tensors, headers; and what is which."""
    spent: dict[str, dict[str, float]] = defaultdict(dict)
    for entry in every:
        parameters = entry.contents.report.parameters
        for item in entry.contents.bill.items:
            name = {"dense": f"dense {item.name}", "header": "headers"}.get(item.what, item.name)
            found = spent[name]
            found[entry.letter] = found.get(entry.letter, 0.0) + 8 * item.bytes / max(parameters, 1)
    names = sorted(spent, key=lambda name: (name == "headers", name.startswith("dense "), -sum(spent[name].values())))
    letters = [entry.letter for entry in every]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": plain(name),
            "y": letters,
            "x": [spent[name].get(letter, 0.0) for letter in letters],
            "hovertemplate": "%{y}: %{x:.3f} bits per weight<extra>" + "%{fullData.name}</extra>",
            "marker": {
                "color": f"@c{min(number, COLOURS - 1)}",
                "line": {"color": "@surface", "width": 1},
                "pattern": pattern(PATTERNS[min(number, COLOURS - 1)], f"@c{min(number, COLOURS - 1)}"),
            },
        }
        for number, name in enumerate(names)
    ]
    layout = {
        "barmode": "stack",
        "xaxis": axis("bits per weight, everything counted"),
        "yaxis": {"type": "category", "autorange": "reversed", "fixedrange": True},
        "showlegend": False,
    }
    summary = "The whole of a bar is the artifact's size in bits per weight."
    names_of = tuple(Legend(name, min(number, COLOURS - 1)) for number, name in enumerate(names))
    return Figure("bars", "What the bits are spent on", summary, data, layout, 80 + 34 * len(every)), names_of


def kind_map(every: Sequence[Entry]) -> Figure | None:
    """Bits per weight of each kind of matrix, artifact by artifact; None without matrices."""
    parts = {t.place.part for entry in every for t in entry.contents.tensors.values() if t.is_matrix}
    if not parts:
        return None
    short = short_kinds(sorted(parts))
    cells: dict[tuple[str, str], float] = {}
    for entry in every:
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for tensor in entry.contents.tensors.values():
            if tensor.is_matrix:
                counts = found[short[tensor.place.part]]
                counts[0] += 8 * tensor.bytes
                counts[1] += tensor.numel
        cells |= {(entry.letter, kind): bits / max(n, 1) for kind, (bits, n) in found.items()}
    title = "Bits per weight by kind of matrix"
    return heat_map("kinds", title, "Headers apart.", cells, ".2f", ("artifact", "bits per weight"))


def _lettered(group: Sequence[Entry], xs: Sequence[float], unit: str, spec: str, number: int = 0) -> dict[str, Any]:
    """Points with letters; those that are beaten are hollow."""
    symbol = SYMBOLS[number % len(SYMBOLS)]
    errors = [0.0 if e.contents.quality is None else e.contents.quality.kl_se or 0.0 for e in group]
    colour = f"@c{number % COLOURS}"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": list(xs),
        "y": [entry.kl for entry in group],
        "text": [f"<b>{entry.letter}</b>" for entry in group],
        "textposition": "top right",
        "customdata": [f"{entry.letter}: {plain(entry.name)}" for entry in group],
        "hovertemplate": "%{customdata}<br>%{x:" + spec + "} " + unit + ", KL %{y:.5f}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": [symbol if not entry.beaten_by else f"{symbol}-open" for entry in group],
            "size": 12,
            "line": {"width": 2, "color": colour},
        },
        "error_y": {"type": "data", "array": errors, "color": colour, "thickness": 1.5, "width": 0},
    }


def _front(group: Sequence[Entry], xs: Sequence[float]) -> dict[str, Any]:
    """A line through those that nothing beats."""
    best = sorted((x, entry.kl) for x, entry in zip(xs, group, strict=True) if not entry.beaten_by)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in best],
        "y": [y for _, y in best],
        "line": {"color": "@muted", "dash": "dash", "width": 1.5},
        "hoverinfo": "skip",
    }
