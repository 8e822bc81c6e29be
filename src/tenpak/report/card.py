"""The model card: the artifact's ``README.md``, with the measured figures and how to load it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from tenpak.artifact.schema import Manifest
from tenpak.report.report import Report

__all__ = ["model_card", "plus_minus", "size"]


def model_card(report: Report, manifest: Manifest, licence: str | None) -> str:
    """The card of an artifact, Markdown with the hub's front matter.

    Args:
        report: sizes, and quality where measured.
        manifest: of the artifact.
        licence: the source's own, from its card; None where it states none.
    """
    front = ["---", "library_name: transformers", "tags:", "- tenpak"]
    if "/" in manifest.source.name:
        front.append(f"base_model: {manifest.source.name}")
    if licence:
        front.append(f"license: {licence}")
    front.append("---")
    overrides = "".join(f", `--set {override}`" for override in manifest.overrides)
    lines = [
        *front,
        "",
        f"# {manifest.source.name}, compressed with tenpak",
        "",
        f"Recipe `{manifest.recipe}`{overrides}. {size(report.bytes)} of weight files for "
        f"{report.parameters:,} parameters.",
        "",
        *_table(report),
        "",
        "```python",
        "import tenpak  # teaches transformers to load it",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        f"Licence: {licence or 'that of the source model, whose card states none that could be read'}.",
        "",
        "## What is not compressed",
        "",
        *_dense(report),
        "",
        f"Source checkpoint SHA-256 `{manifest.source.sha256}`; written by tenpak {manifest.tenpak_version}, "
        f"format {manifest.format_version}. `tenpak verify PATH` checks every byte.",
        "",
    ]
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes for people: decimal units, three digits."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def plus_minus(quality: Mapping[str, Any], key: str, spec: str) -> str:
    """A measured figure with its standard error, where there is one."""
    error = quality.get(f"{key}_se")
    return format(quality[key], spec) + ("" if error is None else f" ± {format(error, spec.lstrip('+'))}")


def _table(report: Report) -> list[str]:
    rows = [
        ("weight files", size(report.bytes)),
        ("bits per weight, everything counted", f"{report.bpw:.3f}"),
        ("smaller than FP32", f"{report.ratio_fp32:.2f}×"),
        ("smaller than the checkpoint", f"{report.ratio_checkpoint:.2f}×"),
    ]
    quality = report.quality
    if quality is None:
        rows.append(("quality", "not measured; run `tenpak evaluate`"))
    else:
        rows += [
            ("perplexity, original → this", f"{quality['ppl_original']:.4f} → {quality['ppl']:.4f}"),
            ("perplexity increase", plus_minus(quality, "ppl_increase", "+.2%")),
            ("KL divergence, nats per token", plus_minus(quality, "kl", ".5f")),
            ("top-1 agreement", plus_minus(quality, "top1", ".2%")),
            ("measured on", f"{quality['text']}, {quality['tokens']:,} tokens, {quality['dtype']}"),
        ]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _dense(report: Report) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, entry in report.dense.items():
        groups[str(entry["reason"])].append(name)
    if not groups:
        return ["Everything is."]
    return [
        f"- {len(names)} × {reason} ({size(sum(report.dense[name]['bytes'] for name in names))}), such as `{names[0]}`"
        for reason, names in sorted(groups.items())
    ]
