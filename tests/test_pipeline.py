"""The straight line: same inputs, same bytes; what is recorded; what is kept; quality from a fresh process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
from families import make_tiny, make_tiny_talker
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import tenpak
import tenpak.measuring as measuring
from tenpak.artifact.reader import open_artifact
from tenpak.artifact.schema import MANIFEST_NAME, load_manifest
from tenpak.checkpoint.source import open_checkpoint
from tenpak.errors import CalibrationError, CodecError, EvaluationError, OutputExistsError, RecipeError
from tenpak.recipes import parse
from tenpak.report.report import Report

logging.disable_progress_bar()
logging.set_verbosity_error()

TEXT = "the cat sat on the mat and looked at the moon, which was as round as a cheese.\n" * 8


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_talker(tmp_path_factory.mktemp("talker") / "model")
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\ntags: []\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """What ``measured`` ran in other processes."""
    return []


@pytest.fixture(scope="module")
def measured(talker: Path, commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report and its artifact, evaluated."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "text.txt").write_text(TEXT)
    run = subprocess.Popen

    def spy(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return run(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.subprocess, "Popen", spy)
        report = tenpak.compress(talker, folder / "artifact", evaluation=folder / "text.txt", seed=7)
    return report, folder / "artifact"


def deterministic(folder: Path) -> dict[str, bytes]:
    """Everything but the report, which says when and how fast, and the card."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("report.json", "README.md")}


# The same bytes --------------------------------------------------------------------------------------------------


def test_same_inputs_same_bytes(talker: Path, measured, tmp_path: Path) -> None:
    _, artifact = measured
    (tmp_path / "text.txt").write_text(TEXT)
    tenpak.compress(talker, tmp_path / "again", evaluation=tmp_path / "text.txt", seed=7)
    assert deterministic(tmp_path / "again") == deterministic(artifact)


@pytest.mark.parametrize("recipe", ["int3:g32:search+nf2:g32"])
def test_same_bytes_whatever_the_number_of_threads(recipe: str, tmp_path: Path) -> None:
    # Large enough that torch would split the work between threads.
    source = make_tiny("llama", tmp_path / "source", hidden_size=256, intermediate_size=512, head_dim=64)
    program = (
        "import sys, torch, tenpak; torch.set_num_threads(int(sys.argv[1])); "
        "tenpak.compress(*sys.argv[2:4], recipe=sys.argv[4])"
    )
    for threads in ("1", "2"):
        command = [sys.executable, "-c", program, threads, str(source), str(tmp_path / threads), recipe]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True)
    assert deterministic(tmp_path / "1") == deterministic(tmp_path / "2")


# What is recorded ------------------------------------------------------------------------------------------------


def test_manifest_says_how_the_artifact_was_made(talker: Path, measured) -> None:
    manifest = load_manifest(measured[1] / MANIFEST_NAME)
    checkpoint = open_checkpoint(talker)
    assert (manifest.recipe, manifest.overrides, manifest.seed) == ("int4:g32", (), 7)
    assert manifest.tenpak_version == version("tenpak")
    assert manifest.versions["torch"] == version("torch")
    assert (manifest.source.name, manifest.source.bytes) == ("model", checkpoint.bytes)
    lines = ""
    for name in sorted(checkpoint.tensors):
        info, tensor = checkpoint.tensors[name], checkpoint.read(name)
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        lines += f"{name} {info.dtype} {list(info.shape)} {digest}\n"
    assert manifest.source.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert manifest.source.parameters == sum(info.numel for info in checkpoint.tensors.values())
    assert all(parse(json.dumps(entry.codec)) is not None for entry in manifest.weights.values())


def test_report_in_the_artifact_is_the_report_returned(measured) -> None:
    report, artifact = measured
    written = json.loads((artifact / "report.json").read_text())
    assert {key: written[key] for key in report.to_json()} == json.loads(json.dumps(report.to_json()))
    assert written["environment"]["threads"] >= 1
    assert written["versions"]["torch"] == version("torch")
    assert report.seconds is not None
    assert report.seconds > 0


