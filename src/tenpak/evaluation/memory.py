"""Resident memory of a model, measured in a process of its own.

A process that has done anything else does not give its memory back, so each measurement starts a fresh interpreter:

    python -m tenpak.evaluation.memory FOLDER --runtime memory|speed|original --dtype D

imports what is needed, reads its resident set (``baseline``), loads the model (``loaded``), runs one forward pass
(``after_forward``), and prints these and the highest resident set so far (``peak``) as one line of JSON, in bytes.
Mapped pages that are resident count: a checkpoint that is mapped rather than read is not memory for free.

The peak comes from VmHWM in /proc, which starts anew with the program; ru_maxrss does not (Linux carries the parent's
over fork and exec), and serves only where there is no /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tenpak.calibration.text import context_length
from tenpak.errors import EvaluationError, TenpakError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Memory", "measure_memory", "resident_memory"]

_RUNTIMES = ("memory", "speed", "original")


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that loads one model, all in bytes.

    Attributes:
        baseline: with everything imported and no model.
        loaded: with the model loaded; of a checkpoint that was mapped, little is resident yet.
        after_forward: after one forward pass.
        peak: the highest until then, loading included.
        runtime: ``memory``, ``speed`` or ``original``.
        dtype: the dtype that the model computes in, e.g. ``"float32"``.
    """

    baseline: int
    loaded: int
    after_forward: int
    peak: int
    runtime: str
    dtype: str

    @property
    def model(self) -> int:
        """What a model in use adds to the baseline: mapped weights become resident only when a pass reads them."""
        return self.after_forward - self.baseline

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def measure_memory(
    folder: str | Path, *, runtime: str = "memory", dtype: str = "auto", tokens: int = 128, timeout: float = 3600
) -> Memory:
    """Memory of the model in ``folder``, in a fresh process with this interpreter.

    Args:
        folder: an artifact, or with ``runtime="original"`` a Hugging Face checkpoint.
        runtime: ``memory`` or ``speed`` of an artifact, or ``original``.
        dtype: ``auto`` or a torch dtype such as ``float32``.
        tokens: length of the forward pass, at most the model's context.
        timeout: seconds.

    Raises:
        EvaluationError: the process fails or takes longer.
    """
    command = [sys.executable, "-m", "tenpak.evaluation.memory", str(folder)]
    command += ["--runtime", runtime, "--dtype", dtype, "--tokens", str(tokens)]
    # The child measures the package that this process runs, installed or not.
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise EvaluationError(f"measuring the memory of {folder} took longer than {timeout} s") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EvaluationError(
            f"measuring the memory of {folder} failed: {reason}",
            hint="load the model by itself to see the whole error; a negative exit status means that it was killed",
        )
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))


def resident_memory(folder: str | Path, *, runtime: str = "memory", dtype: str = "auto", tokens: int = 128) -> Memory:
    """Memory of the model in ``folder`` in *this* process, which should have done nothing else.

    Args:
        folder: an artifact, or with ``runtime="original"`` a Hugging Face checkpoint.
        runtime: ``memory`` or ``speed`` of an artifact, or ``original``.
        dtype: ``auto`` or a torch dtype such as ``float32``.
        tokens: length of the forward pass, at most the model's context.

    Raises:
        TenpakError: what loading raises.
        EvaluationError: an unknown runtime or dtype, or no such folder.
    """
    if runtime not in _RUNTIMES:
        raise EvaluationError(f"no runtime {runtime!r}", hint=f"one of {', '.join(_RUNTIMES)}")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise EvaluationError(f"no dtype {dtype!r}", hint="auto, float32, bfloat16 or float16")
    if not Path(folder).is_dir():
        raise EvaluationError(f"there is no model folder {str(folder)!r}", hint="give a local folder")
    _import_model_class(folder)
    gc.collect()
    process = psutil.Process()
    baseline = process.memory_info().rss
    model = _load(folder, runtime, dtype)
    gc.collect()
    loaded = process.memory_info().rss
    length = max(1, min(tokens, context_length(model.config)))
    with torch.inference_mode():
        inputs = torch.arange(length).unsqueeze(0) % model.config.get_text_config().vocab_size
        model(input_ids=inputs, use_cache=False)
    after = process.memory_info().rss
    return Memory(baseline, loaded, after, _peak(), runtime, str(model.dtype).removeprefix("torch."))


def _import_model_class(folder: str | Path) -> None:
    """Import the modelling code and start torch's threads, neither of which is the model's memory."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    mapping: Any = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        mapping[type(config)]
    weight = torch.ones(256, 256)
    weight @ weight


def _load(folder: str | Path, runtime: str, dtype: str) -> PreTrainedModel:
    model: PreTrainedModel
    if runtime == "original":
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        from tenpak.nn.load import load

        model = load(folder, runtime="speed" if runtime == "speed" else "memory", dtype=dtype)
    model.train(False)
    return model


def _peak() -> int:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def main(arguments: list[str] | None = None) -> int:
    """Measure one folder and print the result as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m tenpak.evaluation.memory", description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--runtime", choices=_RUNTIMES, default="memory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    try:
        memory = resident_memory(options.folder, runtime=options.runtime, dtype=options.dtype, tokens=options.tokens)
    except TenpakError as error:
        print(f"{error} (hint: {error.hint})" if error.hint else error, file=sys.stderr)
        return 1
    print(json.dumps(memory.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
