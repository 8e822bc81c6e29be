"""The dial: budgets of size are met to half a per cent by the written files, those of quality by what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import make_tiny_talker
from safetensors.torch import load_file
from transformers.utils import logging

import tenpak
import tenpak.knobs as knobs
import tenpak.pipeline as pipeline
import tenpak.recovery as recovery
from tenpak.allocation.profile import Profile
from tenpak.errors import BudgetError, CalibrationError, InfeasibleBudgetError
from tenpak.report.report import Report

logging.disable_progress_bar()
logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens for layers")

CALIBRATION = "the cat sat on the mat and looked at the moon, which was as round as a cheese.\n" * 40
EVALUATION = "a moon of cheese was on the mat, and the cat looked at it as it sat.\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dial")
    make_tiny_talker(folder / "model")
    (folder / "calibration.txt").write_text(CALIBRATION)
    (folder / "evaluation.txt").write_text(EVALUATION)
    return folder


def compressed(folder: Path, name: str, **options: object) -> Report:
    options = {"calibration": folder / "calibration.txt", "tuning": 0, **options}
    return tenpak.compress(folder / "model", folder / name, **options)


def weight_bytes(artifact: Path) -> int:
    return sum(path.stat().st_size for path in artifact.glob("*.safetensors"))


@pytest.fixture(scope="module")
def five_bits(folder: Path) -> Report:
    return compressed(folder, "five", budget="5bpw")


def test_a_budget_of_size_is_met_by_the_written_files(folder: Path, five_bits: Report) -> None:
    limit = 5 * five_bits.parameters // 8
    assert limit * 0.995 <= weight_bytes(folder / "five") <= limit
    assert five_bits.bytes == weight_bytes(folder / "five")
    assert five_bits.search is not None
    assert five_bits.search["budget"] == "5bpw"
    assert five_bits.search["trials"][-1]["cost"] == five_bits.bytes
    assert set(five_bits.codecs) == {"trellis/1"}  # embeddings and head as well
    assert not list(folder.glob(".five.*"))  # neither work nor passes are left


def test_the_recorded_recipe_gives_the_same_bytes(folder: Path, five_bits: Report) -> None:
    step = five_bits.search["trials"][-1]["value"] if five_bits.search else None
    assert five_bits.recipe == f"trellis:{step!r}"
    compressed(folder, "again", recipe=five_bits.recipe, overrides=[f"*={five_bits.recipe}"])
    for path in sorted((folder / "five").glob("*.safetensors")):
        assert path.read_bytes() == (folder / "again" / path.name).read_bytes()


def test_overrides_hold_and_count(folder: Path) -> None:
    report = compressed(folder, "mixed", budget="7bpw", overrides=["*embed*=int8:row"], propagation="none")
    limit = 7 * report.parameters // 8
    assert limit * 0.995 <= report.bytes <= limit
    assert set(report.codecs) == {"trellis/1", "uniform/1"}


def test_what_is_set_counts_what_it_will_take(folder: Path) -> None:
    """Embeddings in two bits leave room that their FP32 would not."""
    overrides = ["*embed*=int2:g32", "lm_head=ec-int4:g32"]
    least = compressed(folder, "least", recipe="trellis:1.0", overrides=["*=trellis:1.0", *overrides])
    tensors = load_file(folder / "model" / "model.safetensors")
    dense = sum(4 * tensor.numel() for name, tensor in tensors.items() if "embed" in name or "lm_head" in name)
    budget = int(1.3 * least.bytes)
    assert budget < dense
    compressed(folder, "fixed", budget=f"{budget}B", overrides=overrides, propagation="none")
    assert budget * 0.995 <= weight_bytes(folder / "fixed") <= budget


def test_without_data_the_same_codec_works(folder: Path) -> None:
    report = compressed(folder, "quick", budget="5bpw", calibration="none")
    limit = 5 * report.parameters // 8
    assert limit * 0.995 <= report.bytes <= limit
    assert report.recipe.endswith(":datafree")
    assert report.calibration is None


def test_a_budget_of_quality_is_measured(folder: Path) -> None:
    report = compressed(folder, "close", budget="kl=0.02", evaluation=folder / "evaluation.txt")
    assert report.quality is not None
    assert report.quality["kl"] <= 0.02
    assert report.search is not None
    assert report.search["trials"][-1]["cost"] == pytest.approx(report.quality["kl"], rel=1e-6)


@pytest.mark.parametrize("shards", [10**9, 20_000])
def test_what_was_measured_in_a_search_is_not_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    measured: list[str] = []
    evaluate = pipeline.evaluate_apart

    def counted(out: Path, *rest: object) -> object:
        measured.append(out.name)
        return evaluate(out, *rest)

    monkeypatch.setattr(pipeline, "evaluate_apart", counted)
    name, text = f"once-{shards}", folder / "evaluation.txt"
    report = compressed(folder, name, budget="kl=0.02", evaluation=text, max_shard_bytes=shards)
    assert report.search is not None
    assert report.quality is not None
    assert 1 <= len(measured) <= len(report.search["trials"])
    assert name not in measured
    assert tenpak.evaluate(folder / name, text=text, against=folder / "model").kl == pytest.approx(report.quality["kl"])


def test_a_limit_that_only_predictions_exceed_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the finest candidates are predicted to lose is too much; what they are measured to lose decides."""
    profiled = knobs.profiled

    def dark(*arguments: Any) -> Profile:
        profile = profiled(*arguments)
        tensors = [
            tensor.model_copy(update={"options": [o.model_copy(update={"loss": 1e3 + o.loss}) for o in tensor.options]})
            for tensor in profile.tensors
        ]
        return profile.model_copy(update={"tensors": tuple(tensors)})

    monkeypatch.setattr(knobs, "profiled", dark)
    options: dict[str, object] = {"candidates": ["int8:g32"], "evaluation": folder / "evaluation.txt"}
    report = compressed(folder, "dark", budget="kl=0.5", **options)
    assert report.quality is not None
    kl = report.quality["kl"]
    assert 0 < kl < 0.5
    with pytest.raises(InfeasibleBudgetError, match="the nearest that was reached"):
        compressed(folder, "darker", budget=f"kl={kl / 2:.9f}", **options)
    assert not (folder / "darker").exists()


