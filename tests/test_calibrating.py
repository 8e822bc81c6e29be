"""Calibrated recipes from text to artifact: what they are worth, what is recorded, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import make_tiny_talker

import tenpak
from tenpak.artifact.schema import MANIFEST_NAME, load_manifest
from tenpak.calibration.overlap import overlap
from tenpak.errors import CalibrationError
from tenpak.report.report import measured

TEXT = "the moon and the sun went over the sea and the star sat on the moon. " * 60
OTHER = "a star sat over the sun and the sea went on. " * 20


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_talker(tmp_path_factory.mktemp("calibrate") / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


pytestmark = pytest.mark.filterwarnings("ignore:.*are advised:UserWarning")


def test_gptq_costs_less_than_half_at_the_same_bytes(tinystories: Path, tmp_path: Path) -> None:
    """Bar: 0.45 × the KL of nearest for int4 g32, which 131,072 tokens reach; 16,384 must reach 0.6."""
    found = {}
    for recipe in ("int4:g32", "gptq-int4:g32:search:sweeps=2"):
        report = tenpak.compress(
            tinystories, tmp_path / "out", recipe=recipe, calibration_tokens=16_384, overwrite=True
        )
        text = tmp_path / "evaluation.txt"
        text.write_text((tinystories / "texts" / "evaluation.txt").read_text()[:20_000])
        found[recipe] = report.bytes, tenpak.evaluate(tmp_path / "out", against=tinystories, text=text).kl
    (plain_bytes, plain), (bytes_, kl) = found.values()
    assert bytes_ == plain_bytes
    assert kl < 0.6 * plain


def test_the_manifest_records_the_text(talker: Path, text: Path, tmp_path: Path) -> None:
    tenpak.compress(talker, tmp_path / "out", recipe="gptq-int4:g32", calibration=text, calibration_tokens=1000)
    recorded = load_manifest(tmp_path / "out" / MANIFEST_NAME).calibration
    assert recorded is not None
    assert (recorded["text"], recorded["tokens"]) == ("text.txt", 1000)
    tenpak.compress(talker, tmp_path / "plain", recipe="int4:g32", calibration=text)
    assert load_manifest(tmp_path / "plain" / MANIFEST_NAME).calibration is None


def test_same_inputs_same_bytes(talker: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tenpak.compress(talker, tmp_path / name, recipe="gptq-int3:g32", calibration=text)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_statistics_reach_the_weights(talker: Path, text: Path, tmp_path: Path) -> None:
    tenpak.compress(talker, tmp_path / "gptq", recipe="gptq-int3:g32", calibration=text)
    tenpak.compress(talker, tmp_path / "nearest", recipe="int3:g32")
    name = "model.layers.0.mlp.down_proj.weight"
    decoded = [tenpak.open_artifact(tmp_path / kind).decode(name) for kind in ("gptq", "nearest")]
    assert not torch.equal(*decoded)


def test_a_model_without_a_text_of_its_own_is_asked_for_one(talker: Path, tmp_path: Path) -> None:
    tenpak.compress(talker, tmp_path / "out", recipe="gptq-int4:g32", calibration_tokens=200)
    recorded = load_manifest(tmp_path / "out" / MANIFEST_NAME).calibration
    assert recorded is not None
    assert recorded["text"].startswith("sampled from the model")


def test_the_evaluation_text_is_never_the_calibration_text(talker: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="are the same"):
        tenpak.compress(talker, tmp_path / "out", recipe="gptq-int4:g32", calibration=text, evaluation=text)
    assert not (tmp_path / "out").exists()
    # A recipe that reads no calibration text may be measured on any.
    tenpak.compress(talker, tmp_path / "out", recipe="int4:g32", calibration=text, evaluation=text)


def test_an_evaluation_text_that_was_calibrated_on_in_part_is_refused_unless_allowed(
    talker: Path, text: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed.txt"
    other = "".join(f"{number} mice saw {number * number} stars over the hill of {number}. " for number in range(100))
    mixed.write_text(other + TEXT[:2000])
    share = overlap(mixed.read_text(), TEXT)
    assert 0.2 < share < 0.6
    options = {"recipe": "gptq-int4:g32", "calibration": text, "evaluation": mixed}
    with pytest.raises(CalibrationError, match=rf"{share:.1%} of the evaluation text \(mixed.txt\) occurs in") as error:
        tenpak.compress(talker, tmp_path / "out", **options)
    assert "--allow-overlap" in str(error.value.hint)
    assert not (tmp_path / "out").exists()
    report = tenpak.compress(talker, tmp_path / "out", **options, allow_overlap=True)
    assert report.overlap == share
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overlap"] == share
    assert measured(tmp_path / "out").overlap == share
    with pytest.raises(CalibrationError, match="are the same"):  # that is never allowed
        tenpak.compress(talker, tmp_path / "never", **{**options, "evaluation": text}, allow_overlap=True)


def test_little_overlap_is_recorded_and_that_with_a_sampled_text_is_not(
    talker: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text(OTHER)
    options = {"recipe": "gptq-int4:g32", "calibration_tokens": 200, "evaluation": tmp_path / "other.txt"}
    assert tenpak.compress(talker, tmp_path / "out", calibration=text, **options).overlap == 0
    assert tenpak.compress(talker, tmp_path / "sampled", **options).overlap is None


def test_embeddings_are_rounded_with_both_of_their_uses(talker: Path, text: Path, tmp_path: Path) -> None:
    """The embedding's statistics take a backward pass, which is made when its codec needs them."""
    tenpak.compress(talker, tmp_path / "out", calibration=text, overrides=("embed*=gptq-int4:g32",))
    tenpak.compress(talker, tmp_path / "plain", overrides=("embed*=int4:g32",))
    name = "model.embed_tokens.weight"
    calibrated, plain = (tenpak.open_artifact(tmp_path / kind).decode(name) for kind in ("out", "plain"))
    assert calibrated.shape == plain.shape
    # Untied, its errors do not mix: the metric is diagonal, and every weight takes the nearest level.
    assert torch.equal(calibrated, plain)


def test_few_tokens_are_warned_about(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(OTHER)
    with pytest.warns(UserWarning, match="are advised"):
        tenpak.compress(talker, tmp_path / "out", recipe="gptq-int4:g32", calibration=tmp_path / "short.txt")
