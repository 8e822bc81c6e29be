"""From a text to statistics of the weights whose codecs need them.

The text is the user's, or ``texts/calibration.txt`` of the model's folder, or sampled from the model itself with a
fixed seed. The model runs in FP32, whole, in this process: for now calibration needs it in memory.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenpak.allocation.plan import PlanEntry
from tenpak.calibration.collect import Progress, collect
from tenpak.calibration.text import context_length, load_text, sample_text, tokenize
from tenpak.codecs.base import Statistics
from tenpak.errors import MissingStatisticsError
from tenpak.evaluation.evaluate import load_original, load_tokenizer
from tenpak.job import Job

__all__ = ["DEFAULT_TEXT", "DEFAULT_TOKENS", "Calibration", "calibrate", "text_sha256"]

DEFAULT_TEXT = Path("texts") / "calibration.txt"
DEFAULT_TOKENS = 131_072
_SAMPLED_TOKENS = 16_384
_SAMPLED_SEED = 1
# Below this many tokens per input the Hessian is mostly damping.
_TOKENS_PER_INPUT = 50


@dataclass(frozen=True)
class Calibration:
    """Statistics for a job, and where they come from.

    Attributes:
        text: name of the text; empty where no weight needs statistics.
        text_sha256: hash of its UTF-8 bytes.
        tokens: how many of its tokens were read.
        window: tokens per window.
        statistics: tensor name → statistics.
    """

    text: str = ""
    text_sha256: str = ""
    tokens: int = 0
    window: int = 0
    statistics: Mapping[str, Statistics] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any] | None:
        """What the manifest records; None where nothing was calibrated."""
        fields = asdict(self, dict_factory=lambda items: {k: v for k, v in items if k != "statistics"})
        return fields if self.statistics else None


def calibrate(
    job: Job,
    text: str | Path | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Collect what the codecs of a job need.

    Args:
        job: checkpoint and plan.
        text: file, folder or dataset id; None for the model's own text.
        tokens: read at most this many.
        window: tokens per window, by default the model's context (at most 4096).
        trust_remote_code: let transformers run model code from the checkpoint.
        progress: called with tokens read and tokens in all.

    Raises:
        CalibrationError: the text cannot be used.
        MissingStatisticsError: a codec needs statistics that are not collected for its kind of weight.
    """
    needed = [entry for entry in job.plan.entries if entry.codec is not None and entry.codec.needs_statistics]
    if not needed:
        return Calibration()
    _require_linear(needed)
    folder = job.checkpoint.folder
    model = load_original(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if text is None and (folder / DEFAULT_TEXT).is_file():
        text = folder / DEFAULT_TEXT
    if text is None:
        content = sample_text(model, tokenizer, tokens=min(tokens, _SAMPLED_TOKENS), seed=_SAMPLED_SEED)
        name = f"sampled from the model, seed {_SAMPLED_SEED}"
    else:
        content, name = load_text(text), Path(text).name if Path(text).exists() else str(text)
    ids = tokenize(tokenizer, content, vocab_size=model.config.get_text_config().vocab_size)[:tokens]
    length = window or context_length(model.config)
    modules = {e.weight.name: model.get_submodule(e.weight.parameter.rpartition(".")[0]) for e in needed}
    _warn_if_short(ids.numel(), needed)
    statistics = collect(model, ids, modules, window=length, progress=progress)
    return Calibration(name, text_sha256(content), ids.numel(), length, statistics)


def text_sha256(content: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(content.encode()).hexdigest()


def _require_linear(needed: list[PlanEntry]) -> None:
    for entry in needed:
        if entry.weight.kind not in ("matrix", "head"):
            raise MissingStatisticsError(
                f"{entry.weight.name!r} is of kind {entry.weight.kind!r}, whose inputs are not collected yet",
                hint=f"give it a codec that needs no statistics: --set '{entry.weight.name}=int8:row'",
            )


def _warn_if_short(tokens: int, needed: list[PlanEntry]) -> None:
    widest = max(entry.weight.matrix_shape[1] for entry in needed)
    if tokens < _TOKENS_PER_INPUT * widest:
        warnings.warn(
            f"{tokens} calibration tokens for layers of {widest} inputs; "
            f"{_TOKENS_PER_INPUT * widest} or more are advised",
            stacklevel=3,
        )
