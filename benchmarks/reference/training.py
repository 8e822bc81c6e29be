"""The training of a reference model: next-token cross-entropy, in FP32 on a processor and BF16 on a GPU.

A step reads ``recipe.batch`` blocks of ``recipe.context`` tokens in the order of a permutation drawn for each pass over
the data, cut into sequences of the current stage's length. Rates rise, stay near their height and fall to zero as the
*progress* goes from 0 to 1: the share of the tokens, or of the time, that the training may take. So a training that is
given minutes ends with rates near zero too. Weights and optimizers are FP32 everywhere; BF16 is what products are
computed in on a GPU (autocast).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import store
import torch
from data import Tokens
from muon import Muon
from recipes import Recipe, config
from store import Position
from torch import Tensor
from transformers import LlamaForCausalLM

from tenpak.errors import CalibrationError, TenpakError

__all__ = ["Budget", "build", "evaluate", "optimizers_of", "progress_of", "rate", "train"]

EVALUATIONS = 20  # over a training; each with a checkpoint
EVALUATION_BLOCKS = 16
LOG_EVERY = 10  # steps
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Budget:
    """What a training may take: ``tokens``, or ``seconds`` where they are given."""

    tokens: int
    seconds: float | None = None


def train(
    recipe: Recipe,
    tokens: Tokens,
    validation: Tokens,
    out: Path,
    budget: Budget,
    *,
    device: str = "cpu",
    resume: bool = False,
    stop_after: int | None = None,
    echo: Log | None = None,
) -> tuple[LlamaForCausalLM, Position, bool]:
    """Train ``recipe`` and leave checkpoints and ``log.jsonl`` in ``out``.

    Args:
        recipe: what to train and how.
        tokens: of the training, uint16, a block of the recipe or more.
        validation: held out, uint16, a block or more.
        out: a folder, made where it is missing.
        budget: what the whole training may take, also that part of it that was done before.
        device: ``"cpu"`` or ``"cuda"``.
        resume: go on from the checkpoint in ``out``; from the beginning where there is none.
        stop_after: end at this step with a checkpoint, to go on later.
        echo: told each line of the log.

    Returns:
        The model, where it stands, and whether the training is complete.

    Raises:
        CheckpointError: the checkpoint is of another training.
        CalibrationError: there is too little data.
        TenpakError: the loss is no longer finite.
    """
    if min(len(tokens), len(validation)) <= recipe.context:
        raise CalibrationError(
            f"{len(tokens)} or {len(validation)} tokens are too few for blocks of {recipe.context}",
            hint="give a larger corpus",
        )
    out.mkdir(parents=True, exist_ok=True)
    model = build(recipe).to(device)
    optimizers = optimizers_of(model, recipe)
    asked = {"recipe": recipe.to_json(), "budget": dataclasses.asdict(budget), "train_tokens": len(tokens)}
    place = store.latest(out) if resume else None
    at = store.restore(place, asked, model, optimizers) if place else Position()
    log = _log(out / "log.jsonl", at.step, echo)
    started = time.perf_counter() - at.seconds
    losses: list[float] = []
    while (progress := progress_of(at, budget)) < 1 and (stop_after is None or at.step < stop_after):
        length = sequence_length(recipe, progress)
        factor = rate(recipe, progress)
        loss, norm = _step(model, optimizers, recipe, tokens, at.step, length, factor)
        if not math.isfinite(loss):
            raise TenpakError(
                f"the loss of {recipe.name} at step {at.step} is {loss}", hint="lower the rates in recipes.py"
            )
        losses.append(loss)
        at = Position(at.step + 1, at.tokens + recipe.batch * recipe.context, time.perf_counter() - started)
        line = dataclasses.asdict(at) | {"progress": progress_of(at, budget), "sequence": length}
        if at.step % LOG_EVERY == 0:
            log(line | {"loss": sum(losses) / len(losses), "norm": norm, "rate": factor})
            losses.clear()
        if int(progress * EVALUATIONS) != int(min(line["progress"], 1.0) * EVALUATIONS):
            log(line | {"validation": evaluate(model, recipe, validation, length)})
            at = dataclasses.replace(at, seconds=time.perf_counter() - started)
            store.save(out, at, asked, model, optimizers)
    store.save(out, at, asked, model, optimizers)
    return model, at, progress >= 1


def build(recipe: Recipe) -> LlamaForCausalLM:
    """The model with the initial weights of the recipe's seed, FP32, on the processor."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config(recipe)).float()


