"""Train a reference model from random weights to a folder that transformers loads, with one command.

    python benchmarks/reference/train.py ref-8m --out FOLDER --minutes 90

prepares the data in FOLDER/data (once), trains, and writes the model to FOLDER/ref-8m. Stopped, it goes on from the
last checkpoint with ``--resume`` and the same options. ``card.py`` then measures the model and writes its card.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from data import prepare, tokens_of
from environment import environment
from export import export
from recipes import RECIPES
from training import Budget, evaluate, train

from tenpak.errors import TenpakError

ROOT = Path(__file__).resolve().parents[2]
FINAL_BLOCKS = 64
CORPUS = "train_en.txt.xz"
HELD_OUT = ("wikitext2_valid.raw.txt", "wikitext2_test.raw.txt")


def main(arguments: list[str] | None = None) -> int:
    """Prepare, train, export; 0 where the training is complete, 1 where it was stopped before."""
    options = _options(arguments)
    recipe = RECIPES[options.recipe]
    torch.set_num_threads(options.threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.threads))  # read by the tokenizers when they start
    held_out = options.held_out or [options.corpus.parent / name for name in HELD_OUT]
    print(f"data of {options.corpus} without what it shares with {', '.join(path.name for path in held_out)}")
    data = prepare(options.corpus, held_out, options.cache or options.out / "data", recipe.vocabulary)
    print("  ".join(f"{name} {value}" for name, value in data.facts.items()))
    tokens, validation = (tokens_of(data.folder / f"{name}.bin") for name in ("train", "validation"))
    budget = Budget(options.tokens or recipe.tokens, 60 * options.minutes if options.minutes else None)
    run = options.out / f"{recipe.name}-run"
    model, at, complete = train(
        recipe,
        tokens,
        validation,
        run,
        budget,
        device=options.device,
        resume=options.resume,
        stop_after=options.stop_after,
        echo=_print,
    )
    if not complete:
        print(f"stopped after {at.step} steps; --resume goes on")
        return 1
    folder = options.out / recipe.name
    facts = {
        "steps": at.step,
        "tokens": at.tokens,
        "seconds": at.seconds,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": options.threads,
        "validation_loss": evaluate(model, recipe, validation, recipe.context, FINAL_BLOCKS),
        "environment": environment(),
    }
    export(model, recipe, data, run / "log.jsonl", facts, folder)
    print(f"{folder}: {at.tokens} tokens in {at.seconds:.0f} s, validation loss {facts['validation_loss']:.4f}")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    shared = Path(os.environ.get("TENPAK_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description="Train a reference model.")
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data, the checkpoints and the model")
    parser.add_argument("--corpus", type=Path, default=shared / "data" / CORPUS)
    parser.add_argument("--held-out", type=Path, nargs="+", help="texts never to be seen (default WikiText-2)")
    parser.add_argument("--cache", type=Path, help="folder of the prepared data (default OUT/data)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="time of the whole training, its end with rates of zero")
    length.add_argument("--tokens", type=int, help="tokens of the whole training (default those of the recipe)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="stop there, to go on later")
    return parser.parse_args(arguments)


def _print(line: dict[str, Any]) -> None:
    speed = line["tokens"] / max(line["seconds"], 1e-9)
    what = f"validation {line['validation']:.4f}" if "validation" in line else f"loss {line['loss']:.4f}"
    print(f"{line['progress']:7.2%}  step {line['step']}  {what}  {speed:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TenpakError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
