"""The whole diagnosis: its JSON, a planted culprit, bad input, the command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from families import make_tiny
from typer.testing import CliRunner

import tenpak
from tenpak import cli
from tenpak.cli import console
from tenpak.errors import CorruptArtifactError, EvaluationError, TenpakError
from tenpak.evaluation.diagnostics import diagnose, diagnosis, generation
from tenpak.evaluation.fidelity import fidelity

KEYS = {
    "": {"original", "artifact", "text", "text_sha256", "tokens", "layers", "culprit", "weights", "step", "generation",
         "verdict", "same_source", "kl", "embedding"},
    "layers": {"name", "depth", "cosine", "norm_ratio", "relative_error", "own_error", "peak_original", "peak",
               "outliers_original", "outliers"},
    "weights": {"name", "shape", "matrices", "codec", "bytes", "dense_bytes", "bits_per_weight", "relative_error",
                "kurtosis", "outlier_share", "effective_rank", "rank", "energy", "sampled", "kl", "expected_kl"},
    "step": {"prompt", "original", "compressed", "entropy_original", "entropy", "kl", "diverges_at", "agreed"},
    "generation": {"prompt", "original", "compressed", "first_divergence", "repetition_original", "repetition",
                   "distinct_2_original", "distinct_2"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_continuations() -> Iterator[None]:
    """What is generated has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "NEW_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def ruined(talker):
    """A model of five blocks, the third one ruined."""
    return talker(overrides=("model.layers.2.*=int2:row",), num_hidden_layers=5)


@pytest.fixture(scope="module")
def found(ruined):
    return diagnose(ruined.source, ruined.artifact, text=ruined.text, measure=4)


def test_json_is_as_agreed(found, ruined) -> None:
    content = found.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert set(content) == KEYS[""]
    for part in ("layers", "weights", "generation"):
        assert content[part]
        assert all(set(entry) == KEYS[part] for entry in content[part])
    assert set(content["step"]) == KEYS["step"]
    assert set(content["step"]["original"][0]) == {"token", "probability"}
    assert set(content["culprit"]) == {"layer", "why"}
    assert (content["original"], content["artifact"]) == ("source", str(ruined.artifact))
    assert content["text"] == "text.txt"
    assert sum(weight["kl"] is not None for weight in content["weights"]) == 4
    assert [len(point) for point in content["weights"][0]["energy"]] == [2] * 5
    assert len(content["generation"]) == 2
    assert content["step"]["prompt"] == content["generation"][0]["prompt"]


def test_the_planted_culprit_is_named(found) -> None:
    assert found.activations.culprit is not None
    assert found.activations.culprit.layer == "model.layers.2"
    assert found.verdict[0].startswith("the error starts in model.layers.2: ")
    costs = found.bill.tensors
    assert max(costs, key=costs.get).startswith("model.layers.2.")


def test_the_divergence_is_that_of_fidelity(found, talker, ruined) -> None:
    pair = ruined.open()
    length = pair.windows[0].stop
    assert found.bill.kl == pytest.approx(
        fidelity(pair.original, pair.compressed, pair.tokens, window=length, stride=length).kl, rel=1e-6
    )


@pytest.mark.parametrize(("family", "changes"), [("gpt2", {}), ("qwen2", {}), ("mixtral", {}), ("mamba", {}),
                                                 ("llama", {"num_hidden_layers": 1})])  # fmt: skip
def test_other_families(family: str, changes: dict, talker) -> None:
    made = talker(family, **changes)
    content = diagnose(made.source, made.artifact, text=made.text, tokens=700, measure=1).to_json()
    json.dumps(content, allow_nan=False)
    assert all(math.isfinite(layer["cosine"]) for layer in content["layers"])
    assert content["verdict"]


