"""Verbs that look at what is there: artifacts, statistics, recipes, the installation."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.table import Table

from tenpak.cli.application import app
from tenpak.cli.console import err, explain_dense, out, print_json, print_result, print_tensors, progress_bar
from tenpak.cli.options import Artifact, Json

__all__ = ["doctor", "inspect", "recipes", "verify"]


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
    print_result({**report, "weights": weights, "tied": manifest.tied}, as_json, report_rows(report), str(artifact))
    if as_json:
        return
    print_tensors(manifest.weights)
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
def recipes(as_json: Json = False) -> None:
    """List the presets and how recipes are written."""
    from tenpak.recipes import GRAMMAR, PRESETS

    if as_json:
        listed = {
            name: {"recipe": preset.recipe, "description": preset.description} for name, preset in PRESETS.items()
        }
        print_json(listed)
        return
    table = Table("preset", "recipe", "", box=None, header_style="dim")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.recipe, preset.description)
    out.print(table)
    out.print("\nA recipe is also written by hand:\n")
    out.print(GRAMMAR, soft_wrap=True, markup=False, highlight=False)


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
