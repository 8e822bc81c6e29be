"""A trained model as a folder that transformers and tenpak load: BF16 weights, tokenizer, texts, curve and the facts.

``texts/calibration.txt`` is from the training data and ``texts/evaluation.txt`` from the validation data, both made of
blocks spread evenly, so that calibration sees every kind of text and evaluation nothing that the model or it has seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import END
from curve import curve, points
from data import Data, Tokens, tokens_of
from recipes import Recipe
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["FACTS", "export"]

FACTS = "training.json"
CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 96, 32


def export(model: LlamaForCausalLM, recipe: Recipe, data: Data, log: Path, facts: dict[str, Any], folder: Path) -> None:
    """Write ``folder``; the model becomes BF16.

    Args:
        model: trained.
        recipe: how.
        data: on what.
        log: the training's ``log.jsonl``, for the curve.
        facts: what else the card tells of the training, as JSON.
        folder: made where it is missing; files of these names are replaced.
    """
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16).cpu()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer = data.tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=recipe.context
    ).save_pretrained(folder)
    for name, file, most in (
        ("calibration", "train.bin", CALIBRATION_BLOCKS),
        ("evaluation", "validation.bin", EVALUATION_BLOCKS),
    ):
        text = excerpts(tokens_of(data.folder / file), tokenizer, recipe.context, most)
        (folder / "texts" / f"{name}.txt").write_text(text, encoding="utf-8")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (folder / "loss.svg").write_text(curve(f"Loss of {recipe.name}", points(lines)))
    (folder / FACTS).write_text(
        json.dumps(
            {
                "recipe": recipe.to_json(),
                "parameters": sum(weight.numel() for weight in model.parameters()),
                "data": data.facts,
                **facts,
            },
            indent=2,
        )
        + "\n"
    )


def excerpts(tokens: Tokens, tokenizer: Tokenizer, size: int, most: int) -> str:
    """Up to ``most`` blocks of ``size`` tokens, spread evenly, as one text with blank lines between documents."""
    count = max(len(tokens) // size, 1)
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
    blocks = [
        tokenizer.decode(tokens[at * size : (at + 1) * size].tolist(), skip_special_tokens=False) for at in chosen
    ]
    # A block may begin or end inside a character, which decodes to U+FFFD.
    return "\n\n".join(block.replace(END, "\n\n").strip("\ufffd\n ") for block in blocks) + "\n"
