"""Profiles: what they say is what encoding gives; plans of them become artifacts; budgets over mixtures are met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tiny, make_tiny_talker
from transformers.utils import logging
from typer.testing import CliRunner

import tenpak
from tenpak import cli
from tenpak.allocation.allocate import allocate
from tenpak.allocation.budget import Budget
from tenpak.allocation.profile import Profile, ProfiledTensor
from tenpak.allocation.saved_plan import SavedPlan
from tenpak.allocation.sensitivity import predicted_loss
from tenpak.artifact.reader import open_artifact
from tenpak.calibrating import calibrate
from tenpak.calibration.statistics import StatisticsFolder
from tenpak.checkpoint.source import open_checkpoint
from tenpak.cli import console
from tenpak.errors import AllocationError, BudgetError, CalibrationError, OutputExistsError, RecipeError
from tenpak.job import open_job
from tenpak.profiling import Candidates, profile, tries

logging.disable_progress_bar()
logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens for layers")

CALIBRATION = "the cat sat on the mat and looked at the moon, which was as round as a cheese.\n" * 40
EVALUATION = "a moon of cheese was on the mat, and the cat looked at it as it sat.\n" * 20
CANDIDATES = ("gptq-int2:g8,int3:g16,gptq-int4:g16,int8:row,dense",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiling")
    make_tiny_talker(folder / "model", tie_word_embeddings=True, hidden_size=64, intermediate_size=128)
    (folder / "calibration.txt").write_text(CALIBRATION)
    (folder / "evaluation.txt").write_text(EVALUATION)
    calibrate(folder / "model", folder / "statistics", calibration=folder / "calibration.txt")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Profile:
    return profile(
        folder / "model",
        folder / "profile.json",
        candidates=CANDIDATES,
        calibration=folder / "calibration.txt",
        statistics=folder / "statistics",
        measure=6,
    )


def of(found: Profile, name: str) -> ProfiledTensor:
    return next(tensor for tensor in found.tensors if tensor.name == name)


def test_every_tensor_is_there_and_every_candidate_tried(found: Profile) -> None:
    able = [tensor for tensor in found.tensors if tensor.options]
    assert len(able) == 1 + 2 * 7
    for tensor in able:
        assert [option.recipe for option in tensor.options] == CANDIDATES[0].split(",")
        assert tensor.options[-1].bytes == tensor.bytes
        assert tensor.options[-1].loss == 0
        losses = [option.loss for option in tensor.options]
        assert losses[0] > losses[2] > losses[3] > 0
    assert of(found, "model.layers.1.self_attn.v_proj.weight").fused == "block 1: qkv"
    assert of(found, "model.layers.0.mlp.gate_proj.weight").fused == "block 0: up"
    assert of(found, "model.embed_tokens.weight").fused is None


def test_predictions_are_near_what_is_measured(found: Profile) -> None:
    """A second-order prediction of a random model's loss; the sixfold range is far narrower than the losses' own."""
    assert len(found.measured) == 6
    for measured in found.measured:
        assert measured.predicted / 6 < measured.kl < measured.predicted * 6
    order = sorted(found.measured, key=lambda m: m.predicted)
    assert order[-1].kl > order[0].kl


def test_the_loss_is_that_of_the_formula(folder: Path, found: Profile) -> None:
    """Of a layer and of a tied embedding, in plain FP64."""
    job = open_job(folder / "model", None, ())
    known = StatisticsFolder(folder / "statistics")
    checkpoint = open_checkpoint(folder / "model")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        weight = next(entry.weight for entry in job.plan.entries if entry.weight.name == name)
        tensor, (s,) = checkpoint.read(name), known.of(weight)
        assert s is not None
        assert s.hessian is not None
        assert s.output_curvature is not None
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        loss = predicted_loss(weight, tensor, [tensor + noise], [s], known.origin.tokens)
        error = noise.double()
        expected = ((error @ s.hessian.double() * error).sum(1) * s.output_curvature.double()).sum() / 2
        if s.input_curvature is not None and s.token_frequency is not None:
            looked_up = error.square() @ s.input_curvature.double()
            expected += (looked_up * s.token_frequency.double()).sum() / 2
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_a_plan_becomes_the_artifact_that_it_predicts(folder: Path, found: Profile) -> None:
    plan = allocate(found, Budget("ratio", 5))
    plan.write(folder / "plan.json")
    report = tenpak.compress(
        folder / "model", folder / "planned", plan=folder / "plan.json", calibration=folder / "calibration.txt"
    )
    assert report.bytes == plan.bytes
    assert 0.98 * 4 * report.parameters / 5 <= report.bytes <= 4 * report.parameters / 5
    manifest = open_artifact(folder / "planned").manifest
    dense = {tensor.name for tensor in plan.tensors if tensor.recipe == "dense"}
    assert set(manifest.weights) == {tensor.name for tensor in plan.tensors} - dense
    again = tenpak.compress(
        folder / "model",
        folder / "by hand",
        recipe=report.recipe,
        overrides=manifest.overrides,
        calibration=folder / "calibration.txt",
    )
    assert again.bytes == report.bytes


def test_plans_are_read_strictly(folder: Path, found: Profile, tmp_path: Path) -> None:
    plan = allocate(found, Budget("ratio", 5))

    def refused(tensors: list[dict[str, Any]], message: str, model: Path = folder / "model", **more: Any) -> None:
        content = {**plan.model_dump(), "tensors": tensors, **more}
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(AllocationError, match=message) as caught:
            tenpak.compress(model, tmp_path / "out", plan=tmp_path / "plan.json")
        assert caught.value.hint
        assert not (tmp_path / "out").exists()

    good = [tensor.model_dump() for tensor in plan.tensors]
    name = good[3]["name"]
    refused(good[1:], f"says nothing of '{good[0]['name']}'")
    refused([*good, {**good[0], "name": "model.layers.7.mlp.up_proj.weight"}], "which the model does not have")
    refused([*good, {**good[0], "name": "model.norm.weight"}], "cannot be compressed")
    refused([*good[:3], {**good[3], "recipe": "int99"}, *good[4:]], name)
    refused([*good, good[0]], "twice")
    refused(good, "another model", source_sha256="0" * 64)
    refused(good, "does not have|another model|says nothing", model=make_tiny("gpt2", tmp_path / "gpt2"))
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    with pytest.raises(RecipeError, match="excludes a recipe"):
        tenpak.compress(folder / "model", tmp_path / "out", plan=tmp_path / "plan.json", recipe="int4")
    with pytest.raises(BudgetError, match="excludes a plan"):
        tenpak.compress(folder / "model", tmp_path / "out", plan=tmp_path / "plan.json", budget="8x")


def test_edited_plans_are_followed(folder: Path, found: Profile, tmp_path: Path) -> None:
    plan = allocate(found, Budget("ratio", 5))
    name = "model.layers.1.mlp.down_proj.weight"
    edited = [t.model_copy(update={"recipe": "nf3:g16"}) if t.name == name else t for t in plan.tensors]
    plan.model_copy(update={"tensors": tuple(edited)}).write(tmp_path / "plan.json")
    tenpak.compress(
        folder / "model", tmp_path / "out", plan=tmp_path / "plan.json", calibration=folder / "calibration.txt"
    )
    assert open_artifact(tmp_path / "out").manifest.weights[name].codec["id"].startswith("normalfloat/")


@pytest.mark.parametrize("budget", ["4.5bpw", "6bpw", "7bpw"])
def test_budgets_of_size_over_mixtures(folder: Path, budget: str, tmp_path: Path) -> None:
    report = tenpak.compress(
        folder / "model",
        tmp_path / "out",
        budget=budget,
        candidates=("gptq-int2:g32,gptq-int2:g16,gptq-int3:g32,int4:g32,int6:g32,int8:row", "*.up_proj=trellis"),
        overrides=["*.o_proj=int8:row"],
        calibration=folder / "calibration.txt",
        statistics=folder / "statistics",
        tuning=0,
    )
    limit = float(budget.removesuffix("bpw")) * report.parameters / 8
    assert limit * 0.99 <= report.bytes <= limit  # a tensor of this model is a per cent of it
    weights = open_artifact(tmp_path / "out").manifest.weights
    assert {entry.codec["id"] for name, entry in weights.items() if "up_proj" in name} == {"trellis/1"}
    assert all(entry.codec["bits"] == 8 for name, entry in weights.items() if "o_proj" in name)
    assert report.search is not None
    assert report.search["promise"]["kept"]
    assert report.search["promise"]["reached"] == report.bytes
    assert not list(tmp_path.glob(".out.*"))


def test_budgets_of_quality_over_mixtures(folder: Path, tmp_path: Path) -> None:
    report = tenpak.compress(
        folder / "model",
        tmp_path / "out",
        budget="kl=0.01",
        candidates=("default",),
        calibration=folder / "calibration.txt",
        evaluation=folder / "evaluation.txt",
        tuning=0,
    )
    assert report.quality is not None
    assert report.search is not None
    assert report.quality["kl"] <= 0.01
    assert report.search["promise"] == {"limit": 0.01, "reached": report.quality["kl"], "kept": True}
    assert report.search["tokens_for_5_percent"] > 0


def test_a_limit_below_the_noise_says_how_much_text_it_takes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="below the noise") as caught:
        tenpak.compress(
            folder / "model",
            tmp_path / "out",
            budget="ppl=0.0001%",
            calibration=folder / "calibration.txt",
            evaluation=folder / "evaluation.txt",
            tuning=0,
        )
    assert "tokens" in str(caught.value.hint)


def test_a_run_that_was_stopped_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    tried = tries._tried

    def counting(codec: Any, weight: Any, *rest: Any) -> tuple[int, float]:
        calls.append(weight.name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return tried(codec, weight, *rest)

    options: dict[str, Any] = {"candidates": CANDIDATES, "statistics": folder / "statistics"}
    monkeypatch.setattr(tries, "_tried", counting)
    with pytest.raises(KeyboardInterrupt):
        profile(folder / "model", tmp_path / "profile.json", **options)
    assert not (tmp_path / "profile.json").exists()
    before = len(calls)
    with next(tmp_path.glob(".profile.json.work-*/passes/profile.jsonl")).open("a") as file:
        file.write('\n{"tensor": "model.layers.1.mlp.up_proj.weight", "recipe": "int3:g16", "by')  # cut short
    again = profile(folder / "model", tmp_path / "profile.json", **options)
    assert len(calls) - before < 15 * 4 - 15
    monkeypatch.undo()
    assert again == profile(folder / "model", tmp_path / "other.json", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss", "opt"])
def test_families(family: str, tmp_path: Path) -> None:
    """Conv1D, experts apart and stacked, positions of which nothing is known."""
    model = make_tiny_talker(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(CALIBRATION)
    found = profile(model, tmp_path / "p.json", candidates=("int2:g16,int8:row",), calibration=tmp_path / "text.txt")
    able = [tensor for tensor in found.tensors if tensor.options]
    assert all(tensor.options[0].loss > tensor.options[1].loss > 0 for tensor in able)
    plan = allocate(found, Budget("bpw", 9))
    plan.write(tmp_path / "plan.json")
    experts = {t.name: t.recipe for t in plan.tensors if "experts" in t.name}
    groups = {tensor.name: tensor.group for tensor in found.tensors}
    for group in {groups[name] for name in experts}:
        assert len({recipe for name, recipe in experts.items() if groups[name] == group}) == 1
    report = tenpak.compress(model, tmp_path / "out", plan=tmp_path / "plan.json")
    assert report.bytes == plan.bytes


def test_candidates_are_read_as_they_are_written() -> None:
    found = Candidates.parse(["INT4:g32, int8:row", '*.mlp.*={"id":"uniform/1","bits":3,"group":16},int4:g32,int4:g32'])
    assert found.rules[0] == ("*", ("int4:g32", "int8:row"))
    assert len(found.rules[1][1]) == 2
    assert Candidates.parse(found.to_json()) == found
    assert Candidates.parse(["lowrank:bpw=4"]).rules == (("*", ("lowrank:bpw=4.0",)),)
    for wrong in ("", "=int4", "up=", "int99", "up=int4:g32,,no"):
        with pytest.raises(RecipeError):
            Candidates.parse([wrong])


def test_what_cannot_be_profiled_is_refused(folder: Path, found: Profile, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        profile(folder / "model", folder / "profile.json")
    with pytest.raises(RecipeError, match="no candidate is meant for"):
        profile(folder / "model", tmp_path / "p.json", candidates=("*.up_proj=int4",), statistics=folder / "statistics")
    with pytest.raises(CalibrationError, match="text to measure on"):
        profile(folder / "model", tmp_path / "p.json", statistics=folder / "statistics", measure=3)
    with pytest.raises(BudgetError, match="need a budget"):
        tenpak.compress(folder / "model", tmp_path / "out", candidates=("int4",))
    with pytest.raises(CalibrationError, match="takes statistics"):
        tenpak.compress(folder / "model", tmp_path / "out", candidates=("int4",), budget="4bpw", calibration="none")


def test_the_command_line(folder: Path, found: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)

    def run(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.output
        return done.stdout

    text = ("--calibration", folder / "calibration.txt")
    shown = run(
        "profile", folder / "model", "-o", tmp_path / "p.json", *text, "--candidates", CANDIDATES[0], "--measure", 4
    )
    assert "predicted loss" in shown
    assert "rank correlation" in shown
    shown = run("allocate", tmp_path / "p.json", "-o", tmp_path / "plan.json", "--target", "5x", "--fused")
    assert "no plan is better" in shown or "above the best" in shown
    plan = SavedPlan.read(tmp_path / "plan.json")
    report = json.loads(
        run("encode", folder / "model", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", *text, "--json")
    )
    assert report["bytes"] == plan.bytes
    mixed = ("compress", folder / "model", "-o", tmp_path / "mixed", "--bpw", 6, "--candidates", CANDIDATES[0], *text)
    report = json.loads(run(*mixed, "--tune", 0, "--strict", "--json"))
    assert report["search"]["promise"]["kept"]


def test_a_budget_that_is_missed_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)
    missed = {"limit": 1.0, "reached": 2.0, "kept": False}
    monkeypatch.setattr("tenpak.pipeline.promise", lambda *_: missed)
    arguments = [str(folder / "model"), "--bpw", "6", "--tune", "0", "--calibration", str(folder / "calibration.txt")]
    done = CliRunner().invoke(cli.app, ["compress", *arguments, "-o", str(tmp_path / "a")])
    assert done.exit_code == 0
    assert "missed" in done.output
    assert "MISSED" in done.output
    assert CliRunner().invoke(cli.app, ["compress", *arguments, "-o", str(tmp_path / "b"), "--strict"]).exit_code == 1
