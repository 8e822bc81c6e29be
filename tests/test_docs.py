"""Every example in the documentation runs, and every link between its pages leads somewhere.

The Python blocks of a page run in their order in one namespace, its ``$ tenpak …`` lines in theirs, all in a temporary
folder that holds ``models/tinystories-3.7m``. ``<!-- not run: reason -->`` before a block skips it.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenpak import cli
from tenpak.cli import application, console

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.is_file()
]

_BLOCK = re.compile(r"(?P<skip><!-- not run: [^>]+-->\s*)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code and where it begins."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to run."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("text")), found["language"], found["text"])
        for found in _BLOCK.finditer(text)
        if not found["skip"]
    ]


def commands(page: Path) -> list[str]:
    shells = [block for block in blocks(page) if block.language in ("console", "sh", "bash")]
    return [line[2:] for block in shells for line in block.text.splitlines() if line.startswith("$ tenpak ")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_are_pages_with_examples() -> None:
    assert ROOT / "README.md" in PAGES
    assert any(block.language == "python" for page in PAGES for block in blocks(page))
    assert any(commands(page) for page in PAGES)


def test_a_marked_block_is_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    assert [(block.text, block.line) for block in blocks(page)] == [("x = 1\n", 6)]


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, tinystories: Path) -> None:
    """The bundled model as the pages name it, with a page of its evaluation text: examples need no exact figures."""
    model = folder / "models" / tinystories.name
    (model / "texts").mkdir(parents=True)
    for path in tinystories.iterdir():
        if path.is_file():
            (model / path.name).symlink_to(path)
    text = (tinystories / "texts" / "evaluation.txt").read_text(encoding="utf-8")
    (model / "texts" / "evaluation.txt").write_text(text[:8000], encoding="utf-8")
    (model / "texts" / "calibration.txt").symlink_to(tinystories / "texts" / "calibration.txt")
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinystories: Path) -> None:
    prepare(tmp_path, monkeypatch, tinystories)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Blank lines in front, so that a traceback has the page's own line numbers.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore:.*are advised:UserWarning")  # examples read as little as they can
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinystories: Path) -> None:
    prepare(tmp_path, monkeypatch, tinystories)
    monkeypatch.setattr(application.signal, "signal", lambda *_: None)
    monkeypatch.setattr(application.warnings, "showwarning", application.warnings.showwarning)
    for command in commands(page):
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        errors = io.StringIO()
        monkeypatch.setattr(console.err, "_file", errors)
        monkeypatch.setattr(console.out, "_file", output := io.StringIO())
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, f"{command}: {errors.getvalue()}"
        assert output.getvalue().strip(), f"{command} printed nothing"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = [found["target"].partition("#")[0] for found in _LINK.finditer(page.read_text(encoding="utf-8"))]
    local = {target for target in targets if target and "://" not in target and not target.startswith("mailto:")}
    missing = {target for target in local if not (page.parent / target).exists()}
    assert not missing


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert not re.search(r"<!-- table: \w+ -->\n<!-- /table -->", page.read_text(encoding="utf-8")), page
