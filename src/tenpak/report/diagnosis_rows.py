"""A diagnosis for people: its JSON as tables, each a header and rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tenpak.report.card import size

__all__ = ["MOST_WEIGHTS", "generation_rows", "layer_rows", "step_rows", "summary_rows", "weight_rows"]

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

MOST_WEIGHTS = 16
"""Tensors in the table of weights; the JSON has all."""


def summary_rows(diagnosis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, and how far apart it is."""
    measured = [weight["kl"] for weight in diagnosis["weights"] if weight["kl"] is not None]
    rows = [
        ("original", str(diagnosis["original"])),
        ("read", f"{diagnosis['text']}: {diagnosis['tokens']:,} tokens"),
        ("KL divergence", f"{figure(diagnosis['kl'], '.5f')} nats per token"),
    ]
    if measured:
        rows.append(("costs measured", f"{len(measured)} tensors, {sum(measured):.5f} nats per token together"))
    return rows


def layer_rows(diagnosis: Mapping[str, Any]) -> Table:
    """The outputs of the blocks, the input embedding's first."""
    embedding = diagnosis["embedding"]
    header = (
        "output of",
        "error",
        "its own",
        "cosine",
        "norm",
        "peak of the original",
        "peak",
        "outliers",
        "outliers now",
    )
    first = (embedding["name"], figure(embedding["relative_error"], ".4f"), *("" for _ in header[2:]))
    return header, [first, *(_layer(layer) for layer in diagnosis["layers"])]


def _layer(layer: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        layer["name"],
        figure(layer["relative_error"], ".4f"),
        figure(layer["own_error"], ".4f"),
        figure(layer["cosine"], ".4f"),
        "" if layer["norm_ratio"] is None else f"{layer['norm_ratio']:.3f}×",
        figure(layer["peak_original"], ".1f"),
        figure(layer["peak"], ".1f"),
        figure(layer["outliers_original"], ".3%"),
        figure(layer["outliers"], ".3%"),
    )


def weight_rows(diagnosis: Mapping[str, Any]) -> Table:
    """The tensors by their cost, measured or (marked ~) expected, the costliest first."""
    header = ("tensor", "codec", "bits", "size", "KL", "KL per MB", "error", "kurtosis", "beyond 6σ", "effective rank")
    ranked = sorted(diagnosis["weights"], key=_cost, reverse=True)
    return header, [_weight(weight) for weight in ranked[:MOST_WEIGHTS]]


def _cost(weight: Mapping[str, Any]) -> float:
    """Measured, or else expected; infinite where it is not finite."""
    found = weight["expected_kl"] if weight["kl"] is None else weight["kl"]
    return math.inf if found is None else float(found)


def _weight(weight: Mapping[str, Any]) -> tuple[str, ...]:
    cost, sign = _cost(weight), "~" if weight["kl"] is None else ""
    rank = f"{figure(weight['effective_rank'], '.0f')} of {weight['rank']}"
    return (
        weight["name"],
        weight["codec"],
        f"{weight['bits_per_weight']:.2f}",
        size(weight["bytes"]),
        f"{sign}{cost:.5f}",
        f"{sign}{1e6 * cost / weight['bytes']:.3g}",
        figure(weight["relative_error"], ".4f"),
        figure(weight["kurtosis"], ".1f"),
        figure(weight["outlier_share"], ".3%"),
        rank + (" (sampled)" if weight["sampled"] else ""),
    )


def step_rows(diagnosis: Mapping[str, Any]) -> Table:
    """The likeliest next tokens of both models, side by side."""
    step = diagnosis["step"]
    sides = [[*step["original"]], [*step["compressed"]]]
    rows = []
    for place in range(max(map(len, sides))):
        cells: list[str] = []
        for side in sides:
            found = side[place] if place < len(side) else None
            cells += ("", "") if found is None else (repr(found["token"]), f"{found['probability']:.4f}")
        rows.append(tuple(cells))
    return ("original", "", "compressed", ""), rows


def generation_rows(diagnosis: Mapping[str, Any]) -> Table:
    """Both continuations of every prompt."""
    rows = []
    for each in diagnosis["generation"]:
        rows.append(("prompt", each["prompt"], "", ""))
        for role, suffix in (("original", "_original"), ("compressed", "")):
            figures = f"{each[f'repetition{suffix}']:.0%}", f"{each[f'distinct_2{suffix}']:.0%}"
            rows.append((role, each[role], *figures))
        where = each["first_divergence"]
        rows.append(("", "the same" if where is None else f"part after {where} tokens", "", ""))
    return ("", "greedy continuation", "repetition", "distinct bigrams"), [
        (role, " ".join(text.split()), *rest) for role, text, *rest in rows
    ]


def figure(value: float | None, spec: str) -> str:
    """A figure, or that there is none: it was not finite."""
    return "not finite" if value is None else format(value, spec)
