"""Where an artifact comes from, as rows for people, and the command that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from tenpak.allocation.budget import Budget
from tenpak.errors import BudgetError
from tenpak.report.contents import Contents

__all__ = ["command", "provenance"]

_MOST_OVERRIDES = 10
_BUDGETS = {
    "ratio": ("--target", "{:g}x"),
    "bpw": ("--bpw", "{:g}"),
    "bytes": ("--max-bytes", "{:.0f}B"),
    "kl": ("--max-kl", "{:g}"),
    "ppl": ("--max-ppl-increase", "{:.6g}%"),
}


def provenance(contents: Contents) -> list[tuple[str, str]]:
    """Rows (what, value) on source, recipe, texts, versions and machine."""
    manifest, recorded = contents.manifest, contents.recorded
    rows = [
        ("source", manifest.source.name),
        ("source SHA-256", manifest.source.sha256),
        ("source files", f"{manifest.source.bytes:,} bytes, {manifest.source.parameters:,} parameters"),
        ("recipe", manifest.recipe),
        *_overrides(manifest.overrides),
        ("seed", str(manifest.seed)),
    ]
    rows += _calibration(manifest.calibration)
    if contents.quality is not None:
        quality = contents.quality
        rows.append(("measured on", f"{quality.text}, {quality.tokens:,} tokens, {quality.dtype}"))
        rows.append(("its SHA-256", quality.text_sha256 or "not recorded"))
    versions = {"tenpak": manifest.tenpak_version, "format": str(manifest.format_version), **manifest.versions}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    environment = dict(recorded.environment)
    written = str(environment.pop("written", ""))
    if environment:
        rows.append(("machine", ", ".join(f"{name} {value}" for name, value in environment.items())))
    if recorded.seconds is not None:
        rows.append(("time to compress", f"{recorded.seconds:,.1f} s"))
    if written:
        rows.append(("written", written))
    return rows


def command(contents: Contents) -> str:
    """The command that makes the artifact again; texts stand in it by name, their hashes are in ``provenance``."""
    manifest = contents.manifest
    read = manifest.calibration or {}
    words = ["tenpak", "compress", manifest.source.name, "-o", contents.name]
    search = contents.recorded.search
    # What chose among candidates recorded what it chose, but not among what.
    budget = _budget(search.budget) if search is not None and manifest.recipe.startswith("trellis:") else None
    overrides = list(manifest.overrides)
    if budget:
        words += budget
        overrides = [entry for entry in overrides if not entry.startswith("*=trellis:")]
    else:
        words += ["--recipe", manifest.recipe]
    for entry in overrides:
        words += ["--set", entry]
    words += ["--calibration", "none"] if budget and not read else _reading(read)
    steps = _steps(read)
    if budget or steps:
        words += ["--tune", str(steps)]
    if manifest.seed:
        words += ["--seed", str(manifest.seed)]
    quality = contents.quality
    words += ["--evaluation", quality.text if quality is not None and quality.text else "none"]
    return shlex.join(words)


def _overrides(entries: Sequence[str]) -> list[tuple[str, str]]:
    rows = [("override", entry) for entry in entries[:_MOST_OVERRIDES]]
    more = len(entries) - len(rows)
    return [*rows, ("", f"and {more} more, as in the command below")] if more else rows


def _calibration(read: dict[str, Any] | None) -> list[tuple[str, str]]:
    if read is None:
        return [("calibrated on", "nothing")]
    tokens = read.get("tokens")
    count = f"{tokens:,} tokens" if isinstance(tokens, int) else ""
    told = [str(read.get("text", "")), count, f"propagation {read.get('propagation', 'none')}"]
    rows = [
        ("calibrated on", ", ".join(filter(None, told))),
        ("its SHA-256", str(read.get("text_sha256", "not recorded"))),
    ]
    steps = _steps(read)
    return [*rows, ("tuned", f"at most {steps} steps")] if steps else rows


def _reading(read: dict[str, Any]) -> list[str]:
    words = []
    text = read.get("text")
    if isinstance(text, str) and not text.startswith("sampled from"):
        words += ["--calibration", text]
    for key, option in (("tokens", "--calibration-tokens"), ("window", "--calibration-window")):
        if isinstance(read.get(key), int):
            words += [option, str(read[key])]
    if isinstance(read.get("propagation"), str):
        words += ["--propagation", read["propagation"]]
    return words


def _steps(read: dict[str, Any]) -> int:
    tuning = read.get("tuning")
    steps = tuning.get("steps") if isinstance(tuning, dict) else None
    return steps if isinstance(steps, int) else 0


def _budget(text: str) -> list[str]:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return []
    option, spec = _BUDGETS[budget.kind]
    return [option, spec.format(100 * budget.value if budget.kind == "ppl" else budget.value)]
