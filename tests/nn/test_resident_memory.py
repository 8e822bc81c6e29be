"""Resident memory of a loaded model really falls; measured in fresh processes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tenpak
from tenpak.evaluation.memory import Memory, measure_memory


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Memory]:
    """A random Llama of 30 M parameters in float32, in 4 bits throughout, and both in memory."""
    folder = tmp_path_factory.mktemp("memory")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) >= 30_000_000
    model.save_pretrained(folder / "source")
    del model
    tenpak.compress(
        folder / "source", folder / "artifact", recipe="int4:g32", overrides=("embed*=int4:g32", "lm_head=int4:g32")
    )
    return {
        "original": measure_memory(folder / "source", runtime="original", dtype="float32", tokens=16),
        "memory": measure_memory(folder / "artifact", runtime="memory", tokens=16),
        "speed": measure_memory(folder / "artifact", runtime="speed", tokens=16),
    }


def test_int4_takes_less_than_035_of_float32(measured: dict[str, Memory]) -> None:
    # The original is mapped: its pages are resident only when a forward pass has read them.
    original = measured["original"].after_forward - measured["original"].baseline
    compressed = measured["memory"].loaded - measured["memory"].baseline
    assert original > 4 * 29_000_000
    assert compressed < 0.35 * original


def test_a_forward_pass_leaves_no_decoded_weights_behind(measured: dict[str, Memory]) -> None:
    original = measured["original"].after_forward - measured["original"].baseline
    assert measured["memory"].after_forward - measured["memory"].baseline < 0.5 * original


def test_the_speed_runtime_keeps_decoded_weights(measured: dict[str, Memory]) -> None:
    grown = measured["speed"].loaded - measured["speed"].baseline
    assert grown > 4 * 29_000_000  # so that the measure is one that can see them
