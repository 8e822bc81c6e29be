"""Recovery: a finished run's continuous remainder (scales, norms, biases) tuned towards the original model.

Both models are in memory as a whole, in FP32, which nothing else here needs: see ``memory``. The text is the one that
was calibrated on, read further than for statistics where it goes further, since scales would fit a short one too well;
its last windows decide when to stop. What is stored is checked, not what was simulated: the tuned tensors are read
back, and where they are no nearer to the original than the untuned ones on the windows held out, these stay.

Experts stay as they are: a token rarely meets one, so a step would move most of them by chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from psutil import virtual_memory
from torch import Tensor

from tenpak.allocation.plan import PlanEntry, is_vector
from tenpak.calibrating import Reading
from tenpak.calibration.choice import first_tokens
from tenpak.calibration.skeleton import Reader, Skeleton
from tenpak.checkpoint.source import TORCH_DTYPES
from tenpak.codecs.base import Tunable
from tenpak.encoding import Numbered, stored_reader
from tenpak.errors import CalibrationError
from tenpak.evaluation.evaluate import load_tokenizer
from tenpak.nn.modules import install
from tenpak.task import Progress, Task, numbered
from tenpak.tuning.distil import MOST_HELD_OUT, STEP_TOKENS, Knob, Trace, distil, divergence, split_windows
from tenpak.work import Tuned, Work

__all__ = ["DEFAULT_STEPS", "chosen_steps", "memory", "recover"]

DEFAULT_STEPS = 240
_SCALE_RATE = 2e-3  # relative to a knob's own scale
_VECTOR_RATE = 1e-3  # relative to a vector's root mean square
_LEAST_RATE = 1e-5


def memory(parameters: int, vocabulary: int) -> int:
    """About how many bytes tuning takes: two models, and some copies of a step's logits."""
    return 2 * 4 * parameters + 4 * 4 * STEP_TOKENS * vocabulary


def chosen_steps(task: Task, given: int | None, *, by_default: bool) -> int:
    """How many steps to tune.

    Args:
        task: what is compressed, and on which text.
        given: what the user says, if anything.
        by_default: whether to tune otherwise, where there is text enough, and memory for two models.

    Raises:
        CalibrationError: tuning was asked for, and there is no text to tune on.
    """
    if given is not None:
        if given > 0 and task.reading is None:
            raise CalibrationError(
                "tuning needs a text to learn from, and there is none", hint="give --calibration TEXT, or --tune 0"
            )
        return max(given, 0)
    if not by_default or task.reading is None or not len(split_windows(task.reading.tokens, task.reading.window)[0]):
        return 0
    job = task.job
    needed, free = memory(job.plan.parameters, job.config.get_text_config().vocab_size), virtual_memory().available
    if needed > free:
        warnings.warn(
            f"not tuned: that takes both models in memory, about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free; --tune {DEFAULT_STEPS} does it nevertheless",
            stacklevel=3,
        )
        return 0
    return DEFAULT_STEPS


def recover(task: Task, units: Work, into: Work, steps: int, progress: Progress | None = None) -> dict[str, Any]:
    """Tune a finished run.

    Args:
        task: with a text, its ``reading``; its first part is learnt from.
        units: of the run, all finished.
        into: where all tensors go, tuned or as they were; done at once if it was done before.
        steps: at most this many, each of about 2048 tokens.
        progress: called with steps done and in all.

    Returns:
        How it went, JSON: ``steps``; ``kl``, in nats per token on the windows held out, before and after, of what is
        stored; ``trace``, the same of the simulation, by steps; ``kept``, whether the tuned tensors were taken.

    Raises:
        CalibrationError: the text is too short.
        ArtifactError: the work folder cannot be written.
    """
    if into.tuned is not None and into.tuned.about:
        return dict(into.tuned.about)
    assert task.reading is not None  # no step is chosen without a text
    learning, held_out = split_windows(_tokens(task, task.reading, steps), task.reading.window)
    items = numbered(task.job)
    if not len(learning):
        raise CalibrationError(
            f"a text of less than two windows of {task.reading.window} tokens is too short to tune on",
            hint="give a longer --calibration text, a smaller --calibration-window, or --tune 0",
        )
    teacher = _whole(task, lambda weight: task.job.checkpoint.read(weight.name))
    student = _Student.of(task, units)
    trace = distil(
        student.skeleton,
        teacher,
        student.knobs,
        learning,
        held_out,
        steps=steps,
        seed=task.seed,
        progress=None if progress is None else partial(progress, "tuning"),
    )
    _store(items, units, into, student.weights)
    dense = student.dense()
    del student
    into.put_tuned(Tuned(dense, {}))  # to be read back; without a word on how it went it does not count as done
    stored = _whole(task, stored_reader(task.job.checkpoint, task.job.plan.entries, into))
    about = _about(steps, trace, divergence(stored, teacher, held_out))
    if not about["kept"]:
        _store(items, units, into, {})
    into.put_tuned(Tuned(dense if about["kept"] else {}, about))
    return about


