"""Loss against size of one artifact: among what a profile predicts, and among what a search tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tenpak.allocation.budget import Budget
from tenpak.allocation.profile import Profile
from tenpak.errors import BudgetError
from tenpak.report.card import size
from tenpak.report.contents import Contents, short_recipe
from tenpak.report.figure import LEGEND, Figure, axis, loss_axis, plain, size_axis

__all__ = ["frontier", "searched"]

_APART = (0.2, 0.06)  # labels of points that are nearer, as parts of the figure, would overlap
_LABEL = (0.12, 0.1)  # what a label may cover, up and to the right of its point
_PRICES = 60  # of a byte in nats: points along the predicted frontier


def frontier(contents: Contents, profile: Profile | None) -> Figure | None:
    """KL against bytes: this artifact, the original, and what a profile predicts; None where nothing was measured.

    With a profile the scale is logarithmic, and the original, which loses nothing, cannot be on it.
    """
    quality = contents.quality
    uniform, best = _predicted(contents, profile) if profile is not None else ({}, [])
    measured = quality is not None and quality.kl is not None
    if not measured and not best:
        return None
    data: list[dict[str, Any]] = []
    if best:
        data.append(_predicted_line(best))
    if uniform:
        data.append(_points("one recipe everywhere, predicted", uniform, 1, "square-open"))
    report = contents.report
    if measured and quality is not None:
        label = f"{report.ratio_fp32:.2f}×"
        here = _points("this artifact, measured", {label: (report.bytes, quality.kl or 0.0)}, 0, "star")
        here |= {"marker": {**here["marker"], "size": 16}, "textposition": "bottom right"}
        if quality.kl_se is not None:
            here["error_y"] = {"type": "data", "array": [quality.kl_se], "color": "@c0", "thickness": 1.5, "width": 5}
        data.append(here)
    if not best:
        data.append(_points("the original", {"the original": (contents.manifest.source.bytes, 0.0)}, 2, "diamond"))
    _place_labels(data)
    xs, ys = ([value for trace in data for value in trace[key]] for key in "xy")
    layout = {
        "xaxis": size_axis(xs),
        "yaxis": loss_axis(ys, "KL divergence, nats per token"),
        "legend": LEGEND,
    }
    summary = "Lower left is better."
    if measured and quality is not None:
        summary += f" {size(report.bytes)} at {quality.kl:.5f} nats per token."
    return Figure("frontier", "Loss against size", summary, data, layout, 380, "wide" if best else "")


def _place_labels(data: Sequence[dict[str, Any]]) -> None:
    """Keep labels within the figure, apart from each other and off other points; the last traces' go first."""
    xs, ys = ([value for trace in data for value in trace[key]] for key in "xy")
    wide = min(ys) > 0
    width, height = max(xs) - min(xs) or 1.0, (math.log(max(ys) / min(ys)) if wide else max(ys) - min(ys)) or 1.0
    labelled = [trace for trace in data if "text" in trace]
    where = [
        [(x / width, (math.log(y) if wide else y) / height) for x, y in zip(trace["x"], trace["y"], strict=True)]
        for trace in labelled
    ]
    points = [point for places in where for point in places]
    taken: list[tuple[float, float]] = []
    for trace, places in reversed(list(zip(labelled, where, strict=True))):
        texts, positions = [], []
        for (x, y), text in zip(places, trace["text"], strict=True):
            free = not any(abs(x - a) <= _APART[0] and abs(y - b) <= _APART[1] for a, b in taken)
            free = free and not any(0 < a - x < _LABEL[0] and 0 < b - y < _LABEL[1] for a, b in points)
            taken += [(x, y)] if free else []
            texts.append(text if free else "")
            positions.append("top center" if x > min(xs) / width + 0.7 else trace["textposition"])
        trace |= {"hovertext": trace["text"], "text": texts, "textposition": positions}


def _predicted_line(best: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best mix of recipes, predicted",
        "x": [x for x, _ in best],
        "y": [y for _, y in best],
        "line": {"color": "@muted", "dash": "dash", "width": 2},
        "hovertemplate": "%{x:,.0f} bytes, %{y:.3g} nats predicted<extra></extra>",
    }


