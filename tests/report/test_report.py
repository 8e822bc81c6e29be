"""Report and model card: every figure follows from the files, every dense tensor is listed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from families import make_tiny
from transformers.utils import logging

import tenpak
from tenpak.artifact.schema import MANIFEST_NAME, load_manifest
from tenpak.report.card import model_card, plus_minus, size
from tenpak.report.report import Report, measured
from tenpak.report.rows import report_rows

QUALITY = {
    "ppl_original": 4.0, "ppl": 4.1, "ppl_increase": 0.025, "ppl_increase_se": 0.001, "kl": 0.0123, "kl_se": 0.0004,
    "top1": 0.97, "top1_se": None, "text": "evaluation.txt", "tokens": 12345, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()
    base = tmp_path_factory.mktemp("report")
    make_tiny("qwen2", base / "source")
    tenpak.compress(base / "source", base / "artifact")
    return base / "artifact"


def test_sizes_are_what_the_file_system_says(folder: Path) -> None:
    report = measured(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    original = sum(path.stat().st_size for path in (folder.parent / "source").glob("*.safetensors"))
    assert report.bytes == weights
    assert report.checkpoint_bytes == original
    assert report.bpw == pytest.approx(8 * weights / report.parameters)
    assert report.ratio_fp32 == pytest.approx(4 * report.parameters / weights)
    assert report.ratio_checkpoint == pytest.approx(original / weights)
    assert report.folder_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_nothing_in_the_weight_files_is_unaccounted_for(folder: Path) -> None:
    report = measured(folder)
    dense = sum(entry["bytes"] for entry in report.dense.values())
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert report.payload_bits // 8 + dense + header == report.bytes
    assert sum(report.codecs.values()) == report.payload_bits // 8
    count = report.compressed_parameters + dense // 4
    assert count == report.parameters  # tied once, all of it float32


def test_json_round_trip(folder: Path) -> None:
    report = measured(folder).with_quality(QUALITY)
    assert json.loads(json.dumps(report.to_json()))["quality"]["kl"] == QUALITY["kl"]
    assert {field.name for field in dataclasses.fields(Report)} <= set(report.to_json())


def test_card_without_quality_says_so(folder: Path) -> None:
    card = model_card(measured(folder), load_manifest(folder / MANIFEST_NAME), None)
    assert "not measured" in card
    assert "whose card states none" in card
    assert "license:" not in card
    assert "base_model" not in card  # a folder's name is no hub id


def test_card_with_everything(folder: Path) -> None:
    manifest = load_manifest(folder / MANIFEST_NAME)
    source = manifest.source.model_copy(update={"name": "someone/model"})
    manifest = manifest.model_copy(update={"source": source, "overrides": ("embed*=int4:g32",)})
    report = measured(folder).with_quality(QUALITY)
    card = model_card(report, manifest, "apache-2.0")
    front = card.split("---\n")[1].splitlines()
    assert "base_model: someone/model" in front
    assert "license: apache-2.0" in front
    assert "- tenpak" in front
    for fact in (
        "4.0000 → 4.1000", "+2.50% ± 0.10%", "0.01230 ± 0.00040", "97.00%", "12,345 tokens", "`--set embed*=int4:g32`",
        f"{report.ratio_fp32:.2f}×", f"{report.bpw:.3f}", f"{report.parameters:,}", manifest.source.sha256,
    ):  # fmt: skip
        assert fact in card


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_345_678, 4_000_000_000, 5_000_000_000_000)] == [
        "0 B", "999 B", "1 kB", "2.35 MB", "4 GB", "5 TB",
    ]  # fmt: skip


def test_standard_error_is_shown_where_there_is_one() -> None:
    assert plus_minus(QUALITY, "kl", ".3f") == "0.012 ± 0.000"
    assert plus_minus(QUALITY, "top1", ".1%") == "97.0%"
    assert plus_minus({"kl": 1.0}, "kl", ".1f") == "1.0"


def test_a_recipe_per_tensor_is_not_called_dense(folder: Path) -> None:
    rows = dict(report_rows(measured(folder).to_json()))
    assert rows["recipe"] == "int4:g32"
    out = folder.parent / "set apart"
    rows = dict(report_rows(tenpak.compress(folder.parent / "source", out, recipe="dense").to_json()))
    assert rows["recipe"] == "dense"
    assert "codecs" not in rows
    report = tenpak.compress(folder.parent / "source", out, recipe="dense", overrides=["*.q_proj=int8"], overwrite=True)
    rows = dict(report_rows(report.to_json()))
    assert rows["recipe"].startswith("each tensor its own")
    assert rows["codecs"].startswith("uniform/1 ")