def _tokens(task: Task, reading: Reading, steps: int) -> Tensor:
    """As many tokens of the text as the steps can read once, and those that decide."""
    folder, vocabulary = task.job.checkpoint.folder, task.job.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(folder, trust_remote_code=task.trust_remote_code)
    return first_tokens(tokenizer, reading.text.content, steps * STEP_TOKENS + MOST_HELD_OUT, vocabulary)


def _about(steps: int, trace: Trace, after: float) -> dict[str, Any]:
    before = trace.held_out[0][1]
    return {"steps": steps, "kept": after < before, "kl": [before, after], "trace": trace.to_json()}


def _whole(task: Task, read: Reader, without: Sequence[str] = ()) -> Skeleton:
    """A model with all its parameters, but for some."""
    weights = [entry.weight for entry in task.job.plan.entries]
    skeleton = Skeleton.build(task.job.checkpoint, weights, trust_remote_code=task.trust_remote_code)
    skeleton.load([path for path in skeleton.parameters if path not in without], read)
    return skeleton


@dataclass
class _Student:
    """The compressed model, its knobs, and where these come from."""

    skeleton: Skeleton
    knobs: list[Knob]
    weights: dict[int, Tunable]  # by the tensor's place in the plan
    vectors: dict[str, tuple[PlanEntry, Tensor]]  # tensor → its entry and its parameter

    @classmethod
    def of(cls, task: Task, units: Work) -> _Student:
        """The model of a finished run."""
        tunable = _tunables(numbered(task.job), units)
        taken = {item.entry.weight.parameter: weight for item, weight in tunable}
        entries = task.job.plan.entries
        skeleton = _whole(task, stored_reader(task.job.checkpoint, entries, units), list(taken))
        for parameter, weight in taken.items():
            for module in skeleton.modules_of(parameter):
                install(module, weight)
        vectors = {
            entry.weight.name: (entry, skeleton.model.get_parameter(entry.weight.parameter).requires_grad_())
            for entry in entries
            if entry.codec is None and is_vector(entry.weight)
        }
        knobs = [Knob(*knob, _SCALE_RATE) for weight in taken.values() for knob in weight.knobs()]
        knobs += [_vector_knob(entry, parameter) for entry, parameter in vectors.values()]
        return cls(skeleton, knobs, {item.number: weight for item, weight in tunable}, vectors)

    def dense(self) -> dict[str, Tensor]:
        """The tuned vectors as they are stored."""
        return {
            name: parameter.detach().to(TORCH_DTYPES[entry.dtype]) for name, (entry, parameter) in self.vectors.items()
        }


def _store(items: Sequence[Numbered], units: Work, into: Work, tuned: Mapping[int, Tunable]) -> None:
    """Write all tensors of a run, those that are tuned with the payloads that their knobs now stand for."""
    for item in items:
        unit = units.get(item.number, item.entry.weight.name)
        assert unit is not None  # the run is finished
        if item.number in tuned:
            unit = replace(unit, payloads=(tuned[item.number].payload(),))
        codec = unit.payloads[0].codec
        if unit.payloads[0].shared and not into.shared(codec):
            into.put_shared(codec, unit.payloads[0].shared)
        into.put(item.number, item.entry.weight.name, unit)


def _tunables(items: Sequence[Numbered], units: Work) -> list[tuple[Numbered, Tunable]]:
    """The tensors that are one whole matrix of the model and whose codec leaves something continuous."""
    found = []
    for item in items:
        weight, codec = item.entry.weight, item.entry.codec
        unit = units.get(item.number, weight.name)
        assert unit is not None  # the run is finished
        assert codec is not None  # as is every numbered entry's
        if weight.kind in ("matrix", "embedding", "head") and weight.slot is None and not weight.restructured:
            tunable = codec.tunable(unit.payloads[0])
            if tunable is not None:
                found.append((item, tunable))
    return found


def _vector_knob(entry: PlanEntry, parameter: Tensor) -> Knob:
    dtype = TORCH_DTYPES[entry.dtype]
    size = float(parameter.detach().square().mean().sqrt())

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).float()

    return Knob(parameter, rounded, max(_VECTOR_RATE * size, _LEAST_RATE))
