from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tenpak.evaluation.memory as memory
from tenpak.errors import EvaluationError

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, int]:
    """A random Llama in float32 and the bytes of its parameters, some 80 MiB."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_fresh_process_holds_the_weights_and_little_more(checkpoint):
    folder, size = checkpoint
    # Linux would pass the peak of this process on through ru_maxrss: more than a child that loads 80 MiB can reach.
    ballast = torch.ones(1200 * MEBIBYTE // 4)
    result = memory.measure_memory(folder, runtime="original", dtype="float32", tokens=32)
    assert ballast.numel()
    # The weights cannot be resident in less than their size, but for embedding rows that the pass did not read and
    # pages at their ends (5 %); above it there are allocator and library pages.
    assert 0.95 * size <= result.model <= size + 60 * MEBIBYTE
    assert result.baseline > 50 * MEBIBYTE  # torch alone
    assert max(result.loaded, result.after_forward) <= result.peak <= result.baseline + 3 * size + 60 * MEBIBYTE
    assert result.peak < 1200 * MEBIBYTE
    assert (result.runtime, result.dtype) == ("original", "float32")
    assert memory.Memory(**result.to_json()) == result


def test_the_program_prints_one_line_of_json_and_half_the_bits_take_half(checkpoint):
    folder, size = checkpoint
    done = subprocess.run(
        [sys.executable, "-m", "tenpak.evaluation.memory", str(folder), "--runtime", "original", "--dtype", "bfloat16"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(memory.__file__).parents[2])},
    )
    assert len(done.stdout.splitlines()) == 1
    assert set(json.loads(done.stdout)) == {"baseline", "loaded", "after_forward", "peak", "runtime", "dtype"}
    assert "RuntimeWarning" not in done.stderr
    result = memory.Memory(**json.loads(done.stdout))
    assert result.dtype == "bfloat16"
    assert 0.45 * size <= result.loaded - result.baseline <= 0.5 * size + 30 * MEBIBYTE


def test_an_error_is_one_line_and_a_status(tmp_path, capsys):
    assert memory.main([str(tmp_path / "none"), "--runtime", "original"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("there is no model folder")
    assert len(printed.err.splitlines()) == 1


def test_a_failure_of_the_process_is_reported(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"measuring the memory of .* failed: .+"):
        memory.measure_memory(tmp_path, runtime="original")


def test_a_process_that_takes_too_long_is_stopped(checkpoint):
    with pytest.raises(EvaluationError, match=r"took longer than 0\.05 s"):
        memory.measure_memory(checkpoint[0], runtime="original", timeout=0.05)


@pytest.mark.parametrize(
    ("options", "message"), [({"runtime": "fast"}, "no runtime 'fast'"), ({"dtype": "float33"}, "no dtype 'float33'")]
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(EvaluationError, match=message):
        memory.resident_memory(tmp_path, **options)
