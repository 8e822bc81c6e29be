"""Where the hidden states of a compressed model leave those of its original.

Both models read the same windows, and the output of every block is compared, h of the original with ĥ of the
compressed one. Per token: the cosine, the norms' ratio ‖ĥ‖/‖h‖ and the relative error ‖ĥ - h‖/‖h‖; means over tokens.
Per window, with its root mean square as the unit: the largest |x| (the *peak*, its maximum over windows) and the share
of values beyond six units (*outliers*). A window, not a batch, is the unit, so that batching changes nothing.

An error that has come in is not a block's own. So every compressed block is also called with the original's input, and
the relative error of that output is what this block adds by itself (``own_error``); the input embedding's is that of
the first block's input. The *culprit* is, in this order: the first block whose output is not finite; the block (or
embedding) whose own error is the largest, where it is at least 0.05 and twice the median of the other blocks (0.5
where there is one block); the first block whose norms or peaks explode.

Massive activations, a few values thousands of times the rest, are a trait of most larger models (Sun et al., Massive
Activations in Large Language Models, arXiv 2402.17762): only a peak that the original does not have is a finding.

A batch is so small that the original's states for it, the input and output of every block, stay below 256 MiB; a
single window may exceed that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tenpak.calibration.calls import hidden_of, replaced
from tenpak.calibration.skeleton import find_blocks
from tenpak.errors import CalibrationError, EvaluationError
from tenpak.evaluation.diagnostics.pair import Pair, Progress
from tenpak.evaluation.windowing import Batch, Runner, batches, evaluating

__all__ = ["Activations", "Culprit", "Layer", "compare_activations", "exploded", "find_culprit"]

OUTLIER = 6.0
"""A value this many root mean squares (or standard deviations) from zero (the mean) is an outlier."""

_STANDS_OUT = 2.0  # times the median of the others
_NOTABLE = 0.05  # relative error below which nothing is named
_ALONE = 0.5  # the same where there are no others
_NORM_RATIO = 2.0  # norms that grow or shrink by more explode
_PEAK_RATIO = 2.0  # times the original's peak
_PEAK = 20.0  # root mean squares below which no peak is notable


@dataclass(frozen=True)
class Layer:
    """One block's output, compared. Figures are NaN where the compressed output is not finite.

    Attributes:
        name: path of the block in the model.
        depth: its place, from 0.
        cosine: mean over tokens of the cosine of h and ĥ.
        norm_ratio: mean over tokens of ‖ĥ‖/‖h‖.
        relative_error: mean over tokens of ‖ĥ - h‖/‖h‖.
        own_error: the same of the compressed block called with the original's input.
        peak_original: largest |h| in a window, in root mean squares of that window.
        peak: the same of ĥ.
        outliers_original: share of values of h beyond six root mean squares.
        outliers: the same of ĥ.
    """

    name: str
    depth: int
    cosine: float
    norm_ratio: float
    relative_error: float
    own_error: float
    peak_original: float
    peak: float
    outliers_original: float
    outliers: float

    @property
    def finite(self) -> bool:
        """Whether all values of the compressed output are."""
        return math.isfinite(self.relative_error)


@dataclass(frozen=True)
class Culprit:
    """Where it starts, and why this is said."""

    layer: str
    why: str


@dataclass(frozen=True)
class Activations:
    """All blocks, compared.

    Attributes:
        embedding: path of the input embedding.
        embedding_error: mean relative error of the first block's input.
        layers: in order of depth.
        culprit: where the error starts, if it starts anywhere.
    """

    embedding: str
    embedding_error: float
    layers: tuple[Layer, ...]
    culprit: Culprit | None


def compare_activations(pair: Pair, progress: Progress | None = None) -> Activations:
    """Compare the outputs of all blocks.

    Raises:
        EvaluationError: the model has no list of blocks, or the original's states are not finite.
    """
    original, compressed = pair.original, pair.compressed
    try:
        path, blocks = find_blocks(original)
    except CalibrationError as error:
        raise EvaluationError(f"{type(original).__name__} has no list of blocks whose outputs could be compared") from (
            error
        )
    counterparts = list(compressed.get_submodule(path))
    names = [f"{path}.{depth}" for depth in range(len(blocks))]
    sums = [_Sums() for _ in blocks]
    embedded = _Sums()
    row_bytes = 2 * (len(blocks) + 1) * _width(original) * original.dtype.itemsize
    runners = Runner(original, "the original"), Runner(compressed, "the compressed model")
    done = 0
    with evaluating(original, compressed):
        for batch in batches(pair.tokens, list(pair.windows), row_bytes):
            last = Batch(batch.inputs, batch.targets[:, -1:])  # logits are of no interest here
            seen = _States([None] * len(blocks), [None] * len(blocks))
            with _hooked(blocks, seen.take_input, seen.take_output):
                runners[0](last)
            seen.require_finite(names, runners[0].name)
            comparison = _Comparison(seen, sums, embedded)
            with _hooked(counterparts, comparison.take_input, comparison.take_output):
                runners[1](last)
            done += batch.inputs.numel()
            if progress:
                progress("activations", done, len(pair.tokens) - 1)
    layers = tuple(total.layer(name, depth) for depth, (name, total) in enumerate(zip(names, sums, strict=True)))
    embedding = next(name for name, module in original.named_modules() if module is original.get_input_embeddings())
    embedding_error = embedded.mean("error")
    return Activations(embedding, embedding_error, layers, find_culprit(embedding, embedding_error, layers))


def find_culprit(embedding: str, embedding_error: float, layers: Sequence[Layer]) -> Culprit | None:
    """Where the error starts: see the module's beginning. None where nothing stands out.

    Args:
        embedding: path of the input embedding.
        embedding_error: relative error of the first block's input.
        layers: in order of depth.
    """
    broken = next((layer for layer in layers if not layer.finite), None)
    if broken is not None:
        return Culprit(broken.name, "its output is the first that holds NaN or infinity")
    own = {embedding: embedding_error, **{layer.name: layer.own_error for layer in layers}}
    name = max(own, key=lambda key: own[key])
    others = (
        statistics.median(layer.own_error for layer in layers if layer.name != name)
        if len(layers) > 1
        else embedding_error
    )
    if own[name] >= (_ALONE if len(layers) == 1 else max(_NOTABLE, _STANDS_OUT * others)):
        given = "" if name == embedding else "given an exact input "
        times = f", {own[name] / others:.1f} times the median of the other blocks" if others > 0 else ""
        return Culprit(name, f"{given}it adds a relative error of {own[name]:.3g}{times}")
    blown = next((layer for layer in layers if exploded(layer)), None)
    return None if blown is None else Culprit(blown.name, f"{exploded(blown)}")


def exploded(layer: Layer) -> str | None:
    """How a block's output explodes, in words; None where it does not."""
    if not layer.finite:
        return "its output is not finite"
    if not 1 / _NORM_RATIO <= layer.norm_ratio <= _NORM_RATIO:
        return f"its output's norm is {layer.norm_ratio:.3g} times the original's"
    if layer.peak >= max(_PEAK, _PEAK_RATIO * layer.peak_original):
        return f"its output peaks at {layer.peak:.3g} root mean squares, the original's at {layer.peak_original:.3g}"
    return None


