"""An original and its artifact, both loaded, with the text that they are compared on: what every diagnosis reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenpak.artifact.reader import Artifact, open_artifact
from tenpak.calibration.choice import Text, first_tokens
from tenpak.calibration.experts import rows_before
from tenpak.calibration.text import Window, context_length
from tenpak.checkpoint.source import Checkpoint, open_checkpoint, source_sha256
from tenpak.checkpoint.structure import Weight, bind
from tenpak.errors import EvaluationError
from tenpak.evaluation.evaluate import evaluation_text, load_original, load_tokenizer
from tenpak.evaluation.windowing import plan_windows
from tenpak.nn.load import load

__all__ = ["DEFAULT_TOKENS", "Pair", "Progress", "open_pair", "part_of", "replaced_weight"]

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it so far, and how much in all."""

DEFAULT_TOKENS = 4096
# Shorter than most contexts: many windows say more about a text than a few long ones, and cost less.
_WINDOW = 256


@dataclass(frozen=True)
class Pair:
    """What is compared.

    Attributes:
        checkpoint: the original's files.
        artifact: the artifact's files.
        original: the model, loaded.
        compressed: the artifact, loaded as a model.
        weights: the checkpoint's tensors by name, and their places in the original.
        tokenizer: of the original.
        text: the text, whole.
        tokens: those of its tokens that are read, int64 ``[tokens]``.
        windows: disjoint windows over them.
        same_source: whether the artifact says that it was made from this checkpoint, byte for byte.
    """

    checkpoint: Checkpoint
    artifact: Artifact
    original: Any
    compressed: Any
    weights: Mapping[str, Weight]
    tokenizer: Any
    text: Text
    tokens: Tensor
    windows: tuple[Window, ...]
    same_source: bool

    @property
    def context(self) -> int:
        """The longest input that both models take."""
        return min(context_length(self.original.config), context_length(self.compressed.config))


def open_pair(
    original: str | Path,
    artifact: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Pair:
    """Load both models and choose the text; arguments as for ``diagnose``.

    Raises:
        ArtifactError, CheckpointError, CalibrationError: artifact, original or text cannot be read.
        EvaluationError: the artifact is of another model, or the text is too short or does not fit.
    """
    opened, checkpoint = open_artifact(artifact), open_checkpoint(original)
    _require_same_tensors(opened, checkpoint)
    model = load_original(original, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    compressed = load(artifact, runtime="speed", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    vocabularies = [found.config.get_text_config().vocab_size for found in (model, compressed)]
    if vocabularies[0] != vocabularies[1]:
        raise _another_model(f"its vocabulary has {vocabularies[1]} tokens, the original's {vocabularies[0]}")
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    chosen = evaluation_text(text, checkpoint.folder, model, tokenizer)
    ids = first_tokens(tokenizer, chosen.content, tokens, vocabularies[0])
    length = min(_WINDOW, context_length(model.config)) if window is None else window
    _, _, planned = plan_windows(model, ids, length, length)
    return Pair(
        checkpoint,
        opened,
        model,
        compressed,
        {weight.name: weight for weight in bind(model, checkpoint.tensors)},
        tokenizer,
        chosen,
        ids,
        tuple(planned),
        source_sha256(checkpoint) == opened.manifest.source.sha256,
    )


@contextmanager
def replaced_weight(pair: Pair, name: str) -> Iterator[None]:
    """Let the artifact's values of one tensor take their place in the original; its own come back, bit for bit.

    A tied weight changes wherever it is used. The values are cast to the dtype in which the original is loaded.

    Raises:
        CorruptArtifactError: the artifact's tensor cannot be read.
    """
    weight = pair.weights[name]
    place = part_of(pair, weight, pair.original.get_parameter(weight.parameter).data)
    value, own = pair.artifact.decode(name), place.clone()
    try:
        place.copy_(value)
        yield
    finally:
        place.copy_(own)


def part_of(pair: Pair, weight: Weight, parameter: Tensor) -> Tensor:
    """The part of a parameter, or of anything of its shape, that a tensor of the checkpoint fills, as a view."""
    if weight.slot is None:
        return parameter
    siblings = [other for other in pair.weights.values() if other.parameter == weight.parameter]
    before = rows_before(siblings)[weight.name]
    return parameter[weight.slot[0], before : before + weight.shape[0]]


def _require_same_tensors(artifact: Artifact, checkpoint: Checkpoint) -> None:
    manifest = artifact.manifest
    shapes = {name: entry.shape for name, entry in manifest.weights.items()}
    shapes |= {name: entry.shape for name, entry in manifest.dense.items()}
    for name, shape in shapes.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise _another_model(f"the original has no tensor {name!r}")
        if info.shape != shape:
            raise _another_model(f"{name!r} has shape {list(shape)}, in the original {list(info.shape)}")


def _another_model(why: str) -> EvaluationError:
    return EvaluationError(
        f"the artifact was made from another model: {why}",
        hint="give the original that it was compressed from: `tenpak inspect` names it",
    )
