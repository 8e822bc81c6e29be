"""What runs here: the trial finds kernels that are wrong, and what is missing is told rather than raised."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tenpak import cli, doctor
from tenpak.cli import console
from tenpak.doctor import Health, examine, health_rows
from tenpak.kernels import core


@pytest.fixture(scope="module")
def health() -> Health:
    return examine()


@pytest.fixture(autouse=True)
def consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles that write to whatever stdout and stderr are at the time: CliRunner replaces them."""
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)


def test_nothing_is_broken_here(health: Health) -> None:
    assert health.ok
    assert health.packages["torch"] == torch.__version__
    assert "pytest" not in health.packages  # what only developers need is no concern of users
    assert set(health.optional) >= {"datasets"}
    assert health.instruction_sets == core.instruction_sets()
    assert health.compiled == (len(health.instruction_sets) > 1)
    assert [trial.instruction_set for trial in health.trials] == list(health.instruction_sets)
    assert all(trial.same and trial.encode > 0 and trial.decode > 0 for trial in health.trials)
    assert 0 < health.memory["available"] <= health.memory["total"]
    assert str(Path.cwd()) in health.disk


def test_rows_and_json_say_the_same(health: Health) -> None:
    content = json.loads(json.dumps(health.to_json()))
    assert set(content) == {"ok", *(field.name for field in dataclasses.fields(Health))}
    rows = dict(health_rows(content))
    assert f"torch {torch.__version__}" in rows["packages"]
    assert rows["kernels"].startswith(health.instruction_sets[-1])
    assert all(f"trial, {name}" in rows for name in health.instruction_sets)


@pytest.mark.skipif(len(core.instruction_sets()) == 1, reason="there is no compiled core to be wrong")
@pytest.mark.parametrize(("kernel", "result"), [("quantize", 3), ("product", 4), ("rans_decode", 1)])
def test_a_kernel_that_computes_something_else_is_found(
    kernel: str, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

    def off_by_a_little(*arguments: Any) -> Any:
        returned = getattr(native, kernel)(*arguments)
        arguments[result][-1, -1] += 2
        return returned

    native, wrong = core._compiled(), Wrong()
    setattr(wrong, kernel, off_by_a_little)
    monkeypatch.setattr(core, "_compiled", lambda: wrong)
    problems = examine().problems
    if kernel == "rans_decode":  # what it gives is checked by the codec itself
        assert [problem.split(":")[:2] for problem in problems] == [["kernels", " InvalidPayloadError"]]
        return
    wanted = core.instruction_sets()[1:]
    assert problems == tuple(f"kernels for {name} do not agree with the reference" for name in wanted)


def test_without_the_compiled_core_it_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_compiled", lambda: None)
    found = examine()
    assert found.ok
    assert not found.compiled
    assert found.instruction_sets == ("reference",)
    assert any("compiled core is not there" in note for note in found.notes)


def test_a_core_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tenpak._native", raising=False)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())

    def fails(name: str) -> Any:
        raise ImportError("undefined symbol: nanobind")

    monkeypatch.setattr(doctor.importlib, "import_module", fails)
    assert doctor._broken_core() == "undefined symbol: nanobind"


def test_packages_that_are_missing_or_too_old_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "accelerate":
            raise PackageNotFoundError(name)
        return {"transformers": "4.57.1", "torch": "2.6.0+cpu", "pydantic": "2.7"}.get(name, "99.0")

    monkeypatch.setattr(doctor, "version", version)
    notes: list[str] = []
    problems: list[str] = []
    packages, optional = doctor._packages(notes, problems)
    assert packages["accelerate"] is None
    assert len(problems) == 2
    assert problems[0].startswith("accelerate is not installed: pip install 'accelerate>=")
    assert problems[1].startswith("transformers 4.57.1 is too old: pip install 'transformers>=")
    assert optional["datasets"] == {"datasets": "99.0"}
    assert notes == []


def test_what_fails_to_import_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = examine()
    assert found.memory == {}
    assert [problem.split(":")[0] for problem in found.problems] == ["memory"]
    assert found.trials
    assert health_rows(found.to_json())


def test_the_verb(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: health)
    people = CliRunner().invoke(cli.app, ["doctor"], catch_exceptions=False)
    assert people.exit_code == 0
    assert "nothing is broken" in people.stdout
    assert all(note in people.stdout for note in health.notes)
    machine = CliRunner().invoke(cli.app, ["doctor", "--json"], catch_exceptions=False)
    assert json.loads(machine.stdout) == json.loads(json.dumps(health.to_json()))

    broken = dataclasses.replace(health, problems=("kernels for avx2 do not agree with the reference",))
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    failed = CliRunner().invoke(cli.app, ["doctor", "--json"], catch_exceptions=False)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: kernels for avx2")
    assert "\nhint: " in failed.stderr
    assert json.loads(failed.stdout)["ok"] is False
