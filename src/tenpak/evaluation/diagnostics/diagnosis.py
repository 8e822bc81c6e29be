"""The whole diagnosis of an artifact: where its error starts, what each tensor costs, what becomes of its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tenpak.errors import EvaluationError
from tenpak.evaluation.diagnostics.activations import Activations, compare_activations
from tenpak.evaluation.diagnostics.bill import Bill, measure_bill
from tenpak.evaluation.diagnostics.decoding import Step, compare_step
from tenpak.evaluation.diagnostics.expected import expected_costs
from tenpak.evaluation.diagnostics.generation import (
    Generation,
    compare_generation,
    continue_both,
    default_prompts,
    given_prompts,
)
from tenpak.evaluation.diagnostics.pair import DEFAULT_TOKENS, Progress, open_pair
from tenpak.evaluation.diagnostics.verdict import judge
from tenpak.evaluation.diagnostics.weights import TensorFigures, examine_weights

__all__ = ["DEFAULT_MEASURED", "Diagnosis", "diagnose"]

DEFAULT_MEASURED = 8
"""Tensors whose cost is measured, unless said otherwise."""


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        original: name of the original.
        artifact: folder of the artifact.
        text: name of the text.
        text_sha256: hash of its UTF-8 bytes, all of them.
        tokens: how many of its tokens were read.
        same_source: whether the artifact was made from this original, byte for byte.
        activations: the blocks, compared.
        weights: the compressed tensors.
        bill: what was measured of their costs.
        step: one step of decoding.
        generation: continuations.
        verdict: what stands out, in words.
    """

    original: str
    artifact: str
    text: str
    text_sha256: str
    tokens: int
    same_source: bool
    activations: Activations
    weights: tuple[TensorFigures, ...]
    bill: Bill
    step: Step
    generation: tuple[Generation, ...]
    verdict: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As docs/diagnostics.md has it; what is not finite is None."""
        bill = self.bill
        content = {
            "original": self.original,
            "artifact": self.artifact,
            "text": self.text,
            "text_sha256": self.text_sha256,
            "tokens": self.tokens,
            "same_source": self.same_source,
            "kl": bill.kl,
            "embedding": {"name": self.activations.embedding, "relative_error": self.activations.embedding_error},
            "layers": [asdict(layer) for layer in self.activations.layers],
            "culprit": None if self.activations.culprit is None else asdict(self.activations.culprit),
            "weights": [
                {**asdict(tensor), "kl": bill.tensors.get(tensor.name), "expected_kl": bill.expected[tensor.name]}
                for tensor in self.weights
            ],
            "step": asdict(self.step),
            "generation": [asdict(each) for each in self.generation],
            "verdict": list(self.verdict),
        }
        finite: dict[str, Any] = _finite(content)
        return finite


def diagnose(
    original: str | Path,
    artifact: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    prompts: Sequence[str] = (),
    measure: int = DEFAULT_MEASURED,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Diagnosis:
    """Diagnose an artifact against its original. Both models are in memory as a whole.

    Args:
        original: model folder or hub id.
        artifact: artifact folder.
        text: file, folder or dataset id; chosen as ``evaluate`` chooses it where none is given.
        tokens: at most this many of its tokens are read, at least 2.
        window: tokens of the disjoint windows that it is read in, by default 256, or the context where that is less.
        prompts: to be continued; by default two pieces of the text. The first one is decoded a step at a time.
        measure: tensors whose cost is measured, each by a pass over the text; 0 for none.
        dtype: both models compute in it; the artifact's weights are decoded to it.
        device: where both models run.
        trust_remote_code: let transformers run model code from the original.
        progress: called with what is done, how much of it so far, and how much in all.

    Raises:
        ArtifactError, CheckpointError, CalibrationError: artifact, original or text cannot be read.
        EvaluationError: the artifact is of another model, the text or a prompt is too short or too long, an option is
            out of range, or the original itself gives NaN.
    """
    if tokens < 2 or measure < 0 or (window is not None and window < 1):
        raise EvaluationError(
            f"cannot diagnose on {tokens} tokens in windows of {window}, measuring {measure} tensors",
            hint="at least 2 tokens, windows of at least 1, and 0 tensors or more",
        )
    pair = open_pair(
        original,
        artifact,
        text=text,
        tokens=tokens,
        window=window,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    asked = given_prompts(pair, prompts) if prompts else default_prompts(pair)
    expected = expected_costs(pair, progress)  # first: what a model computes in inference mode takes no gradient
    activations = compare_activations(pair, progress)
    weights = examine_weights(pair, progress)
    bill = measure_bill(pair, expected, measure, progress)
    continued = continue_both(pair, asked, progress)
    generation = compare_generation(pair, continued)
    verdict = judge(
        activations, weights, bill, generation, artifact_bytes=pair.artifact.bytes, same_source=pair.same_source
    )
    return Diagnosis(
        original=pair.checkpoint.name,
        artifact=str(artifact),
        text=pair.text.name,
        text_sha256=pair.text.sha256,
        tokens=len(pair.tokens),
        same_source=pair.same_source,
        activations=activations,
        weights=weights,
        bill=bill,
        step=compare_step(pair, continued[0]),
        generation=generation,
        verdict=verdict,
    )


def _finite(value: Any) -> Any:
    """JSON without NaN and infinity, which it does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
