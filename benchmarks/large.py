"""A 1.1-billion-parameter random Llama in BF16: memory and time of the commands and of using it.

The checkpoint is written tensor by tensor, so that this needs little memory itself. Every command runs in a process of
its own; the peak is what the kernel counted for it (``ru_maxrss``: mapped pages included).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tenpak.checkpoint.header import encode_header
from tenpak.evaluation.memory import measure_memory

# TinyLlama's shape.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# What is read of the calibration text.
WINDOWS, WINDOW = 16, 512


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the model."""
    width, inner, kv = 2048, 5632, 256
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, width), "lm_head.weight": (32000, width)}
    for layer in range(22):
        prefix = f"model.layers.{layer}"
        for name, shape in (("q", (width, width)), ("k", (kv, width)), ("v", (kv, width)), ("o", (width, width))):
            found[f"{prefix}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            found[f"{prefix}.mlp.{name}_proj.weight"] = shape
        found[f"{prefix}.input_layernorm.weight"] = (width,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (width,)
    found["model.norm.weight"] = (width,)
    return found


def write_model(folder: Path, text: Path) -> int:
    """Write the checkpoint, and a text for it; returns its parameters."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = shapes()
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        sizes = [(name, "BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in tensors.items()]
        file.write(encode_header(sizes))
        for shape in tensors.values():
            weight = torch.randn(shape, generator=generator).mul_(0.02) if len(shape) == 2 else torch.ones(shape)
            file.write(weight.to(torch.bfloat16).view(torch.uint8).numpy().data)
    _write_text(folder, text)
    return sum(torch.Size(shape).numel() for shape in tensors.values())


def _write_text(folder: Path, text: Path) -> None:
    """A tokenizer of one token a word for the model, and a text of random words, a little more than is read of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(32000)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    words = torch.randint(32000, (WINDOWS * WINDOW + 100,), generator=torch.Generator().manual_seed(1))
    text.write_text(" ".join(f"w{word}" for word in words.tolist()))


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tenpak-large-") as folder:
        source, out, text = (Path(folder) / name for name in ("model", "artifact", "text.txt"))
        parameters = write_model(source, text)
        calibrated = calibrate(source, text, Path(folder))
        dry = measure("compress", str(source), "--dry-run", "--json")
        commands = {
            "compress": measure("compress", str(source), "-o", str(out), "--evaluation", "none", "--json"),
            "verify": measure("verify", str(out), "--json"),
            "inspect": measure("inspect", str(out), "--json"),
        }
        predicted = json.loads(dry.pop("stdout"))
        report = json.loads(commands["compress"].pop("stdout"))
        assert json.loads(commands["verify"].pop("stdout"))["ok"]
        commands["inspect"].pop("stdout")
        resident = {
            "original": measure_memory(source, runtime="original", dtype="float32"),
            "memory": measure_memory(out, runtime="memory", dtype="float32"),
            "speed": measure_memory(out, runtime="speed", dtype="float32"),
        }
    return {
        "parameters": parameters,
        "recipe": report["recipe"],
        "bytes": report["bytes"],
        "predicted_bytes": predicted["bytes"],
        "predicted_peak_memory": predicted["memory"],
        "predicted_seconds": predicted["seconds"],
        "encode_and_write_seconds": report["seconds"],
        "calibrated": calibrated,
        "commands": commands,
        "resident": {name: {**found.to_json(), "model": found.model} for name, found in resident.items()},
    }


# From two bits to eight.
CANDIDATES = "gptq-int2:g64,gptq-int3:g64,gptq-int3:g32,gptq-int4:g64,gptq-int4:g32,int8:row"
STEP = 0.3  # of the flagship without data, in units of the weights' deviation: about three and a half bits


def run_codecs() -> dict[str, Any]:
    """The flagship without data, from disk to the first logits; and a profile of six candidates, statistics given."""
    with tempfile.TemporaryDirectory(prefix="tenpak-large-") as folder:
        source, out, text = (Path(folder) / name for name in ("model", "artifact", "text.txt"))
        parameters = write_model(source, text)
        recipe = f"trellis:{0.02 * STEP:g}:datafree"
        options = ("--recipe", recipe, "--set", f"*={recipe}", "--evaluation", "none")
        compressed = measure("compress", str(source), "-o", str(out), *options, "--json")
        report = json.loads(compressed.pop("stdout"))
        done = subprocess.run([sys.executable, "-c", _LOADER, out], stdout=subprocess.PIPE, text=True, check=True)
        loaded = json.loads(done.stdout)
        shutil.rmtree(out)
        read = (
            "--calibration",
            str(text),
            "--calibration-tokens",
            str(4 * WINDOW),
            "--calibration-window",
            str(WINDOW),
        )
        statistics = str(Path(folder) / "statistics")
        measure("calibrate", str(source), "-o", statistics, *read, "--json")
        path = str(Path(folder) / "profile.json")
        profiled = measure(
            "profile", str(source), "-o", path, "--statistics", statistics, "--candidates", CANDIDATES, "--json"
        )
        profiled.pop("stdout")
    return {
        "parameters": parameters,
        "recipe": recipe,
        "bpw": report["bpw"],
        "compress": compressed,
        "load": loaded,
        "candidates": CANDIDATES.split(","),
        "profile": profiled,
    }


# Seconds until a model from disk has given logits, imports not counted, and again once everything is decoded.
_LOADER = """
import json, sys, time
import torch, tenpak, transformers.models.llama.modeling_llama
tokens = torch.arange(16)[None]
with torch.inference_mode():
    started = time.perf_counter()
    model = tenpak.load(sys.argv[1])
    loaded = time.perf_counter()
    model(tokens)
    first = time.perf_counter()
    model(tokens)
    second = time.perf_counter()
print(json.dumps({"load_seconds": loaded - started, "first_logits_seconds": first - started,
                  "forward_seconds": second - first}))
"""


def calibrate(source: Path, text: Path, folder: Path) -> dict[str, Any]:
    """GPTQ with the default propagation, on a few windows; and the statistics of a full calibration."""
    read = ("--calibration", str(text), "--calibration-tokens", str(WINDOWS * WINDOW))
    read += ("--calibration-window", str(WINDOW))
    recipe = ("--recipe", "gptq-int4:g128")
    dry = measure("compress", str(source), *recipe, *read, "--dry-run", "--json")
    predicted = json.loads(dry.pop("stdout"))
    out = folder / "calibrated"
    done = measure("compress", str(source), "-o", str(out), *recipe, *read, "--evaluation", "none", "--json")
    report = json.loads(done.pop("stdout"))
    shutil.rmtree(out)
    few = ("--calibration-tokens", str(4 * WINDOW))
    statistics = measure("calibrate", str(source), "-o", str(folder / "statistics"), *read, *few, "--json")
    size = json.loads(statistics.pop("stdout"))["bytes"]
    shutil.rmtree(folder / "statistics")
    return {
        "recipe": report["recipe"],
        "windows": WINDOWS,
        "window": WINDOW,
        "predicted_peak_memory": predicted["memory"],
        "compress": done,
        "calibrate": {**statistics, "tokens": 4 * WINDOW, "bytes": size},
    }


def measure(*arguments: str) -> dict[str, Any]:
    """Run a tenpak command; its wall time, peak resident memory in bytes, and what it printed.

    A small launcher waits for the command: the kernel hands a process the peak of the one that started it, and this one
    is large.
    """
    command = [sys.executable, "-m", "tenpak", *arguments]
    done = subprocess.run([sys.executable, "-c", _LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if found.pop("status"):
        raise RuntimeError(f"tenpak {' '.join(arguments)} failed")
    return found


_LAUNCHER = """
import json, os, subprocess, sys, tempfile, time
started = time.perf_counter()
with tempfile.TemporaryFile("w+") as printed:
    process = subprocess.Popen(sys.argv[1:], stdout=printed)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    printed.seek(0)
    found = {"wall_seconds": seconds, "peak_resident_bytes": usage.ru_maxrss * 1024, "status": status}
    print(json.dumps({**found, "stdout": printed.read()}))
"""
