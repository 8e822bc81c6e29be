"""Verbs that write pages to look at: of one artifact, of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tenpak.cli.application import app
from tenpak.cli.console import out, print_json, print_result
from tenpak.cli.options import Artifact, Json

__all__ = ["compare", "report"]


@app.command()
def report(
    artifact: Artifact,
    page: Annotated[
        Path | None, typer.Option("-o", "--out", help="page to write; default: report.html in the artifact")
    ] = None,
    diagnosis: Annotated[Path | None, typer.Option(help="JSON that `tenpak diagnose --json` printed")] = None,
    profile: Annotated[Path | None, typer.Option(help="file that `tenpak profile` wrote of the model")] = None,
    as_json: Json = False,
) -> None:
    """Write a page on ARTIFACT that tells and shows everything: one HTML file that needs nothing else."""
    from tenpak.report.page import default_page, report_page, write_page
    from tenpak.report.report import measured
    from tenpak.report.rows import report_rows

    target = default_page(artifact) if page is None else page
    size = write_page(target, report_page(artifact, diagnosis=diagnosis, profile=profile))
    sizes = measured(artifact).to_json()
    data = {"page": str(target), "page_bytes": size, **sizes}
    print_result(data, as_json, [("page", str(target)), *report_rows(sizes)], str(artifact))


@app.command()
def compare(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="folders that tenpak wrote")],
    page: Annotated[Path, typer.Option("-o", "--out", help="page to write")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Compare artifacts, also of different models: a table, and a page that shows size against loss."""
    from tenpak.report.comparison import entries
    from tenpak.report.contents import read_contents
    from tenpak.report.page import COMPARISON_COLUMNS, compare_page, comparison_rows, write_page

    every = entries([read_contents(artifact) for artifact in artifacts])
    size = write_page(page, compare_page(every))
    if as_json:
        listed: list[dict[str, Any]] = [
            {**entry.contents.report.to_json(), "letter": entry.letter, "beaten_by": list(entry.beaten_by)}
            for entry in every
        ]
        print_json({"page": str(page), "page_bytes": size, "artifacts": listed})
        return
    table = Table(*COMPARISON_COLUMNS, box=None, header_style="dim")
    source = None
    for entry, cells in zip(every, comparison_rows(every), strict=True):
        if entry.contents.manifest.source.name != source:
            source = entry.contents.manifest.source.name
            table.add_row("", source, style="bold")
        table.add_row(*cells)
    out.print(table)
    out.print(f"page: {page}", soft_wrap=True)
