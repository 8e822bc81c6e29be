"""Measure an exported reference model and write its card: every figure is the run's own or measured here.

    python benchmarks/reference/card.py FOLDER [--text wikitext2_test.raw.txt]

Perplexity is tenpak's own, on the files as they lie: ``<|endoftext|>`` and then the whole text, each of its tokens
scored once. Per token it depends on the vocabulary; per word, exp(total loss / words), it does not, and words are what
white space separates in the raw text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from export import FACTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenpak.calibration import load_text, tokenize
from tenpak.evaluation import perplexity

ROOT = Path(__file__).resolve().parents[2]
MEASURED = "perplexity.json"
# Of SOURCES.tsv, which lies with the corpus: what it is made of, and under which licence.
SOURCES = (
    ("WikiText-2, training split; other Wikipedia articles", "CC BY-SA 3.0"),
    ("arXiv abstracts", "CC0"),
    ("classic books", "public domain in the US"),
    ("CIA World Factbook", "CC0 / public domain in the US"),
    ("OpenStax Principles of Economics", "CC BY 4.0"),
    ("speeches of US presidents", "public domain"),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write README.md and perplexity.json into the folder."""
    shared = Path(os.environ.get("TENPAK_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description="Measure a reference model and write its card.")
    parser.add_argument("folder", type=Path, help="the exported model")
    parser.add_argument("--text", type=Path, default=shared / "data" / "wikitext2_test.raw.txt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measured = measure(options.folder, options.text)
    (options.folder / MEASURED).write_text(json.dumps(measured, indent=2) + "\n")
    facts = json.loads((options.folder / FACTS).read_text())
    (options.folder / "README.md").write_text(card(facts, measured), encoding="utf-8")
    print(f"{options.text.name}: {measured['ppl']:.3f} per token, {measured['word_ppl']:.2f} per word")
    return 0


def measure(folder: Path, text: Path) -> dict[str, Any]:
    """Perplexity of the model in ``folder`` on the file ``text``, by tenpak, in FP32 from the stored BF16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    raw = load_text(text)
    tokens = tokenize(AutoTokenizer.from_pretrained(folder), raw, vocab_size=model.config.vocab_size)
    tokens = torch.cat([torch.tensor([model.config.bos_token_id]), tokens])
    result = perplexity(model, tokens)
    words = len(raw.split())
    return {
        "text": text.name,
        **result.to_json(),
        "words": words,
        "word_ppl": math.exp(min(math.log(result.ppl) * result.tokens / words, 700.0)),
    }


def card(facts: dict[str, Any], measured: dict[str, Any]) -> str:
    """The card, Markdown, of what ``training.json`` and ``perplexity.json`` say."""
    recipe, data = facts["recipe"], facts["data"]
    heads = recipe["width"] // recipe["head"]
    sources = "\n".join(f"| {source} | {licence} |" for source, licence in SOURCES)
    error = f" ± {measured['ppl_se']:.2f}" if measured["ppl_se"] is not None else ""
    return f"""---
license: cc-by-sa-3.0
language: en
library_name: transformers
---

# {recipe["name"]}

A Llama of {facts["parameters"]:,} parameters in BF16: {recipe["layers"]} layers, width {recipe["width"]}, FFN \
{recipe["ffn"]}, {heads} query heads of {recipe["head"]} and {recipe["key_values"]} of keys and values, tied \
embeddings, context {recipe["context"]}, byte-level BPE of {recipe["vocabulary"]} tokens with the pre-tokenizer of \
GPT-2. Trained from random weights for tenpak, so that compression is measured on a model whose data is known.

## Measured

| | |
|---|---|
| tokens trained on | {facts["tokens"]:,} ({facts["tokens"] / data["train_tokens"]:.2f} passes over the data) |
| steps, time, on | {facts["steps"]:,}, {facts["seconds"] / 60:.0f} minutes, {facts["device"]} |
| loss on the validation data | {facts["validation_loss"]:.4f} nats per token |
| perplexity on {measured["text"]}, per token | {measured["ppl"]:.2f}{error} |
| perplexity on {measured["text"]}, per word | {measured["word_ppl"]:.2f} |

Perplexity in {measured["dtype"]} with windows of {measured["window"]} and a stride of {measured["stride"]} over \
{measured["tokens"]:,} tokens, {measured["words"]:,} words as white space separates them in the raw text.

![loss by tokens](loss.svg)

Muon for the matrices of the layers, AdamW for the rest, {recipe["decay"]} decay to zero, {recipe["batch"]} × \
{recipe["context"]} tokens a step; `training.json` has the whole recipe.

## Data

| source | licence |
|---|---|
{sources}

{data["documents"]:,} documents, {data["characters"]:,} characters. {", ".join(data["held_out"])} were never seen: of \
their {data["held_out_windows"]:,} windows of 50 letters and digits {data["windows_in_corpus"]:,} occurred in the \
corpus; the {data["dropped"]:,} documents that held one ({data["dropped_characters"]:,} characters) were dropped, and \
{data["windows_in_training"]} occur in the {data["train_tokens"]:,} tokens of the training data. \
{data["validation_tokens"]:,} more are held out for validation.

`texts/calibration.txt` is from the training data, `texts/evaluation.txt` from the validation data; each document is
under the licence of its source above.

## Use

Measuring compression, and tests that need a real model of a known training. It knows little and writes nonsense that \
reads like English: it is good for nothing else, and nobody has looked at what it says.
"""


if __name__ == "__main__":
    sys.exit(main())
