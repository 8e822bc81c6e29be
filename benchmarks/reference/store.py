"""Checkpoints of a training that can be stopped at any moment, and go on bit for bit.

A checkpoint is a folder ``checkpoints/<step>``: the FP32 weights, the state of both optimizers (tensors and numbers,
read back as such and never as code), and where the training stood. It is written beside its place, moved there in one
operation and only then is the one before it removed, so there is always a whole one. The order of the data follows
from the seed and the step, and nothing else is random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tenpak.errors import CheckpointError

__all__ = ["Position", "latest", "restore", "save"]


@dataclass(frozen=True)
class Position:
    """How far a training has come.

    Attributes:
        step: steps done.
        tokens: tokens they read.
        seconds: what they took, evaluation included, interruptions not.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    out: Path,
    position: Position,
    asked: dict[str, Any],
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Write a checkpoint into ``out`` and remove those before it; ``asked`` is what a resumed training must equal."""
    folder = out / "checkpoints"
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # named_parameters tells tied weights once.
    save_file({name: weight.detach().contiguous() for name, weight in model.named_parameters()}, partial / "weights")
    torch.save([optimizer.state_dict() for optimizer in optimizers], partial / "optimizers")
    (partial / "state.json").write_text(json.dumps({"position": asdict(position), "asked": asked}) + "\n")
    place = folder / f"{position.step:08d}"
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    for path in folder.iterdir():
        if path != place:
            shutil.rmtree(path)


def latest(out: Path) -> Path | None:
    """The newest checkpoint in ``out``, None where there is none."""
    return max((path for path in (out / "checkpoints").glob("[0-9]*") if path.is_dir()), default=None)


def restore(
    place: Path, asked: dict[str, Any], model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Position:
    """Load the checkpoint at ``place``.

    Raises:
        CheckpointError: it is of another training than ``asked``.
    """
    state = json.loads((place / "state.json").read_text())
    if differing := {name for name in asked | state["asked"] if asked.get(name) != state["asked"].get(name)}:
        raise CheckpointError(
            f"the checkpoint {str(place)!r} is of a training with other {', '.join(sorted(differing))}",
            hint="resume with the options it began with, or give another folder",
        )
    saved = load_file(place / "weights")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(saved[name])
    states = torch.load(place / "optimizers", map_location="cpu", weights_only=True)
    for optimizer, state_dict in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state_dict)
    return Position(**state["position"])