def optimizers_of(model: LlamaForCausalLM, recipe: Recipe) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for embedding and norms, which have no two sides to turn."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return (
        Muon(matrices, recipe.matrix_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    )


def progress_of(at: Position, budget: Budget) -> float:
    """The share of ``budget`` that is spent, 0 to 1 or a little more."""
    return at.seconds / budget.seconds if budget.seconds is not None else at.tokens / budget.tokens


def sequence_length(recipe: Recipe, progress: float) -> int:
    """Tokens of a sequence at ``progress``."""
    return max((stage for stage in recipe.stages if stage[0] <= progress), key=lambda stage: stage[0])[1]


def rate(recipe: Recipe, progress: float) -> float:
    """The share of the recipe's rates at ``progress``: up in the warm-up, from a twentieth, and then down to zero."""
    if progress < recipe.warmup:
        return max(progress / recipe.warmup, 0.05)
    left = max(1 - progress, 0.0) / (1 - recipe.warmup)
    return left if recipe.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def evaluate(
    model: LlamaForCausalLM, recipe: Recipe, tokens: Tokens, length: int, most: int = EVALUATION_BLOCKS
) -> float:
    """Mean loss, nats per token, of up to ``most`` blocks spread over ``tokens``, in sequences of ``length``."""
    count = (len(tokens) - 1) // recipe.context
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
    inputs, targets = _sequences(recipe, tokens, chosen, length)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for x, y in _parts(inputs, targets, recipe.micro):
            total += _loss(model, x, y).item() * y.numel() / targets.numel()
    model.train()
    return total


def order(recipe: Recipe, blocks: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which blocks a step reads: the next of this pass over the data, and then the first of the next pass."""
    places = np.arange(step * recipe.batch, (step + 1) * recipe.batch)
    passes = {
        number: np.random.default_rng([recipe.seed, int(number)]).permutation(blocks)
        for number in np.unique(places // blocks)
    }
    return np.array([passes[place // blocks][place % blocks] for place in places], dtype=np.int64)


def _step(
    model: LlamaForCausalLM,
    optimizers: tuple[Muon, torch.optim.AdamW],
    recipe: Recipe,
    tokens: Tokens,
    step: int,
    length: int,
    factor: float,
) -> tuple[float, float]:
    """One step of both optimizers; its loss in nats per token and the norm of its gradient before clipping."""
    chosen = order(recipe, (len(tokens) - 1) // recipe.context, step)
    inputs, targets = _sequences(recipe, tokens, chosen, length)
    total = torch.zeros((), device=model.device)
    for x, y in _parts(inputs, targets, recipe.micro):
        loss = _loss(model, x, y) * (y.numel() / targets.numel())
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer, full in zip(optimizers, (recipe.matrix_rate, recipe.other_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = full * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total.item(), norm.item()


def _sequences(
    recipe: Recipe, tokens: Tokens, blocks: np.ndarray[Any, np.dtype[np.int64]], length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 ``[sequences, length]`` each."""
    size = recipe.context
    rows = np.stack([tokens[block * size : (block + 1) * size + 1] for block in blocks]).astype(np.int64)
    pair = rows[:, :-1], rows[:, 1:]
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)).view(-1, length) for part in pair)
    return inputs, targets


def _parts(inputs: Tensor, targets: Tensor, micro: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in parts of up to ``micro`` tokens, a sequence or more."""
    rows = max(micro // inputs.shape[1], 1)
    yield from zip(inputs.split(rows), targets.split(rows), strict=True)


def _loss(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    device = model.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=inputs.to(device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten())


def _log(path: Path, step: int, echo: Log | None) -> Log:
    """A log in JSON lines that goes on after ``step``: what an interrupted training wrote beyond it is dropped."""
    lines = path.read_text().splitlines(keepends=True) if step and path.is_file() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def log(line: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if echo:
            echo(line)

    return log