def _predicted(
    contents: Contents, profile: Profile
) -> tuple[dict[str, tuple[float, float]], list[tuple[float, float]]]:
    """(bytes, nats) of every recipe used for all profiled tensors, and of the best mixes.

    What is not profiled keeps its bytes; losses add, as those of the profile are meant to.
    """
    tensors = [tensor for tensor in profile.tensors if tensor.name in contents.tensors and tensor.options]
    options = [{o.recipe: (o.bytes, o.loss) for o in tensor.options} for tensor in tensors]
    if not options:
        return {}, []
    rest = contents.report.bytes - sum(contents.tensors[tensor.name].bytes for tensor in tensors)
    everywhere = [recipe for recipe in options[0] if all(recipe in choice for choice in options)]

    def total(chosen: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return rest + sum(b for b, _ in chosen), sum(loss for _, loss in chosen)

    uniform = {short_recipe(r): total([choice[r] for choice in options]) for r in everywhere}
    best = set()
    for number in range(_PRICES):
        price = 10 ** (-12 + 10 * number / (_PRICES - 1))  # nats per byte
        best.add(total([min(choice.values(), key=lambda o: o[1] + price * o[0]) for choice in options]))
    positive = {key: point for key, point in uniform.items() if point[1] > 0}
    return positive, sorted(point for point in best if point[1] > 0)


def searched(contents: Contents) -> Figure | None:
    """What each trial of the search for a budget cost, against the budget; None without at least two trials."""
    search = contents.recorded.search
    if search is None:
        return None
    costs = [trial.cost for trial in search.trials if trial.cost is not None]
    values = [trial.value for trial in search.trials if trial.cost is not None]
    try:
        budget = Budget.parse(search.budget)
    except BudgetError:
        return None
    if len(costs) < 2:
        return None
    limit = budget.bytes(contents.report.parameters) if budget.is_size else budget.value
    unit = {"kl": "KL, nats per token", "ppl": "increase of perplexity"}.get(budget.kind, "bytes")
    numbers = list(range(1, len(costs) + 1))
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": numbers,
        "y": costs,
        "text": ["value unknown" if value is None else f"value {value:.6g}" for value in values],
        "hovertemplate": "trial %{x}, %{text}<br>%{y:,.6~g} " + unit + "<extra></extra>",
        "line": {"color": "@muted", "width": 1, "dash": "dot"},
        "marker": {
            "color": ["@c1"] * (len(costs) - 1) + ["@c0"],
            "symbol": ["circle-open"] * (len(costs) - 1) + ["star"],
            "size": [10] * (len(costs) - 1) + [15],
            "line": {"width": 2, "color": ["@c1"] * (len(costs) - 1) + ["@c0"]},
            "opacity": 1,
        },
        "showlegend": False,
    }
    note = {
        "x": 1, "xref": "paper", "xanchor": "right", "y": limit, "yanchor": "bottom", "showarrow": False,
        "text": f"budget {plain(search.budget)}", "font": {"color": "@muted"},
    }  # fmt: skip
    line = {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit,
        "line": {"color": "@muted", "width": 1.5, "dash": "dash"},
    }  # fmt: skip
    low, high = min(*costs, limit), max(*costs, limit)
    pad = 0.12 * (high - low) or 0.01 * high
    layout = {
        "xaxis": axis("trial", dtick=max(1, len(costs) // 10), range=[0.6, len(costs) + 0.4]),
        "yaxis": axis(unit, range=[low - pad, high + 1.6 * pad], tickformat=",.4~g" if high < 10 else ","),
        "shapes": [line],
        "annotations": [note],
    }
    summary = f"{len(costs)} trials; the last one, marked with a star, was taken."
    return Figure("search", f"How the budget of {search.budget} was met", summary, [trace], layout, 380)


def _points(name: str, points: Mapping[str, tuple[float, float]], number: int, symbol: str) -> dict[str, Any]:
    """Points with labels."""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": [x for x, _ in points.values()],
        "y": [y for _, y in points.values()],
        "text": [plain(label) for label in points],
        "textposition": "top right",
        "hovertemplate": "%{hovertext}<br>%{x:,.0f} bytes, %{y:.5g} nats per token<extra></extra>",
        "marker": {"color": f"@c{number}", "symbol": symbol, "size": 12, "line": {"width": 2, "color": f"@c{number}"}},
        "cliponaxis": False,
    }
