"""A tiny model beside its artifact, and what tests compare of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tenpak.artifact.reader import open_artifact
from tenpak.checkpoint.source import open_checkpoint
from tenpak.report.report import Report

TOKENS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A tiny model and its artifact."""

    source: Path
    artifact: Path
    report: Report

    def reference(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """A plain model of the decoded weights: written as a checkpoint, loaded by transformers alone."""
        artifact, checkpoint = open_artifact(self.artifact), open_checkpoint(self.source)
        shutil.copytree(self.source, folder)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        manifest = artifact.manifest
        tensors = {
            name: (artifact.decode(name) if name in manifest.weights else checkpoint.read(name)).contiguous()
            for name in checkpoint.tensors
            if name not in manifest.tied
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


MakeCase = Callable[..., Case]


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens.to(model.device)).logits.float().cpu()


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
