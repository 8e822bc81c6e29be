"""Profiles and plans as rows for people."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import median

from tenpak.allocation.profile import Measured, Profile
from tenpak.allocation.saved_plan import SavedPlan
from tenpak.report.card import size

__all__ = ["measured_rows", "plan_rows", "profile_rows", "rank_correlation"]


def profile_rows(profile: Profile) -> list[tuple[str, ...]]:
    """A header and a row per candidate: what it would take and cost for all tensors that have it."""
    sizes: dict[str, int] = defaultdict(int)
    weights: dict[str, int] = defaultdict(int)
    losses: dict[str, float] = defaultdict(float)
    for tensor in profile.tensors:
        for option in tensor.options:
            sizes[option.recipe] += option.bytes
            weights[option.recipe] += math.prod(tensor.shape)
            losses[option.recipe] += option.loss
    rows = [
        (recipe, f"{weights[recipe]:,}", f"{8 * sizes[recipe] / weights[recipe]:.3f}", f"{losses[recipe]:.4g}")
        for recipe in sorted(sizes, key=lambda recipe: sizes[recipe] / weights[recipe])
    ]
    return [("candidate", "weights", "bits per weight", "predicted loss, nats per token"), *rows]


def measured_rows(profile: Profile) -> list[tuple[str, ...]]:
    """A header and a row per measured prediction, then how well they agree."""
    found = sorted(profile.measured, key=lambda m: m.predicted)
    rows: list[tuple[str, ...]] = [("tensor", "recipe", "predicted", "measured", "measured / predicted")]
    rows += [(m.tensor, m.recipe, f"{m.predicted:.3g}", f"{m.kl:.3g}", f"{m.kl / m.predicted:.2f}") for m in found]
    middle = median(m.kl / m.predicted for m in found)
    rows.append(("median", "", "", "", f"{middle:.2f}"))
    if len(found) > 2:
        rows.append(("rank correlation", "", "", "", f"{rank_correlation(profile.measured):.3f}"))
    return rows


def rank_correlation(found: tuple[Measured, ...]) -> float:
    """Spearman's, of predicted and measured losses."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(range(len(values)), key=lambda i: values[i])
        placed = [0.0] * len(values)
        for rank, i in enumerate(order):
            placed[i] = float(rank)
        return placed

    a, b = ranks([m.predicted for m in found]), ranks([m.kl for m in found])
    middle = (len(found) - 1) / 2
    top = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    return top / math.fsum((x - middle) ** 2 for x in a)


def plan_rows(plan: SavedPlan, parameters: int) -> list[tuple[str, str]]:
    """Rows of a plan: sizes, predicted loss, how near the best it is, and how many tensors get what."""
    counts: dict[str, list[int]] = defaultdict(list)
    for tensor in plan.tensors:
        counts[tensor.recipe].append(tensor.bytes or 0)
    total, loss = plan.bytes or 0, plan.loss or 0.0
    rows = [
        ("model", plan.source),
        ("budget", plan.budget or "none"),
        ("weight files", f"{total:,} bytes ({size(total)}), {8 * total / parameters:.3f} bits per weight"),
        ("smaller than FP32", f"{4 * parameters / total:.2f}×"),
        ("predicted loss", f"{loss:.4g} nats per token"),
    ]
    rows.append(("gap", "none: no plan is better" if plan.gap < 1e-9 else f"at most {plan.gap:.2%} above the best"))
    for recipe, sizes in sorted(counts.items(), key=lambda item: -sum(item[1])):
        rows.append((recipe, f"{len(sizes)} tensors, {sum(sizes):,} bytes"))
    return rows
