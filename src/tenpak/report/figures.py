"""The figures on what an artifact is like inside: by block and kind, by depth, predicted against measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from tenpak.report.contents import Contents, Stored, short_kinds
from tenpak.report.figure import (
    COLOURS,
    DASHES,
    LEGEND,
    SYMBOLS,
    Figure,
    axis,
    heat_map,
    is_wide,
    log_axis,
    plain,
    raised,
)
from tenpak.report.inputs import Diagnosis, Finding, Layer, Loss

__all__ = ["bits_map", "damage_map", "drift", "peaks", "predicted_losses"]


def bits_map(contents: Contents) -> Figure | None:
    """Bits per weight by block and kind of matrix; None without blocks."""
    matrices = [tensor for tensor in contents.tensors.values() if tensor.is_matrix and tensor.place.block is not None]

    def rate(group: Sequence[Stored]) -> float:
        return 8 * sum(t.bytes for t in group) / sum(max(t.numel, 1) for t in group)

    cells = _cells(matrices, rate)
    if not cells:
        return None
    low, high = min(cells, key=lambda key: cells[key]), max(cells, key=lambda key: cells[key])
    summary = (
        f"From {cells[low]:.2f} (block {low[0]}, {low[1]}) to {cells[high]:.2f} (block {high[0]}, {high[1]}), "
        "headers apart."
    )
    return heat_map("bits", "Bits per weight", summary, cells, ".2f", ("block", "bits per weight"))


def damage_map(contents: Contents, diagnosis: Diagnosis) -> list[Figure]:
    """Relative error and measured loss by block and kind, as far as the diagnosis tells them."""
    findings = {finding.name: finding for finding in diagnosis.weights}
    figures = []
    errors = _damage(contents, findings, "relative_error")
    if errors:
        summary = f"{_worst(errors, '.3f')} Of the weights, not of what they compute."
        words = ("block", "relative error")
        figures.append(heat_map("relative-error", "Relative error of the weights", summary, errors, ".3f", words))
    losses = _damage(contents, findings, "kl")
    if losses:
        exponent = 3 * math.floor(math.log10(max(*losses.values(), 1e-12)) / 3)
        unit = "nats per token" if exponent == 0 else f"10{raised(exponent)} nats per token"
        scaled = {cell: loss / 10.0**exponent for cell, loss in losses.items()}
        spec = f".{max(0, 2 - math.floor(math.log10(max(*scaled.values(), 1.0))))}f"
        summary = f"In {unit}, with this weight alone compressed. {_worst(scaled, spec)} Blank: not measured."
        figures.append(heat_map("kl", "KL divergence by weight", summary, scaled, spec, ("block", unit)))
    return figures


def _worst(cells: Mapping[tuple[str, str], float], spec: str) -> str:
    block, kind = max(cells, key=lambda cell: cells[cell])
    return f"At most {format(cells[block, kind], spec)} (block {block}, {kind})."


def _damage(contents: Contents, findings: Mapping[str, Finding], key: str) -> dict[tuple[str, str], float]:
    def value(group: Sequence[Stored]) -> float:
        known = [(getattr(findings[t.name], key), t.numel) for t in group]
        if key == "kl":
            return float(sum(v for v, _ in known))
        return float(sum(v * n for v, n in known) / sum(n for _, n in known))

    told = [
        tensor
        for tensor in contents.tensors.values()
        if tensor.place.block is not None
        and tensor.name in findings
        and getattr(findings[tensor.name], key) is not None
    ]
    return _cells(told, value)


def _cells(tensors: Sequence[Stored], value: Callable[[Sequence[Stored]], float]) -> dict[tuple[str, str], float]:
    """(block, kind) → value of the tensors there."""
    short = short_kinds(tensor.place.part for tensor in tensors)
    groups: dict[tuple[int, str], list[Stored]] = defaultdict(list)
    for tensor in tensors:
        assert tensor.place.block is not None  # callers leave out the rest
        groups[tensor.place.block, short[tensor.place.part]].append(tensor)
    order = {kind: number for number, kind in enumerate(short.values())}
    keys = sorted(groups, key=lambda key: (key[0], order[key[1]]))
    return {(str(block), kind): value(groups[block, kind]) for block, kind in keys}


def drift(layers: Sequence[Layer], culprit: str = "") -> Figure | None:
    """Relative error and cosine distance of the hidden state by depth; None where there is nothing to draw."""
    layers = sorted(layers, key=lambda layer: layer.depth)
    errors = [layer.relative_error for layer in layers]
    distances = [None if layer.cosine is None else max(1 - layer.cosine, 0.0) for layer in layers]
    known = [value for value in (*errors, *distances) if value is not None]
    if not known:
        return None
    depth = [layer.depth for layer in layers]
    names = [plain(layer.name) for layer in layers]
    data = [
        _line("relative error", depth, errors, names, 0),
        _line("1 − cosine", depth, distances, names, 1),
    ]
    marked = [(layer.depth, layer.relative_error) for layer in layers if layer.name == culprit]
    annotations = [
        {
            "x": x, "y": math.log10(y) if is_wide(known) else y, "text": "largest step", "showarrow": True, "ay": -34,
            "ax": 0,
        }
        for x, y in marked
        if y is not None and y > 0
    ]  # fmt: skip
    final = next((value for value in reversed(errors) if value is not None), None)
    summary = "" if final is None else f"After the last block the relative error is {final:.3g}."
    layout = {
        "xaxis": axis("block", dtick=max(1, math.ceil(len(layers) / 12))),
        "yaxis": log_axis("", known, 0.12) if is_wide(known) else axis("", rangemode="tozero"),
        "legend": LEGEND,
        "annotations": annotations,
    }
    return Figure("drift", "Hidden state: distance from the original's", summary, data, layout, 340)


def peaks(layers: Sequence[Layer]) -> Figure | None:
    """The largest value of the hidden state by depth, of both models; None where there is nothing to draw."""
    layers = sorted(layers, key=lambda layer: layer.depth)
    if not any(layer.peak is not None and layer.peak_original is not None for layer in layers):
        return None
    depth = [layer.depth for layer in layers]
    names = [plain(layer.name) for layer in layers]
    data = [
        _line("original", depth, [layer.peak_original for layer in layers], names, 2),
        _line("compressed", depth, [layer.peak for layer in layers], names, 0),
    ]
    layout = {
        "xaxis": axis("block", dtick=max(1, math.ceil(len(layers) / 12))),
        "yaxis": axis("largest |x| ÷ root mean square", rangemode="tozero"),
        "legend": LEGEND,
    }
    summary = "The largest value of the hidden state, in units of its root mean square."
    return Figure("peaks", "Hidden state: largest values", summary, data, layout, 340)


def _line(name: str, x: Sequence[int], y: Sequence[float | None], text: Sequence[str], number: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "text": list(text),
        "hovertemplate": "%{text}<br>" + name + " %{y:.4g}<extra></extra>",
        "line": {"color": f"@c{number}", "dash": DASHES[number % 4], "width": 2},
        "marker": {"color": f"@c{number}", "symbol": SYMBOLS[number % 8], "size": 9},
    }


def _symbol(number: int) -> str:
    """Symbols that differ for longer than colours do."""
    return SYMBOLS[(number + number // 8) % 8] + ("-open" if number >= 8 else "")


def predicted_losses(pairs: Sequence[Loss]) -> Figure | None:
    """Predicted against measured loss of tensors on equal logarithmic axes; None where there is nothing to draw."""
    pairs = [pair for pair in pairs if pair.predicted > 0 and pair.measured > 0]
    if not pairs:
        return None
    recipes = list(dict.fromkeys(pair.recipe for pair in pairs))
    every = [value for pair in pairs for value in (pair.predicted, pair.measured)]
    ends = [min(every) / 1.6, max(every) * 1.6]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "x": ends, "y": ends, "name": "equal", "hoverinfo": "skip",
            "line": {"color": "@muted", "dash": "dot", "width": 1.5},
        }
    ]  # fmt: skip
    for number, recipe in enumerate(recipes):
        here = [pair for pair in pairs if pair.recipe == recipe]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(recipe),
                "x": [pair.predicted for pair in here],
                "y": [pair.measured for pair in here],
                "text": [plain(pair.name) for pair in here],
                "hovertemplate": "%{text}<br>predicted %{x:.3g}, measured %{y:.3g}<extra></extra>",
                "marker": {"color": f"@c{number % COLOURS}", "symbol": _symbol(number), "size": 9},
            }
        )
    middle = median(pair.measured / pair.predicted for pair in pairs)
    summary = (
        f"{len(pairs)} measurements; the median of measured ÷ predicted is {middle:.2f}. On the dotted "
        "line both are equal."
    )
    layout = {
        "xaxis": log_axis("predicted, nats per token", every, 0.1),
        "yaxis": log_axis("measured, nats per token", every, 0.1),
        "legend": LEGEND,
    }
    return Figure("losses", "Loss of each tensor: predicted against measured", summary, data, layout, 440)
