"""Figures of tensors against numpy and scipy, in every layout that checkpoints have."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.evaluation.diagnostics import weights as module
from tenpak.evaluation.diagnostics.pair import open_pair
from tenpak.evaluation.diagnostics.spectrum import effective_rank, energies
from tenpak.evaluation.diagnostics.weights import examine_weights, figures_of
from tenpak.recipes import parse


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral", "gpt_oss"])
def test_every_figure_equals_numpy_and_scipy(family: str, talker, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 100)  # so that pieces add up
    made = talker(family)
    pair, artifact = made.open(), open_artifact(made.artifact)
    found = examine_weights(pair)
    assert [figures.name for figures in found] == list(artifact.manifest.weights)
    stored = load_file(made.source / "model.safetensors")
    for figures in found:
        entry = artifact.manifest.weights[figures.name]
        w = stored[figures.name].double()
        error = artifact.decode(figures.name).double() - w
        assert figures.relative_error == pytest.approx(float(error.norm() / w.norm()), rel=1e-9)
        assert figures.kurtosis == pytest.approx(scipy.stats.kurtosis(w.flatten().numpy(), fisher=False), rel=1e-9)
        beyond = ((w - w.mean()).abs() > 6 * w.std(correction=0)).double().mean()
        assert figures.outlier_share == pytest.approx(float(beyond), abs=1e-12)
        matrices = w if w.ndim == 3 else w[None]
        assert figures.effective_rank == pytest.approx(np.mean([effective_rank(energies(m)) for m in matrices]))
        out, wide = (w.shape[-1], w.shape[-2]) if entry.transposed else w.shape[-2:]
        assert (figures.shape, figures.matrices) == ((out, wide), len(matrices))
        assert figures.rank == min(out, wide)
        assert not figures.sampled
        assert figures.bytes == entry.bits // 8
        assert figures.dense_bytes == 4 * w.numel()
        assert figures.bits_per_weight == pytest.approx(8 * figures.bytes / w.numel())
        assert parse(figures.codec).to_json() == dict(entry.codec)


def test_a_tied_tensor_is_one(talker) -> None:
    names = [figures.name for figures in examine_weights(talker("qwen2").open())]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_outliers_are_counted_and_constants_have_no_kurtosis(talker, tmp_path) -> None:
    made = talker()
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in made.source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    tensors[up][3, 5] = 100.0
    tensors[down] = torch.full_like(tensors[down], 0.25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tenpak.compress(folder, tmp_path / "artifact")
    pair = open_pair(folder, tmp_path / "artifact", text=made.text)
    spiked, constant = figures_of(pair, up), figures_of(pair, down)
    assert spiked.outlier_share == 1 / tensors[up].numel()
    assert spiked.kurtosis > 1000
    assert np.isnan(constant.kurtosis)
    assert constant.outlier_share == 0
    assert constant.effective_rank == pytest.approx(1, abs=1e-6)


def test_progress_counts_tensors(talker) -> None:
    calls = []
    examine_weights(talker().open(), lambda *call: calls.append(call))
    assert calls[-1][0] == "weights"
    assert calls[-1][1] == calls[-1][2] == len(calls)
