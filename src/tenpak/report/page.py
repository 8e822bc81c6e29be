"""The pages: one HTML file each, with styles, scripts and data in it, that loads nothing from anywhere.

Two things keep text from outside (names of models and tensors, generated samples) text. Everything that the templates
print is escaped, and the figures' data are JSON in which ``<``, ``>`` and ``&`` are written as escapes, so that no
``</script>`` can end it. And the page's content security policy allows only the two scripts whose hashes it states, and
no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenpak.artifact.writer import PAGE_NAME, replace_file
from tenpak.errors import ArtifactError, OutputExistsError
from tenpak.report.card import size
from tenpak.report.comparison import Entry, bit_bars, kind_map, overview, rivals
from tenpak.report.contents import read_contents, short_recipe
from tenpak.report.inputs import load_diagnosis, load_profile
from tenpak.report.sections import (
    UNMEASURED,
    Row,
    Section,
    Table,
    Tile,
    headline,
    increase,
    measured_on,
    report_sections,
    with_error,
)

__all__ = ["COMPARISON_COLUMNS", "compare_page", "comparison_rows", "default_page", "report_page", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_GENERATOR = '<meta name="generator" content="tenpak">'
_BEATEN = (
    "Hollow marks are beaten: another artifact of the same model, measured on the same text, is no larger and loses no "
    "more."
)
# figure.PATTERNS for legends: paths in squares of 8 pixels.
_PATTERNS = (
    "", "M-1,1l2,-2M0,8l8,-8M7,9l2,-2", "M0,0l8,8M0,8l8,-8", "M0,4h8", "M3,4h2", "M-1,7l2,2M0,0l8,8M7,-1l2,2",
    "M4,0v8M0,4h8", "M4,0v8",
)  # fmt: skip
COMPARISON_COLUMNS = (
    "", "artifact", "recipe", "bytes", "bits per weight", "× vs FP32", "perplexity", "KL, nats per token",
    "same top token", "beaten by",
)  # fmt: skip


def report_page(artifact: str | Path, *, diagnosis: Path | None = None, profile: Path | None = None) -> str:
    """The page of an artifact, HTML.

    Args:
        artifact: its folder.
        diagnosis: JSON that ``tenpak diagnose --json`` printed of it.
        profile: what ``tenpak profile`` wrote of the source model.

    Raises:
        ArtifactError: as ``open_artifact``.
        EvaluationError: the diagnosis cannot be read, or it or the profile are of another model.
        AllocationError: the profile cannot be read.
    """
    contents = read_contents(artifact)
    found = None if diagnosis is None else load_diagnosis(diagnosis, contents.tensors)
    profiled = None if profile is None else load_profile(profile, contents.manifest.source.sha256)
    source = contents.manifest.source.name
    ratio = f"{contents.report.ratio_fp32:.1f}× smaller"
    return _render(
        title=f"{source}, {ratio}: tenpak report",
        kind="report",
        heading=source,
        subtitle=f"{ratio} with {short_recipe(contents.manifest.recipe)}",
        tiles=headline(contents),
        lead=measured_on(contents),
        sections=report_sections(contents, found, profiled),
    )


def compare_page(every: Sequence[Entry]) -> str:
    """The page of several artifacts, HTML; they are from ``comparison.entries``."""
    groups = _grouped(every)
    figures = [rivals(group, number) for number, group in enumerate(groups)]
    known = tuple(figure for figure in (overview(groups), *figures) if figure is not None)
    unmeasured = [entry.letter for entry in every if entry.kl is None]
    missing = (f"Not measured: {', '.join(unmeasured)}. {UNMEASURED}",) if unmeasured else ()
    beaten = _BEATEN if any(entry.beaten_by for entry in every) else ""
    kinds = kind_map(every)
    bars, names = bit_bars(every)
    sections = [
        Section("artifacts", "The artifacts", tables=(_table(groups),)),
        Section("frontier", "What the size costs", beaten, figures=known, missing=missing),
        Section("bits", "Where the bits are", figures=(bars, *(() if kinds is None else (kinds,))), legend=names),
    ]
    sources = [group[0].contents.manifest.source.name for group in groups]
    return _render(
        title=f"{len(every)} artifacts of {', '.join(sources)}: tenpak comparison",
        kind="comparison",
        heading=f"{len(every)} artifacts compared",
        subtitle=f"of {', '.join(sources)}",
        tiles=(),
        lead=_texts(groups),
        sections=sections,
    )


def comparison_rows(every: Sequence[Entry]) -> list[tuple[str, ...]]:
    """A row for each artifact, in the columns of ``COMPARISON_COLUMNS``."""
    rows: list[tuple[str, ...]] = []
    for entry in every:
        report, quality = entry.contents.report, entry.contents.quality
        measured = (
            ("—", "—", "—")
            if quality is None
            else (
                increase(quality),
                with_error(quality.kl, quality.kl_se, ".5f"),
                with_error(quality.top1, quality.top1_se, ".2%"),
            )
        )
        beaten = ", ".join(entry.beaten_by) if entry.kl is not None else "?"
        rows.append(
            (
                entry.letter, entry.name, short_recipe(report.recipe), f"{report.bytes:,}", f"{report.bpw:.3f}",
                f"{report.ratio_fp32:.2f}", *measured, beaten or "none",
            )
        )  # fmt: skip
    return rows


def default_page(artifact: Path) -> Path:
    """Where the page of an artifact goes."""
    return artifact / PAGE_NAME


def write_page(path: Path, page: str) -> int:
    """Write a page, atomically; returns its bytes. One that is there is replaced, any other file is not.

    Raises:
        OutputExistsError: something else is in the way.
        ArtifactError: the page cannot be written.
    """
    if path.is_dir() or (path.exists() and _GENERATOR not in _start(path)):
        raise OutputExistsError(f"{path} exists and is not a page of tenpak", hint="choose another -o")
    if not path.parent.is_dir():
        raise ArtifactError(f"cannot write {path}: {path.parent} is not a folder", hint="choose another -o")
    data = page.encode()
    replace_file(path, data)
    return len(data)


def _start(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(2000).decode(errors="replace")


def _grouped(every: Sequence[Entry]) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in every:
        groups.setdefault(entry.contents.manifest.source.sha256, []).append(entry)
    return list(groups.values())


def _texts(groups: Sequence[Sequence[Entry]]) -> str:
    """What was measured on what; a warning where texts differ within a source."""
    told = []
    for group in groups:
        texts = {e.contents.quality.text_sha256: e.contents.quality.text for e in group if e.contents.quality}
        name = group[0].contents.manifest.source.name
        if len(texts) > 1:
            told.append(f"{name} was measured on different texts ({', '.join(texts.values())}), which do not compare.")
        elif texts:
            told.append(f"{name} was measured on {next(iter(texts.values()))}.")
    return " ".join([*told, "± is one standard error."])


def _table(groups: Sequence[Sequence[Entry]]) -> Table:
    rows = []
    for group in groups:
        report = group[0].contents.report
        heading = f"{report.source}: {report.parameters:,} parameters, {size(report.checkpoint_bytes)} of weight files"
        rows.append(Row((heading,), heading=True))
        rows += [Row(cells) for cells in comparison_rows(group)]
    caption = "Sizes and quality, by source"
    return Table(caption, COMPARISON_COLUMNS, tuple(rows), frozenset(range(3, 9)))


def _render(
    *, title: str, kind: str, heading: str, subtitle: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]
) -> str:
    # Only who makes a page pays for importing these.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = lambda text: Markup(_code(text))
    plotly = _script(get_plotlyjs())
    script = _script((_TEMPLATES / "page.js").read_text(encoding="utf-8"))
    figures = [figure.to_json() for section in sections for figure in section.figures]
    return environment.get_template("page.html.j2").render(
        title=title,
        kind=kind,
        heading=heading,
        subtitle=subtitle,
        lead=lead,
        tiles=tiles,
        sections=sections,
        patterns=_PATTERNS,
        generator=Markup(_GENERATOR),
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly),
        script=Markup(script),
        hashes=[_hash(plotly), _hash(script)],
        data=Markup(_json({"figures": figures})),
    )


def _script(text: str) -> str:
    """A script as it can stand in HTML, where a browser would change other line ends before it hashes."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in text.lower()  # these are ours and plotly's
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(content: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: what HTML might take for markup is escaped."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _code(text: str) -> str:
    """Escaped text with what is between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
