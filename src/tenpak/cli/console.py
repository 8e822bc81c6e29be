"""What the command line prints: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["err", "explain_dense", "out", "print_json", "print_result", "print_table", "print_tensors", "progress_bar"]

err = Console(stderr=True, highlight=False)
# What is piped is read by grep and its kin: a row stays on its line.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)


def print_json(data: Any) -> None:
    """JSON for machines."""
    out.print_json(json.dumps(data))


def print_tensors(weights: Mapping[str, Any]) -> None:
    """A row for every compressed tensor of a manifest."""
    table = Table("tensor", "shape", "codec", "bits per weight", box=None, header_style="dim")
    for name, entry in weights.items():
        rate = f"{entry.bits / math.prod(entry.shape):.3f}"
        table.add_row(name, "×".join(map(str, entry.shape)), _codec_name(entry.codec), rate)
    out.print(table)


@contextmanager
def progress_bar(unit: str) -> Iterator[Any]:
    """A bar on stderr with rate and time left; yields ``update(what, done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("starting", total=None, rate="")

        def update(what: str, done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            progress.update(task, description=what[-48:] or "measuring", completed=done, total=total, rate=rate)

        yield update


def print_result(data: dict[str, Any], as_json: bool, rows: list[tuple[str, str]], title: str) -> None:
    if as_json:
        out.print_json(json.dumps(data))
        return
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> None:
    """A table with a header, under a title, which a table of its own would fold to its width."""
    table = Table(*header, box=None, header_style="dim", padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    out.print(title, style="italic", soft_wrap=True)
    out.print(table)


def explain_dense(dense: dict[str, dict[str, Any]]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, entry in dense.items():
        reasons.setdefault(entry["reason"], []).append(name)
    for reason, names in reasons.items():
        out.print(f"left dense: {len(names)} × {reason}, such as {names[0]}", soft_wrap=True, markup=False)


def _codec_name(config: dict[str, Any]) -> str:
    from tenpak.codecs import registry
    from tenpak.recipes import format

    return format(registry.from_json(config))
