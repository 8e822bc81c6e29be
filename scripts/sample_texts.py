"""Write a model's default calibration and evaluation texts, sampled from the model itself.

    python scripts/sample_texts.py MODEL_DIR

writes MODEL_DIR/texts/calibration.txt and MODEL_DIR/texts/evaluation.txt: temperature 1, two fixed seeds, so that no
token of the evaluation was seen in calibration. Sampled in windows of 256 tokens: small models are often trained on
shorter texts than their configuration allows, and what they write beyond that is noise. Computed in float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenpak.calibration import context_length, sample_text, tokenize


def main() -> int:
    """Sample both texts, write them, and print their sizes."""
    parser = argparse.ArgumentParser(description="Sample a model's default calibration and evaluation texts.")
    parser.add_argument("model", type=Path, help="a local model folder")
    parser.add_argument("--window", type=int, default=256, help="tokens per independent sample (default 256)")
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--evaluation-tokens", type=int, default=32_768)
    parser.add_argument("--calibration-seed", type=int, default=1)
    parser.add_argument("--evaluation-seed", type=int, default=2)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    window = min(options.window, context_length(model.config))
    folder = options.model / "texts"
    folder.mkdir(exist_ok=True)
    for name, tokens, seed in (
        ("calibration", options.calibration_tokens, options.calibration_seed),
        ("evaluation", options.evaluation_tokens, options.evaluation_seed),
    ):
        start = time.perf_counter()
        text = sample_text(model, tokenizer, tokens=tokens, seed=seed, window=window, progress=_progress)
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8", newline="\n")
        count = len(tokenize(tokenizer, text, vocab_size=model.config.vocab_size))
        seconds = time.perf_counter() - start
        print(f"{path}: seed {seed}, {count} tokens, {path.stat().st_size} bytes, {seconds:.0f} s")
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} tokens", end="\n" if done == total else "", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