@pytest.mark.parametrize("budget", ["400x", "31bpw"])
def test_a_budget_out_of_reach_says_what_is_in_reach(folder: Path, budget: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"nearest that can be reached is about [\d,]+ bytes"):
        compressed(folder, "never", budget=budget)
    assert not (folder / "never").exists()
    assert len(list(folder.glob(".never.work-*"))) == 1  # statistics are kept, whatever budget is tried next


def test_a_budget_needs_something_to_turn(folder: Path) -> None:
    with pytest.raises(InfeasibleBudgetError, match="every tensor a codec of its own"):
        compressed(folder, "never", budget="5bpw", overrides=["*=int4:g32"])


def test_budgets_that_make_no_sense_are_refused(folder: Path) -> None:
    with pytest.raises(BudgetError, match="excludes a recipe"):
        compressed(folder, "never", budget="10x", recipe="int4")
    with pytest.raises(BudgetError, match="measured on a text"):
        compressed(folder, "never", budget="kl=0.1")
    with pytest.raises(BudgetError, match="not a budget"):
        compressed(folder, "never", budget="small")
    assert not (folder / "never").exists()


def test_a_search_that_was_stopped_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and finished passes are found again, and the bytes are those of an undisturbed search."""
    whole = compressed(folder, "whole", budget="6bpw")
    publish = pipeline.publish

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        compressed(folder, "stopped", budget="6bpw")
    monkeypatch.setattr(pipeline, "publish", publish)
    again = compressed(folder, "stopped", budget="6bpw")
    assert again.reused > 0
    assert again.search == whole.search
    assert (folder / "stopped" / "model.safetensors").read_bytes() == (
        folder / "whole" / "model.safetensors"
    ).read_bytes()


def test_what_is_tuned_meets_its_budget_and_is_nearer(folder: Path) -> None:
    tuned = compressed(folder, "tuned", budget="4bpw", evaluation=folder / "evaluation.txt", tuning=80)
    limit = 4 * tuned.parameters // 8
    assert limit * 0.995 <= weight_bytes(folder / "tuned") <= limit
    assert tuned.calibration is not None
    about = tuned.calibration["tuning"]
    assert about["kept"]
    assert about["kl"][1] < about["kl"][0]
    by_hand = {"recipe": tuned.recipe, "overrides": [f"*={tuned.recipe}"]}
    plain = compressed(folder, "plain", **by_hand, evaluation=folder / "evaluation.txt")
    assert plain.quality is not None
    assert tuned.quality is not None
    assert tuned.quality["kl"] < plain.quality["kl"]
    # The recipe and the steps that were recorded give the same bytes.
    compressed(folder, "again", **by_hand, tuning=80, overwrite=True)
    assert (folder / "again" / "model.safetensors").read_bytes() == (
        folder / "tuned" / "model.safetensors"
    ).read_bytes()
    assert not list(folder.glob(".*.work-*tuned*"))


def test_tuning_is_the_default_of_a_budget_only(folder: Path) -> None:
    report = compressed(folder, "default", budget="4bpw", tuning=None)
    assert report.calibration is not None
    assert report.calibration["tuning"]["steps"] == 240
    report = compressed(folder, "default", recipe="gptq-int4:g32", tuning=None, overwrite=True)
    assert report.calibration is not None
    assert "tuning" not in report.calibration


def test_tuning_needs_a_text(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="needs a text"):
        compressed(folder, "never", budget="5bpw", calibration="none", tuning=10)
    (folder / "short.txt").write_text("a moon")
    with pytest.raises(CalibrationError, match="too short to tune on"):
        compressed(folder, "never", budget="5bpw", calibration=folder / "short.txt", tuning=10)
    assert not (folder / "never").exists()


def test_without_memory_for_two_models_nothing_is_tuned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "memory", lambda *_: 10**18)
    with pytest.warns(UserWarning, match="not tuned"):
        report = compressed(folder, "untuned", budget="5bpw", tuning=None)
    assert report.calibration is not None
    assert "tuning" not in report.calibration