@dataclass
class _Sums:
    """Figures of one place in the models, added up over windows."""

    tokens: int = 0
    values: int = 0
    own_tokens: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def add(self, h: Tensor, found: Tensor) -> None:
        """Add windows of states ``[windows, tokens, width]``."""
        h, found = h.double(), found.double().to(h.device)
        norm = h.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.tokens += norm.numel()
        self.values += h.numel()
        self._count("cosine", cosine_similarity(h, found, dim=-1))
        self._count("norm_ratio", found.norm(dim=-1) / norm)
        self._count("error", (found - h).norm(dim=-1) / norm)
        for role, states in (("original", h), ("compressed", found)):
            size = states.abs()  # not in place: it may be what the model goes on with
            unit = size.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            highest = float((size.amax(dim=(1, 2), keepdim=True) / unit).max())
            before = self.peaks.get(role, 0.0)
            # NaN compares as false and would be lost.
            self.peaks[role] = highest if math.isnan(highest) or highest > before else before
            self._count(role, (size > OUTLIER * unit).double())

    def add_own(self, h: Tensor, found: Tensor) -> None:
        """Add what the block makes of the original's input."""
        h, found = h.double(), found.double().to(h.device)
        norm = h.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.own_tokens += norm.numel()
        self._count("own", (found - h).norm(dim=-1) / norm)

    def mean(self, name: str) -> float:
        """Mean over tokens, or over values."""
        count = {"own": self.own_tokens, "original": self.values, "compressed": self.values}.get(name, self.tokens)
        return self.totals[name] / count

    def layer(self, name: str, depth: int) -> Layer:
        return Layer(
            name=name,
            depth=depth,
            cosine=self.mean("cosine"),
            norm_ratio=self.mean("norm_ratio"),
            relative_error=self.mean("error"),
            own_error=self.mean("own"),
            peak_original=self.peaks["original"],
            peak=self.peaks["compressed"],
            outliers_original=self.mean("original"),
            outliers=self.mean("compressed") if math.isfinite(self.totals["error"]) else math.nan,
        )

    def _count(self, name: str, values: Tensor) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + float(values.sum())