def test_what_is_not_finite_is_null(talker, monkeypatch) -> None:
    made = talker()
    opened = diagnosis.open_pair

    def broken(*arguments, **options):
        pair = opened(*arguments, **options)
        with torch.no_grad():
            pair.compressed.model.layers[0].input_layernorm.weight[0] = math.nan
        return pair

    monkeypatch.setattr(diagnosis, "open_pair", broken)
    result = diagnose(made.source, made.artifact, text=made.text, measure=1)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["kl"] is None
    assert content["layers"][0]["cosine"] is None
    assert content["culprit"]["layer"] == "model.layers.0"
    assert content["step"]["kl"] is None
    assert "cannot be used" in content["verdict"][0]


# Bad input -------------------------------------------------------------------------------------------------------


def test_another_model_is_refused(talker) -> None:
    other = talker(vocab_size=160)
    with pytest.raises(EvaluationError, match="made from another model"):
        diagnose(other.source, talker().artifact, text=other.text)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_that_is_too_short(text: str, talker, tmp_path) -> None:
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(TenpakError) as refused:
        diagnose(talker().source, talker().artifact, text=tmp_path / "short.txt")
    assert refused.value.hint


def test_a_damaged_artifact(talker, tmp_path) -> None:
    shutil.copytree(talker().artifact, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    with pytest.raises(CorruptArtifactError):
        diagnose(talker().source, tmp_path / "damaged", text=talker().text)


@pytest.mark.parametrize("options", [{"tokens": 1}, {"measure": -1}, {"window": 0}])
def test_options_out_of_range(options: dict, talker) -> None:
    with pytest.raises(EvaluationError, match="cannot diagnose"):
        diagnose(talker().source, talker().artifact, text=talker().text, **options)


def test_an_original_without_a_tokenizer(talker, tmp_path) -> None:
    make_tiny("llama", tmp_path / "model")
    tenpak.compress(tmp_path / "model", tmp_path / "artifact")
    with pytest.raises(EvaluationError, match="no tokenizer"):
        diagnose(tmp_path / "model", tmp_path / "artifact", text=talker().text)


# Command line ----------------------------------------------------------------------------------------------------


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: object):
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)
    return CliRunner().invoke(cli.app, ["diagnose", *map(str, arguments)])


def test_tables_for_people_and_a_file_for_machines(ruined, tmp_path, monkeypatch) -> None:
    options = ("--text", ruined.text, "--measure", 2, "--prompt", "The cat", "-o", tmp_path / "found.json")
    result = invoke(monkeypatch, ruined.source, ruined.artifact, *options)
    assert result.exit_code == 0, result.stderr
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["generation"][0]["prompt"] == "The cat"
    assert [entry["prompt"] for entry in written["generation"]] == ["The cat"]
    lines = result.stdout.splitlines()
    for name in (f"model.layers.{depth}" for depth in range(5)):
        assert any(line.split()[:1] == [name] for line in lines), name
    worst = max((w for w in written["weights"] if w["kl"] is not None), key=lambda weight: weight["kl"])
    row = next(line for line in lines if line.startswith(worst["name"]))
    assert f"{worst['kl']:.5f}" in row
    assert "~" not in row
    assert f"… and {len(written['weights']) - 16} more" in result.stdout
    assert all(f"- {sentence}" in lines for sentence in written["verdict"])
    assert "the next token after 'The cat'" in lines
    assert str(tmp_path / "found.json") in result.stderr.replace("\n", "")


def test_json_alone_is_on_stdout(talker, monkeypatch) -> None:
    made = talker()
    result = invoke(monkeypatch, made.source, made.artifact, "--text", made.text, "--measure", 0, "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert set(content) == KEYS[""]
    assert all(weight["kl"] is None for weight in content["weights"])


def test_a_file_that_cannot_be_written_is_told_before_anything_is_done(talker, tmp_path, monkeypatch) -> None:
    result = invoke(monkeypatch, talker().source, talker().artifact, "-o", tmp_path / "no" / "file.json")
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr
