"""An artifact measured against its original: sizes from the files, quality from the artifact as it loads from disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenpak.artifact.reader import open_artifact
from tenpak.artifact.sizes import Sizes
from tenpak.calibration.choice import Text, choose_text
from tenpak.calibration.text import sample_text, tokenize
from tenpak.checkpoint.source import open_checkpoint
from tenpak.errors import EvaluationError
from tenpak.evaluation.fidelity import Fidelity, fidelity
from tenpak.nn.load import load
from tenpak.nn.modules import Runtime

__all__ = ["Evaluation", "evaluate", "evaluation_text", "load_original", "load_tokenizer"]

# Where a model folder may carry its own evaluation text.
DEFAULT_TEXT = Path("texts") / "evaluation.txt"
_SAMPLED_TOKENS = 4096
_SAMPLED_SEED = 2


@dataclass(frozen=True)
class Evaluation(Sizes):
    """Sizes and quality of an artifact.

    Attributes:
        bytes: of the artifact's weight files.
        checkpoint_bytes: of the original's weight files.
        parameters: of the model, tied weights once.
        fidelity: quality against the original.
        text: name of the text.
        text_sha256: hash of the text's UTF-8 bytes.
    """

    bytes: int
    checkpoint_bytes: int
    parameters: int
    fidelity: Fidelity
    text: str
    text_sha256: str

    @property
    def kl(self) -> float:
        """KL(original ‖ artifact), nats per token."""
        return self.fidelity.kl

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "bpw": self.bpw,
            "ratio_fp32": self.ratio_fp32,
            "ratio_checkpoint": self.ratio_checkpoint,
            **self.fidelity.to_json(),
            "text": self.text,
            "text_sha256": self.text_sha256,
        }


def evaluate(
    artifact: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    runtime: Runtime = "speed",
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure an artifact against the original model.

    Args:
        artifact: artifact folder.
        against: the original: model folder or hub id.
        text: file, folder or dataset id. By default ``texts/evaluation.txt`` in the original's folder; where there is
            none, text sampled from the original itself with a fixed seed.
        window: inputs per window, by default the model's context (at most 4096).
        stride: distance between windows, by default min(512, window // 2).
        dtype: both models compute in it; the artifact's weights are decoded to it.
        device: where both models run.
        runtime: see ``load``.
        trust_remote_code: let transformers run model code from the original.
        progress: called with what is done, and tokens done of it and in all.

    Raises:
        ArtifactError, CheckpointError, CalibrationError: artifact, original or text cannot be read.
        EvaluationError: the two models cannot be compared on this text.
    """
    sizes = open_artifact(artifact)
    checkpoint = open_checkpoint(against)
    original = load_original(against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    compressed = load(artifact, runtime=runtime, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)

    chosen = evaluation_text(text, checkpoint.folder, original, tokenizer, progress)
    tokens = tokenize(tokenizer, chosen.content, vocab_size=original.config.get_text_config().vocab_size)
    told = None if progress is None else partial(progress, "evaluating")
    found = fidelity(original, compressed, tokens, window=window, stride=stride, progress=told)
    return Evaluation(
        bytes=sizes.bytes,
        checkpoint_bytes=checkpoint.bytes,
        parameters=sizes.manifest.source.parameters,
        fidelity=found,
        text=chosen.name,
        text_sha256=chosen.sha256,
    )


def evaluation_text(
    given: str | Path | None,
    folder: Path,
    original: Any,
    tokenizer: Any,
    progress: Callable[[str, int, int], None] | None = None,
) -> Text:
    """The text that a model is measured on: see ``evaluate``.

    Args:
        given: file, folder or dataset id, or None.
        folder: of the original, which may hold a text.
        original: the model, which writes a text where there is none.
        tokenizer: of the model.
        progress: called while a text is sampled.

    Raises:
        CalibrationError: it cannot be read or sampled.
    """

    def sample() -> Text:
        told = None if progress is None else partial(progress, "sampling")
        content = sample_text(original, tokenizer, tokens=_SAMPLED_TOKENS, seed=_SAMPLED_SEED, progress=told)
        return Text(f"sampled from the original, seed {_SAMPLED_SEED}", content, sampled=True)

    return choose_text(given, folder / DEFAULT_TEXT, sample)


def load_original(
    source: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> Any:
    """An uncompressed model, in evaluation mode.

    Raises:
        CheckpointError: it cannot be read.
        EvaluationError: transformers cannot load it.
    """
    checkpoint = open_checkpoint(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as error:
        raise EvaluationError(f"transformers cannot load {checkpoint.name}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        EvaluationError: the folder has none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise many kinds, some of them plain Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(
            f"{folder} has no tokenizer that transformers can load: {reason}",
            hint="put the model's tokenizer files (tokenizer.json and so on) into that folder",
        ) from error
