"""Every family: compressed, loaded back, equal to a plain model that holds the decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import TOKENS, Case, MakeCase, logits, weight_files
from families import FAMILIES
from transformers import AutoModelForCausalLM

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.checkpoint.source import open_checkpoint

# Products may run in another order than in the plain model (biases added apart, experts one by one), never with other
# weights: a float32 sum over at most 96 terms is good to about 1e-6 of its largest term, a wrong weight is off by 1e-2.
RELATIVE = 1e-5

# What is neither a linear layer nor an embedding, though it has two dimensions or more.
OTHERS = ("conv1d.weight", "A_log", "up_proj_bias", "down_proj_bias")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, case: MakeCase) -> Case:
    return case(request.param)


def test_loaded_model_computes_what_the_decoded_weights_do(made: Case, tmp_path: Path) -> None:
    expected = logits(made.reference(tmp_path / "dense"))
    tolerance = RELATIVE * expected.abs().max().item()
    in_memory = tenpak.load(made.artifact)
    assert not in_memory.training
    assert (logits(in_memory) - expected).abs().max().item() <= tolerance
    assert (logits(tenpak.load(made.artifact, runtime="speed")) - expected).abs().max().item() <= tolerance
    # ... and compression is not a no-op that would make the comparison empty
    original = logits(AutoModelForCausalLM.from_pretrained(made.source, dtype=torch.float32).eval())
    assert (original - expected).abs().max().item() > 10 * tolerance
    generated = in_memory.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 4


def test_artifact_is_intact_and_as_large_as_predicted(made: Case) -> None:
    assert tenpak.verify(made.artifact).ok
    written = sum(path.stat().st_size for path in made.artifact.glob("*.safetensors"))
    prediction = tenpak.predict(made.source)
    assert prediction.exact
    assert prediction.bytes == written == made.report.bytes
    assert prediction.parameters == made.report.parameters


def test_no_tensor_is_left_dense_in_silence(made: Case) -> None:
    manifest = open_artifact(made.artifact).manifest
    tensors = open_checkpoint(made.source).tensors
    assert {*manifest.weights, *manifest.dense, *manifest.tied} == set(tensors)
    card = (made.artifact / "README.md").read_text()
    reasons = {name: entry["reason"] for name, entry in made.report.dense.items()}
    assert set(reasons) == set(manifest.dense)
    assert all(reason and reason in card for reason in reasons.values())
    for name, reason in reasons.items():
        assert len(tensors[name].shape) < 2 or name.endswith(OTHERS) or "Router" in reason, (name, reason)


def test_save_pretrained_writes_the_same_weights_again(made: Case, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.artifact)
    model.save_pretrained(tmp_path / "again")
    assert weight_files(tmp_path / "again") == weight_files(made.artifact)
    assert tenpak.verify(tmp_path / "again").ok
    assert torch.equal(logits(tenpak.load(tmp_path / "again")), logits(model))
