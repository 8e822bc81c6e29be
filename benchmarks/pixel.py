"""What PIXEL's classes cost: the table of docs/pixel.md.

Each class compresses the model in memory, its file is written and read again, and the model with the decoded tensors is
measured beside the original on text that nothing was calibrated on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality import WINDOW, cases
from torch import Tensor
from transformers import AutoModelForCausalLM

from tenpak.calibration.text import tokenize
from tenpak.evaluation.evaluate import load_tokenizer
from tenpak.evaluation.fidelity import fidelity
from tenpak.pixel import (
    AdaptiveCompressor,
    CompressedTensor,
    CompressedTensors,
    GPTQStyleCompressor,
    PIXELCompressor,
    PIXELConfig,
    SVDHybridCompressor,
)
from tenpak.pixel.matrices import tied
from tenpak.pixel.tensors import measured
from tenpak.recipes import parse

MODELS = ("babyllama-tok105-0.94m, stories", "tinystories-3.7m, stories")
WINDOWS = 256  # of the calibration text
TOKENS = 16_384  # of the text to measure on

NEAREST = ("int5:g32", "int4:g32", "int4:g128:search", "int3:g32")


def run() -> dict[str, Any]:
    """Ratio, KL and perplexity of each class, by model."""
    here = cases()
    return {
        "window": WINDOW,
        "tokens": TOKENS,
        "calibration_windows": WINDOWS,
        "models": {case: _of_model(*here[case]) for case in MODELS if case in here},
    }


def _of_model(folder: Path, calibration: Path, text: Path) -> dict[str, dict[str, float]]:
    tokenizer = load_tokenizer(folder)

    def tokens(path: Path, count: int) -> Tensor:
        return tokenize(tokenizer, path.read_text()[: 20 * count], vocab_size=len(tokenizer))[:count]

    windows = tokens(calibration, WINDOWS * WINDOW).reshape(WINDOWS, WINDOW)
    measured_on = tokens(text, TOKENS)
    original, changed = _load(folder), _load(folder)
    found = {}
    for name, compress in _ways(windows).items():
        with tempfile.TemporaryDirectory(prefix="tenpak-benchmark-") as scratch:
            path = Path(scratch) / "tensors.safetensors"
            compress(original).save(path)
            read = CompressedTensors.load(path)
            changed.load_state_dict(original.state_dict())
            GPTQStyleCompressor.apply_compressed_weights(changed, read)
            found[name] = {"bytes": path.stat().st_size, "ratio_fp32": read.compression_ratio}
        quality = fidelity(original, changed, measured_on, window=WINDOW)
        found[name] |= {"kl": quality.kl, "ppl_increase": quality.ppl_increase}
        print(f"{folder.name}: {name}: {found[name]['ratio_fp32']:.2f}x, KL {quality.kl:.4f}", file=sys.stderr)
    return found


def _ways(windows: Tensor) -> dict[str, Callable[[Any], CompressedTensors]]:
    """Name → what makes a model's compressed tensors; embeddings and whatever else is in no block stays FP32."""
    patterns = {
        "PIXELConfig(pattern_size=2, residual=None)": PIXELConfig(pattern_size=2, residual=None),
        "PIXELConfig(residual=None)": PIXELConfig(residual=None),
        "PIXELConfig(residual=None, terms=4)": PIXELConfig(residual=None, terms=4),
        "PIXELConfig()": PIXELConfig(),
        'PIXELConfig(residual="int3:g32")': PIXELConfig(residual="int3:g32"),
    }
    adaptive = {f'AdaptiveCompressor("{name}")': AdaptiveCompressor(name) for name in AdaptiveCompressor.PRESETS}
    rounding = {f"{recipe}, to nearest": partial(_each, partial(_nearest, recipe)) for recipe in NEAREST}
    four, three = GPTQStyleCompressor(), GPTQStyleCompressor(bits=3)
    return {
        **{name: partial(_with_all, PIXELCompressor(config).compress) for name, config in patterns.items()},
        **{name: partial(_with_all, compressor.compress) for name, compressor in adaptive.items()},
        "SVDHybridCompressor()": partial(_with_all, partial(_each, _hybrid)),
        **{name: partial(_with_all, compress) for name, compress in rounding.items()},
        "GPTQStyleCompressor()": lambda model: four.compress_model_sequential(model, windows),
        "GPTQStyleCompressor(), text of its own": four.compress_model_sequential,
        "GPTQStyleCompressor(bits=3)": lambda model: three.compress_model_sequential(model, windows),
    }


def _with_all(compress: Callable[[dict[str, Tensor]], CompressedTensors], model: Any) -> CompressedTensors:
    """The matrices of a model's blocks compressed, with everything else as it is."""
    state = model.state_dict()
    again = tied(state)
    made = compress({name: tensor for name, tensor in state.items() if ".layers." in name and tensor.ndim == 2})
    dense = {name: tensor for name, tensor in state.items() if name not in made.weights and name not in again}
    return replace(made, dense=dense, tied=again)


def _each(encode: Callable[[Tensor], CompressedTensor], matrices: dict[str, Tensor]) -> CompressedTensors:
    return CompressedTensors({name: encode(matrix) for name, matrix in matrices.items()})


def _hybrid(matrix: Tensor) -> CompressedTensor:
    return SVDHybridCompressor().compress(matrix).compressed.weights["weight"]


def _nearest(recipe: str, matrix: Tensor) -> CompressedTensor:
    codec = parse(recipe)
    assert codec is not None  # none of them is "dense"
    return measured(matrix, (codec.encode(matrix),))


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