@dataclass
class _States:
    """What the original's blocks took and gave for one batch; copies, since a block may work in place."""

    inputs: list[Tensor | None]
    outputs: list[Tensor | None]

    def take_input(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs[depth] = hidden_of(args, kwargs).clone()

    def take_output(
        self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.outputs[depth] = _hidden(output).clone()

    def require_finite(self, names: Sequence[str], role: str) -> None:
        for name, output in zip(names, self.outputs, strict=True):
            if output is None:
                raise EvaluationError(f"{role} does not call its block {name}: the outputs cannot be compared")
            if not torch.isfinite(output).all():
                raise EvaluationError(
                    f"{role} gives NaN or infinity in block {name}",
                    hint="load it in float32 or bfloat16; if it stays, its weights are damaged",
                )


@dataclass
class _Comparison:
    """The compressed blocks' counterpart of ``_States``: compares at once, and lets the original's states go."""

    seen: _States
    sums: list[_Sums]
    embedded: _Sums

    def take_input(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        exact, wanted = self.seen.inputs[depth], self.seen.outputs[depth]
        assert exact is not None
        assert wanted is not None  # ``require_finite`` has seen them all
        hidden = hidden_of(args, kwargs)
        if depth == 0:
            self.embedded.add(exact, hidden)
        # Before the call proper: whatever a block keeps for later ones is then that call's.
        args, kwargs = replaced(args, kwargs, exact.to(hidden))
        self.sums[depth].add_own(wanted, _hidden(module.forward(*args, **kwargs)))
        self.seen.inputs[depth] = None

    def take_output(
        self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        wanted = self.seen.outputs[depth]
        assert wanted is not None
        self.sums[depth].add(wanted, _hidden(output))
        self.seen.outputs[depth] = None


@contextmanager
def _hooked(blocks: Sequence[nn.Module], before: Any, after: Any) -> Iterator[None]:
    """Call ``before`` and ``after`` around every block, with its depth first."""
    handles = []
    try:
        for depth, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(partial(before, depth), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(after, depth), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _width(model: Any) -> int:
    """Width of the hidden states."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return int(width or model.get_input_embeddings().weight.shape[-1])


def _hidden(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
