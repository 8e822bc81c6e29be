"""`tenpak report` and `tenpak compare`: what they write, print and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pages import QUALITY, diagnosis, search, write_json, write_model
from typer.testing import CliRunner

from tenpak import cli
from tenpak.cli import console


@pytest.fixture(autouse=True)
def consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles that write to whatever stdout and stderr are at the time: CliRunner replaces them."""
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "artifact", recorded=search())


def test_report(folder: Path, tmp_path: Path) -> None:
    told = invoke("report", folder)
    page = folder / "report.html"
    assert str(page) in told
    assert "bits per weight" in told
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "intact" in invoke("verify", folder)
    found = write_json(tmp_path / "diagnosis.json", diagnosis(folder))
    machine = json.loads(invoke("report", folder, "-o", tmp_path / "page.html", "--diagnosis", found, "--json"))
    assert machine["page"] == str(tmp_path / "page.html")
    assert machine["page_bytes"] == (tmp_path / "page.html").stat().st_size
    assert "had a red ball" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_inspect_says_the_same_with_a_page_there(folder: Path) -> None:
    before = json.loads(invoke("inspect", folder, "--json"))
    invoke("report", folder)
    assert json.loads(invoke("inspect", folder, "--json")) == before


def test_compare(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_model(tmp_path / "other", name="b/two", recipes={"mlp.up_proj": "int8:row"}, quality=QUALITY)
    monkeypatch.chdir(tmp_path)
    people = invoke("compare", folder, other)
    assert (tmp_path / "compare.html").is_file()
    rows = [line.split() for line in people.splitlines()]
    assert ["someone/model"] in rows
    assert ["b/two"] in rows
    assert [row[:2] for row in rows if row and len(row[0]) == 1] == [["A", "artifact"], ["B", "other"]]
    machine = json.loads(invoke("compare", folder, other, "-o", tmp_path / "two.html", "--json"))
    assert [entry["letter"] for entry in machine["artifacts"]] == ["A", "B"]
    assert machine["artifacts"][1]["source"] == "b/two"
    assert machine["artifacts"][0]["quality"]["kl"] == QUALITY["kl"]


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_what_is_no_artifact_is_refused(verb: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "tenpak", verb, str(tmp_path / "empty")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "is not a tenpak artifact" in done.stderr
    assert "hint:" in done.stderr
    assert not list(tmp_path.glob("**/*.html"))


def test_only_who_makes_a_page_imports_plotly() -> None:
    code = "import sys, tenpak.report.page, tenpak.cli; print([m for m in ('plotly', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch may bring jinja2 by itself, which is not ours to avoid.
    assert "plotly" not in done.stdout
