"""Reports, evaluations and predictions as rows for people: (what, figure)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tenpak.calibration.statistics import StatisticsFolder
from tenpak.report.card import plus_minus, size

__all__ = ["prediction_rows", "quality_rows", "report_rows", "statistics_json", "statistics_rows"]


def report_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a report's JSON, its quality included where it was measured."""
    set_apart = report["recipe"] == "dense" and report["codecs"]  # by a plan, a policy or --set
    rows = [
        ("recipe", "each tensor its own, see `tenpak inspect`" if set_apart else report["recipe"]),
        ("weight files", f"{report['bytes']:,} bytes ({size(report['bytes'])})"),
        ("bits per weight", f"{report['bpw']:.3f}, everything counted"),
        ("smaller than FP32", f"{report['ratio_fp32']:.2f}×"),
        ("smaller than the checkpoint", f"{report['ratio_checkpoint']:.2f}×"),
    ]
    if set_apart or len(report["codecs"]) > 1:
        shares = sorted(report["codecs"].items(), key=lambda item: -item[1])
        rows.insert(1, ("codecs", ", ".join(f"{name} {size(count)}" for name, count in shares)))
    if report.get("search"):
        rows.insert(1, ("budget", _search(report["search"])))
    if report["calibration"] is not None:
        read = report["calibration"]
        rows.append(("calibrated on", f"{read['text']}: {read['tokens']:,} tokens, propagation {read['propagation']}"))
        experts = read.get("experts", {})
        if experts:
            fewest = min(min(counts) for counts in experts.values())
            rows.append(("experts", f"{len(experts)} tensors; the least fed expert saw {fewest} tokens"))
    if report["calibration"] is not None and "tuning" in report["calibration"]:
        rows.append(("tuned", _tuning(report["calibration"]["tuning"])))
    if report["seconds"] is not None:
        rows.append(("time", f"{report['seconds']:.1f} s"))
    return rows + (quality_rows(report["quality"])[3:] if report["quality"] else [])


def _search(search: dict[str, Any]) -> str:
    kept = "met" if search.get("promise", {"kept": True})["kept"] else "MISSED"
    text = f"{search['budget']}, {kept} in {len(search['trials'])} trials"
    if search.get("error"):
        text += (
            f"; known to ± {search['error']:.2g} from {search['tokens']:,} tokens, about "
            f"{search['tokens_for_5_percent']:,} would tell 5 % of it"
        )
    return text


def _tuning(tuning: dict[str, Any]) -> str:
    before, after = tuning["kl"]
    if not tuning["kept"]:
        return f"no gain on the windows held out (KL {before:.5f}), so nothing was changed"
    return f"{tuning['trace']['best']} steps; KL on the windows held out {before:.5f} → {after:.5f}"


def quality_rows(quality: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of an evaluation's JSON."""
    rows = [
        ("weight files", f"{quality['bytes']:,} bytes, {quality['bpw']:.3f} bits per weight"),
        ("smaller than FP32", f"{quality['ratio_fp32']:.2f}×"),
        ("smaller than the checkpoint", f"{quality['ratio_checkpoint']:.2f}×"),
        ("perplexity", f"{quality['ppl_original']:.4f} → {quality['ppl']:.4f}"),
        ("perplexity increase", plus_minus(quality, "ppl_increase", "+.2%")),
        ("KL divergence", f"{plus_minus(quality, 'kl', '.5f')} nats per token"),
        ("top-1 agreement", plus_minus(quality, "top1", ".2%")),
        (
            "measured on",
            f"{quality['text']}: {quality['tokens']:,} tokens, windows of {quality['window']}, {quality['dtype']}",
        ),
    ]
    if "tokens_per_second" in quality:  # a manifest has what is the same in every run
        speeds = quality["tokens_per_second_original"], quality["tokens_per_second"]
        rows.append(("speed", f"{speeds[0]:,.0f} → {speeds[1]:,.0f} tokens/s"))
    for name, found in quality.get("memory", {}).items():
        rows.append(
            (f"resident, {name}", f"{(found['after_forward'] - found['baseline']) / 1e6:.1f} MB after a forward pass")
        )
    return rows


def statistics_json(found: StatisticsFolder) -> dict[str, Any]:
    """What a folder of statistics holds."""
    counts = found.counts()
    experts = {name: c for name, c in counts.items() if len(c) > 1}
    return {
        **asdict(found.origin),
        "parts": len(found.parts),
        "weights": {name: {"matrices": len(c), "inputs": sum(c), "fewest": min(c)} for name, c in counts.items()},
        "experts": experts,
        "bytes": sum(path.stat().st_size for path in found.folder.iterdir() if path.is_file()),
    }


def statistics_rows(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of statistics' JSON."""
    curvature = "drawn labels, one backward pass" if content["method"] == "full" else "guessed from names and positions"
    rows = [
        ("model", f"{content['source']} ({content['source_sha256'][:12]})"),
        ("text", f"{content['text']}: {content['tokens']:,} tokens, windows of {content['window']}"),
        ("curvature", curvature),
        ("weights", f"{len(content['weights'])} in {content['parts']} parts"),
        ("size", size(content["bytes"])),
    ]
    if content["experts"]:
        fewest = min(min(counts) for counts in content["experts"].values())
        rows.append(("experts", f"the least fed saw {fewest} tokens"))
    if "seconds" in content:
        rows.append(("time", f"{content['seconds']:.1f} s"))
    return rows


def prediction_rows(prediction: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a dry run's JSON."""
    return [
        ("weight files", f"{prediction['bytes']:,} bytes{'' if prediction['exact'] else ' (estimated)'}"),
        ("bits per weight", f"{prediction['bpw']:.3f}, everything counted"),
        ("smaller than FP32", f"{prediction['ratio_fp32']:.2f}×"),
        ("smaller than the checkpoint", f"{prediction['ratio_checkpoint']:.2f}×"),
        ("memory", f"about {size(prediction['memory'])} at the peak"),
        ("disk", f"{size(prediction['disk'])} free while writing"),
        ("time", f"about {prediction['seconds']:.0f} s, without calibration and evaluation"),
        ("left dense", f"{len(prediction['dense'])} tensors"),
    ]