def test_measured_quality_is_recorded_everywhere(measured) -> None:
    report, artifact = measured
    quality = report.quality
    assert {"ppl_original", "ppl", "ppl_increase", "ppl_increase_se", "kl", "kl_se", "top1", "tokens", "dtype", "text",
            "text_sha256", "bytes", "bpw", "ratio_fp32", "ratio_checkpoint"} <= set(quality)  # fmt: skip
    assert quality["bytes"] == report.bytes
    assert quality["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert quality["tokens"] == len(TEXT) - 1  # nothing predicts the first
    assert quality["kl"] > 0
    recorded = load_manifest(artifact / MANIFEST_NAME).quality
    assert recorded == {key: value for key, value in quality.items() if "per_second" not in key}
    card = (artifact / "README.md").read_text()
    assert f"{quality['ppl_original']:.4f} → {quality['ppl']:.4f}" in card
    assert "license: cc0-1.0" in card


def test_quality_is_that_of_the_files(talker: Path, measured, tmp_path: Path) -> None:
    report, artifact = measured
    (tmp_path / "text.txt").write_text(TEXT)
    again = tenpak.evaluate(artifact, against=talker, text=tmp_path / "text.txt")
    assert again.kl == pytest.approx(report.quality["kl"], rel=1e-3)
    assert again.fidelity.ppl == pytest.approx(report.quality["ppl"], rel=1e-5)


def test_quality_comes_from_a_fresh_process(measured, commands: list[list[str]]) -> None:
    assert measured[0].quality is not None
    assert [command[:4] for command in commands] == [[sys.executable, "-m", "tenpak", "evaluate"]]
    assert str(measured[1]) in commands[0]


def test_the_fresh_process_tells_how_far_it_is(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    seen: list[tuple[str, int, int]] = []
    report = tenpak.compress(
        talker, tmp_path / "out", evaluation=tmp_path / "text.txt", progress=lambda *step: seen.append(step)
    )
    steps = [step for step in seen if step[0] == "evaluating"]
    assert report.quality is not None
    assert steps[-1] == ("evaluating", report.quality["tokens"], report.quality["tokens"])
    assert seen[-1] == steps[-1]


def test_only_lines_of_progress_are_taken_for_it() -> None:
    script = """
import sys
print("result")
for step in ('["evaluating", 1, 2]', '3', '["a", 2, "b"]'):
    print('{"progress": ' + step + '}', file=sys.stderr)
print("\\nwarning: [1]\\n12", file=sys.stderr)
sys.exit(3)
"""
    seen: list[tuple[str, int, int]] = []
    with TemporaryFile() as printed:
        code, lines = measuring.followed([sys.executable, "-c", script], printed, lambda *step: seen.append(step))
        printed.seek(0)
        assert printed.read() == b"result\n"
    assert code == 3
    assert seen == [("evaluating", 1, 2)]
    assert lines == ['{"progress": 3}', '{"progress": ["a", 2, "b"]}', "warning: [1]", "12"]


def test_whoever_stops_listening_stops_the_other_process() -> None:
    started = time.monotonic()
    script = 'import sys, time; print(\'{"progress": ["a", 0, 1]}\', file=sys.stderr, flush=True); time.sleep(60)'

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with TemporaryFile() as printed, pytest.raises(KeyboardInterrupt):
        measuring.followed([sys.executable, "-c", script], printed, stop)
    assert time.monotonic() - started < 30


def test_failed_evaluation_leaves_the_artifact(tmp_path: Path) -> None:
    source = make_tiny_talker(tmp_path / "source", vocab_size=64)  # the tokenizer knows more than the model
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(EvaluationError, match="is written, but measuring it failed: the tokenizer does not fit"):
        tenpak.compress(source, tmp_path / "artifact", evaluation=tmp_path / "text.txt")
    assert tenpak.verify(tmp_path / "artifact").ok
    assert tenpak.load(tmp_path / "artifact") is not None
    assert "not measured" in (tmp_path / "artifact" / "README.md").read_text()


@pytest.mark.parametrize(("text", "error"), [(None, CalibrationError), ("", CalibrationError), ("a", EvaluationError)])
def test_useless_text_is_found_before_the_work(text, error, talker: Path, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
    with pytest.raises(error):
        tenpak.compress(talker, tmp_path / "artifact", evaluation=tmp_path / "text.txt")
    assert not (tmp_path / "artifact").exists()


def test_unmeasured_artifact_claims_nothing(talker: Path, tmp_path: Path) -> None:
    report = tenpak.compress(talker, tmp_path / "artifact")
    assert report.quality is None
    assert load_manifest(tmp_path / "artifact" / MANIFEST_NAME).quality is None


# What is kept ----------------------------------------------------------------------------------------------------


def test_tokenizer_template_generation_config_and_licence_are_kept(talker: Path, measured) -> None:
    artifact = measured[1]
    kept = {path.name for path in talker.iterdir()} - {"config.json", "README.md", "model.safetensors"}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    } <= kept
    assert all((artifact / name).read_bytes() == (talker / name).read_bytes() for name in kept)
    assert set(load_manifest(artifact / MANIFEST_NAME).files) == {*kept, "config.json"}
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    assert tokenizer("moon").input_ids == AutoTokenizer.from_pretrained(talker)("moon").input_ids
    assert tokenizer.chat_template


def test_config_is_the_sources_plus_the_quantization(talker: Path, measured) -> None:
    config = json.loads((measured[1] / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "tenpak", "format_version": 1}
    assert config == json.loads((talker / "config.json").read_text())


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    tenpak.compress(source, tmp_path / "artifact")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before


# Dtypes and shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source", dtype=dtype)
    report = tenpak.compress(source, tmp_path / "artifact")
    assert report.ratio_fp32 / report.ratio_checkpoint == pytest.approx(2, rel=0.05)  # the checkpoint's header counts
    model = tenpak.load(tmp_path / "artifact")
    assert model.dtype == dtype
    assert model.model.norm.weight.dtype == dtype


def test_mixed_dtypes_stay_what_they_are(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prediction = tenpak.predict(source)
    assert tenpak.compress(source, tmp_path / "artifact").bytes == prediction.bytes
    manifest = load_manifest(tmp_path / "artifact" / MANIFEST_NAME)
    assert manifest.weights["model.layers.0.mlp.up_proj.weight"].dtype == "F16"
    assert manifest.weights["model.layers.1.mlp.up_proj.weight"].dtype == "BF16"
    assert manifest.dense["model.norm.weight"].dtype == "F32"
    assert tenpak.verify(tmp_path / "artifact").ok
    assert tenpak.load(tmp_path / "artifact").dtype == torch.bfloat16


def test_config_without_dtype_gets_the_checkpoints(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    tenpak.compress(source, tmp_path / "artifact")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "artifact").dtype == torch.bfloat16


def test_sharded_source_and_output(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source")
    whole = tenpak.compress(source, tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    prediction = tenpak.predict(tmp_path / "sharded", max_shard_bytes=5000)
    report = tenpak.compress(tmp_path / "sharded", tmp_path / "artifact", max_shard_bytes=5000)
    assert len(list((tmp_path / "artifact").glob("model-*-of-*.safetensors"))) > 2
    assert report.bytes == prediction.bytes > whole.bytes  # more headers
    first, second = open_artifact(tmp_path / "whole"), open_artifact(tmp_path / "artifact")
    assert first.manifest.weights == second.manifest.weights
    assert first.manifest.source.sha256 == second.manifest.source.sha256
    assert tenpak.verify(tmp_path / "artifact").ok
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = [tenpak.load(tmp_path / name)(tokens).logits for name in ("whole", "artifact")]
    assert torch.equal(*found)


def test_pickled_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source")
    shutil.copytree(source, tmp_path / "pickled")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    tenpak.compress(source, tmp_path / "a")
    tenpak.compress(tmp_path / "pickled", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# Overrides, prediction, progress ---------------------------------------------------------------------------------


def test_overrides_reach_the_tensors_they_name(talker: Path, tmp_path: Path) -> None:
    overrides = ("*.k_proj=int8:row", "layers.1.*=int2:g32", "embed*=nf4", "lm_head=dense")
    prediction = tenpak.predict(talker, overrides=overrides)
    report = tenpak.compress(talker, tmp_path / "artifact", overrides=overrides)
    manifest = load_manifest(tmp_path / "artifact" / MANIFEST_NAME)
    assert manifest.overrides == overrides
    bits = {name: entry.codec["bits"] for name, entry in manifest.weights.items()}
    assert bits["model.layers.0.self_attn.k_proj.weight"] == 8
    assert bits["model.layers.1.self_attn.k_proj.weight"] == 2  # the last match
    assert bits["model.layers.0.self_attn.q_proj.weight"] == 4
    assert manifest.weights["model.embed_tokens.weight"].codec["id"] == "normalfloat/1"
    assert report.dense["lm_head.weight"]["reason"] == "set dense by 'lm_head'"
    assert report.bytes == prediction.bytes
    assert prediction.dense == {name: entry["reason"] for name, entry in report.dense.items()}


@pytest.mark.parametrize("override", ["k_porj=int8", "norm=int8", "=int8", "k_proj", "k_proj=", "k_proj=int9"])
def test_wrong_override_stops_before_anything_is_written(override: str, talker: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        tenpak.compress(talker, tmp_path / "artifact", overrides=(override,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "recipe", ["int2", "int3:g64:search", "int8:row", "nf3:g64:learned", "int4:g16+int2:g16", "bf16", "dense", "nf4"]
)
def test_prediction_is_exact_for_fixed_rates(recipe: str, talker: Path, tmp_path: Path) -> None:
    prediction = tenpak.predict(talker, recipe=recipe)
    assert prediction.exact
    assert tenpak.compress(talker, tmp_path / "artifact", recipe=recipe).bytes == prediction.bytes
    assert prediction.memory > 0
    assert prediction.disk >= prediction.bytes
    assert prediction.seconds > 0
    assert json.loads(json.dumps(prediction.to_json()))["bytes"] == prediction.bytes


def test_dense_recipe_changes_nothing(talker: Path, tmp_path: Path) -> None:
    report = tenpak.compress(talker, tmp_path / "artifact", recipe="dense")
    original, stored = load_file(talker / "model.safetensors"), load_file(tmp_path / "artifact" / "model.safetensors")
    assert original.keys() == stored.keys()
    assert all(torch.equal(original[name], stored[name]) for name in original)
    assert {entry["reason"] for entry in report.dense.values()} == {"the recipe is dense", "1-D"}
    with torch.no_grad():
        tokens = torch.arange(3, 20)[None]
        expected = AutoModelForCausalLM.from_pretrained(talker)(tokens).logits
        assert torch.equal(tenpak.load(tmp_path / "artifact")(tokens).logits, expected)


def test_progress_counts_every_weight_once(talker: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    tenpak.compress(talker, tmp_path / "artifact", progress=lambda *step: seen.append(step))
    names, done, totals = zip(*(step for step in seen if step[0] != "writing"), strict=True)
    written = [step for step in seen if step[0] == "writing"]
    assert written == sorted(written)
    assert written[-1][1] == written[-1][2]
    compressed = tenpak.open_artifact(tmp_path / "artifact").manifest.weights
    assert sorted(names) == sorted(compressed)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] == sum(torch.Size(entry.shape).numel() for entry in compressed.values())
    assert len(set(totals)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_broken_weight_is_named(bad: float, name: str, tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CodecError, match=f"{name}: the weight holds NaN or infinite") as error:
        tenpak.compress(source, tmp_path / "artifact")
    assert error.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_existing_output_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError):
        tenpak.compress(tmp_path / "no such model", tmp_path / "out", overwrite=True)
