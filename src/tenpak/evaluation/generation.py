"""Text from a model or an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tenpak.checkpoint.source import is_artifact, locate
from tenpak.errors import EvaluationError
from tenpak.evaluation.evaluate import load_original, load_tokenizer
from tenpak.nn.load import load

__all__ = ["generate"]


def generate(
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> str:
    """The continuation of ``prompt``, without it.

    Args:
        model: folder or hub id of a model or an artifact.
        prompt: text to continue.
        tokens: at most this many new tokens.
        temperature: 0 takes the likeliest token each time.
        seed: of torch's generators, which transformers samples from.
        dtype: see ``load``.
        device: where the model runs.
        trust_remote_code: let transformers run the model's own code.
        progress: called with what is done, tokens so far and ``tokens``.

    Raises:
        ArtifactError, CheckpointError: the model cannot be read.
        EvaluationError: no tokenizer, or an empty prompt for a tokenizer without a start token.
    """
    folder = locate(model)
    if is_artifact(folder):
        loaded = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    else:
        loaded = load_original(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    inputs.pop("token_type_ids", None)
    if inputs["input_ids"].numel() == 0:
        raise EvaluationError("the prompt has no tokens", hint="give a longer --prompt")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        out = loaded.generate(
            **inputs,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=None if progress is None else _Counter(progress, tokens),
            **sampling,
        )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


class _Counter:
    """Counts tokens as transformers hands them out: first those of the prompt, then one at a time."""

    def __init__(self, progress: Callable[[str, int, int], None], total: int) -> None:
        self.progress, self.total, self.done = progress, total, -1

    def put(self, value: Any) -> None:
        self.done += 1
        self.progress("generating", self.done, self.total)

    def end(self) -> None:
        if self.done < self.total:  # a model may end before its time
            self.progress("generating", self.done, self.done)
