"""Verbs that look at what is there: artifacts, statistics, recipes, the installation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tenpak.cli.application import app, quiet
from tenpak.cli.console import err, explain_dense, out, print_json, print_result, print_tensors, progress_bar
from tenpak.cli.options import Artifact, Json, Remote, Revision
from tenpak.recipes import PRESETS

__all__ = ["doctor", "inspect", "recipes", "verify"]

_SHAPE = (4096, 4096)


@app.command()
def inspect(artifact: Artifact, as_json: Json = False) -> None:
    """Say what an artifact holds: sizes, codecs, what is dense and why, measured quality; or what statistics hold."""
    from tenpak.calibration.statistics import FILE_NAME, StatisticsFolder
    from tenpak.report.rows import statistics_json, statistics_rows

    if (artifact / FILE_NAME).is_file():
        content = statistics_json(StatisticsFolder(artifact))
        print_result(content, as_json, statistics_rows(content), str(artifact))
        return
    _inspect_artifact(artifact, as_json)


def _inspect_artifact(artifact: Path, as_json: bool) -> None:
    from tenpak.artifact.reader import open_artifact
    from tenpak.report.report import measured
    from tenpak.report.rows import report_rows

    report = measured(artifact).to_json()
    manifest = open_artifact(artifact).manifest
    weights = {name: {"shape": list(e.shape), "codec": e.codec, "bits": e.bits} for name, e in manifest.weights.items()}
    sharers = manifest.sharers
    shared: dict[str, dict[str, Any]] = {
        name: {"shape": list(e.shape), "dtype": e.dtype, "weights": len(sharers[name])}
        for name, e in manifest.shared.items()
    }
    content = {**report, "weights": weights, "shared": shared, "tied": manifest.tied}
    print_result(content, as_json, report_rows(report), str(artifact))
    if as_json:
        return
    print_tensors(manifest.weights)
    for name, entry in shared.items():
        shape = "×".join(map(str, entry["shape"]))
        out.print(f"shared: {name}, {shape} {entry['dtype']}, by {entry['weights']} tensors", soft_wrap=True)
    explain_dense(report["dense"])


@app.command()
def verify(artifact: Artifact, as_json: Json = False) -> None:
    """Check every byte of an artifact against the hashes in its manifest; exit code 1 if any differs."""
    from tenpak.artifact.verify import verify as run

    with progress_bar("bytes") as update:
        result = run(artifact, progress=update)
    if as_json:
        out.print_json(json.dumps({"ok": result.ok, "tensors": result.tensors, "problems": list(result.problems)}))
    elif result.ok:
        out.print(f"intact: {result.tensors} tensors, {result.bytes:,} bytes of weight files")
    for problem in result.problems:
        err.print(f"error: {problem}", soft_wrap=True, markup=False)
    if not result.ok:
        err.print("hint: obtain the artifact again, or compress the model again", soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def recipes(
    model: Annotated[str | None, typer.Option("--for", metavar="MODEL", help="also what each would make of it")] = None,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """List the presets and how recipes are written; with --for, predict sizes of MODEL and recommend one."""
    from tenpak.recipes import GRAMMAR

    presets: dict[str, dict[str, Any]] = {name: {"bits": bits} for name, bits in _rates().items()}
    advice = None
    if model is not None:
        from tenpak.prediction import offers, recommended

        quiet()
        found = offers(model, revision=revision, trust_remote_code=trust_remote_code)
        presets = {offer.name: {**presets[offer.name], **offer.to_json()} for offer in found}
        advice = recommended(model, found)
    if as_json:
        described = {name: {"recipe": p.recipe, "description": p.description} for name, p in PRESETS.items()}
        listed = {name: {**described[name], **preset} for name, preset in presets.items()}
        print_json({"presets": listed, "model": model, "recommended": advice})
        return
    _print_presets(presets)
    if advice is None:
        out.print("\nA recipe is also written by hand:\n")
        out.print(GRAMMAR, soft_wrap=True, markup=False, highlight=False)
        return
    fixed = " or ".join(f"`{other['command']}` ({other['bytes']:,} bytes)" for other in advice["fixed_rate"])
    best = f"`{advice['command']}` ({advice['bytes']:,} bytes at most)"
    out.print(f"\nRecommended: {best}; where an engine needs a fixed rate, {fixed}.", soft_wrap=True)


def _rates() -> dict[str, float | None]:
    """Preset → bits per weight of a matrix of 4096 x 4096; None where only coding can tell."""
    from tenpak.recipes import parse

    found: dict[str, float | None] = {}
    for name, preset in PRESETS.items():
        codec = parse(preset.recipe)
        assert codec is not None  # no preset is dense
        bits = codec.estimate_bits(_SHAPE)
        found[name] = None if bits is None else bits / math.prod(_SHAPE)
    return found


def _print_presets(presets: dict[str, dict[str, Any]]) -> None:
    sized = "bytes" in next(iter(presets.values()))
    columns = ["preset", "bits per weight", *(["weight files", "× vs FP32"] if sized else []), "recipe", ""]
    table = Table(*columns, box=None, header_style="dim")
    for name, row in presets.items():
        rate = "by coding" if row["bits"] is None else f"{row['bits']:.3f}"
        sizes = []
        if sized:
            sizes = [f"{row['bytes']:,}", f"{row['ratio_fp32']:.2f}"] if row["exact"] else ["by coding", ""]
        table.add_row(name, rate, *sizes, PRESETS[name].recipe, PRESETS[name].description)
    out.print(table)
    out.print(
        f"\nBits per weight are those of a matrix of {_SHAPE[0]} × {_SHAPE[1]}; the flagship codec is set by a budget."
    )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and what runs here, and try the kernels; exit code 1 if something is broken."""
    from tenpak.doctor import examine, health_rows

    health = examine()
    print_result(health.to_json(), as_json, health_rows(health.to_json()), "tenpak here")
    if not as_json:
        for note in health.notes:
            out.print(f"note: {note}", soft_wrap=True)
        if health.ok:
            out.print("nothing is broken")
    for problem in health.problems:
        err.print(f"error: {problem}", soft_wrap=True, markup=False)
    if not health.ok:
        err.print("hint: install what is missing, then run `tenpak doctor` again", soft_wrap=True)
        raise typer.Exit(1)
