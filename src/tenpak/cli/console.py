"""What the command line prints: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tenpak.cli.progress import FORMAT, Update, bar, json_lines, lines

__all__ = [
    "err",
    "explain_dense",
    "note",
    "out",
    "print_json",
    "print_result",
    "print_table",
    "print_tensors",
    "progress_bar",
    "set_verbosity",
]

err = Console(stderr=True, highlight=False)
# What is piped is read by grep and its kin: a row stays on its line.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
_verbosity: Literal["quiet", "normal", "verbose"] = "normal"


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


def set_verbosity(level: Literal["quiet", "normal", "verbose"]) -> None:
    """How much goes to stderr from now on: quiet leaves out progress and notes, verbose adds lines to a bar."""
    global _verbosity
    _verbosity = level


def note(message: str) -> None:
    """Say something on stderr that is good to know, unless all is to be quiet."""
    if _verbosity != "quiet":
        err.print(message, soft_wrap=True, markup=False, style="dim")


@contextmanager
def progress_bar(unit: str) -> Iterator[Update]:
    """Progress on stderr, with rate and time left: a bar on a terminal, else lines; see ``progress``.

    Args:
        unit: of phases whose unit is not known by their name.

    Yields:
        ``update(what, done, total)``.
    """
    terminal = err.is_terminal and not err.is_dumb_terminal and err.file.isatty()
    if os.environ.get(FORMAT) == "json":
        shown: AbstractContextManager[Update] = json_lines(err)
    elif _verbosity == "quiet":
        shown = nullcontext(lambda what, done, total: None)
    else:
        shown = (bar if terminal else lines)(err, unit, verbose=_verbosity == "verbose")
    with shown as update:
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
