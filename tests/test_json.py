"""What docs/json.md says of ``--json`` is what is printed: each key is documented, each documented key is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import make_tiny_talker
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tenpak import cli
from tenpak.allocation.budget import Budget, Trial
from tenpak.cli import console
from tenpak.dial import Found, Measure, report_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "json.md"
CALIBRATION = "the cat sat on the mat and looked at the moon, which was as round as a cheese.\n" * 40
EVALUATION = "a moon of cheese was on the mat, and the cat looked at it as it sat.\n" * 20

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*calibration tokens for layers"),
    pytest.mark.filterwarnings("ignore:.*figures are noisy"),
]


def documented() -> dict[str, set[str]]:
    """Verb → the fields in the first column of its table."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        name, _, text = section.partition("\n")
        found[name] = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    return {name: fields for name, fields in found.items() if fields}


def paths(value: Any, known: set[str], at: str = "") -> Iterator[str]:
    """The fields of a JSON value, in the page's notation; below ``*`` of a documented map all names are alike."""
    below = {path for path in known if not at or path.startswith((f"{at}.", f"{at}[]"))}
    if isinstance(value, dict) and below:
        free = f"{at}.*" in known or any(path.startswith(f"{at}.*.") for path in below)
        for name, child in value.items():
            yield from paths(child, known, f"{at}.*" if free else f"{at}.{name}".lstrip("."))
    elif isinstance(value, list) and any(path.startswith(f"{at}[]") for path in below):
        for child in value:
            yield from paths(child, known, f"{at}[]")
    elif not (value is None and below):  # an object that is not known
        yield at


def compare(verb: str, *outputs: dict[str, Any]) -> None:
    """Together these outputs have all documented fields, and none has others."""
    known = documented()[verb]
    if verb == "inspect":
        known = known | documented()["compress"]
    found = [set(paths(output, known)) for output in outputs]
    for fields in found:
        assert fields <= known, "printed, and not documented"
    assert set().union(*found) == known, "documented, and never printed"


@pytest.fixture(autouse=True)
def consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles that write to whatever stdout and stderr are at the time: CliRunner replaces them."""
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)


def printed(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    model = make_tiny_talker(folder / "model", tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(model)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model, {"format": "pt"})
    make_tiny_talker(folder / "experts", "mixtral")
    (folder / "calibration.txt").write_text(CALIBRATION)
    (folder / "evaluation.txt").write_text(EVALUATION)
    return folder


def test_every_verb_with_json_has_a_section() -> None:
    verbs = {command.callback.__name__ for command in cli.app.registered_commands}
    sections = set(documented()) - {"compress --dry-run"}
    # The others print the file that they write, or what another verb prints.
    assert sections <= verbs
    assert sections == {
        "compress", "evaluate", "inspect", "verify", "calibrate", "profile", "allocate", "diagnose", "generate",
        "recipes", "doctor",
    }  # fmt: skip


def test_a_key_that_is_not_documented_is_found() -> None:
    known = {"a", "b.*.c", "d[].e", "f.g"}
    whole = {"a": 1, "b": {"x": {"c": 2}, "y": {"c": 3}}, "d": [{"e": [1]}], "f": None}
    assert set(paths(whole, known)) == known - {"f.g"}
    assert set(paths({"b": {"x": {"z": 2}}, "h": {"i": 1}}, known)) == {"b.*.z", "h"}


def test_compress_and_inspect(work: Path) -> None:
    texts = ("--calibration", work / "calibration.txt", "--evaluation", work / "evaluation.txt")
    tuned = printed("compress", work / "model", "-o", work / "tuned", "--bpw", "6", "--tune", "2", *texts)
    # What a budget of quality adds, which would take several passes.
    searched = report_of(Found(None, (Trial(1.0, 0.09),), Measure(0.09, 0.01, 1000)), Budget.parse("kl=0.1"))
    whole = {**tuned, "search": {**tuned["search"], **searched}}
    plain = printed("compress", work / "experts", "-o", work / "plain", "--recipe", "gptq-int4", *texts[:2],
                    "--set", "*.k_proj=vq4x16:shared", "--evaluation", "none")  # fmt: skip
    assert plain["quality"] is plain["search"] is plain["overlap"] is None
    compare("compress", tuned, plain, whole)
    report = json.loads((work / "tuned" / "report.json").read_text())
    assert set(report) == {*tuned, "environment", "versions"}
    measured = documented()["evaluate"]
    assert set(tuned["quality"]) == {name for name in measured if not name.startswith("memory")} | {"overlap"}
    inspected = printed("inspect", work / "tuned")
    assert inspected["seconds"] is inspected["search"] is None
    assert inspected["tied"]
    compare("inspect", inspected, printed("inspect", work / "plain"), plain, whole)


def test_dry_run(work: Path) -> None:
    compare("compress --dry-run", printed("compress", work / "model", "--dry-run"))


def test_evaluate_verify_generate(work: Path) -> None:
    printed("compress", work / "model", "-o", work / "small", "--evaluation", "none")
    arguments = ("--against", work / "model", "--text", work / "evaluation.txt", "--memory")
    compare("evaluate", printed("evaluate", work / "small", *arguments))
    compare("verify", printed("verify", work / "small"))
    compare("generate", printed("generate", work / "small", "--prompt", "the", "--tokens", "2"))


def test_profile_and_allocate(work: Path) -> None:
    candidates = ("--candidates", "int3:g16,int8:row", "--calibration", work / "calibration.txt")
    compare("profile", printed("profile", work / "model", "-o", work / "profile.json", *candidates, "--measure", "2"))
    compare("allocate", printed("allocate", work / "profile.json", "-o", work / "plan.json", "--bpw", "9"))


def test_diagnose(work: Path) -> None:
    printed("compress", work / "model", "-o", work / "rough", "--recipe", "int2:g16", "--evaluation", "none")
    text = ("--text", work / "evaluation.txt", "--tokens", "256", "--window", "32", "--measure", "2")
    found = printed("diagnose", work / "model", work / "rough", *text)
    named = {**found, "culprit": {"layer": "model.layers.0", "why": "it may be none, too"}}
    compare("diagnose", found, named)


def test_calibrate_and_merge(work: Path) -> None:
    arguments = ("--calibration", work / "calibration.txt", "--calibration-tokens", "500")
    found = printed("calibrate", work / "experts", "-o", work / "statistics", *arguments)
    compare("calibrate", found)
    merged = printed("merge", work / "statistics", work / "statistics", "-o", work / "merged")
    assert set(merged) == set(printed("inspect", work / "merged")) == set(found) - {"seconds"}


def test_recipes_and_doctor(work: Path) -> None:
    plain = printed("recipes")
    compare("recipes", plain, printed("recipes", "--for", work / "model"))
    assert all(set(preset) == {"recipe", "description", "bits"} for preset in plain["presets"].values())
    compare("doctor", printed("doctor"))
