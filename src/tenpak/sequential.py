"""Compressing block by block: every weight is rounded for the inputs that the compressed model will give it.

Two models walk through the same text side by side, a block at a time: the original, and one whose weights are replaced
by what their payloads decode to as soon as they are encoded. Within a block the weights are encoded in *steps*, in
the order of their use; those that share an input (Q, K and V) make one step, and so do all experts of a layer. For a
step the second model gives Ĥ = E[x̂ x̂ᵀ], and with ``propagation="original"`` both give E[x x̂ᵀ], from which the target is
corrected for the error that has come in (``codecs.rounding.correction``). A weight whose output is simply added to what
the block returns (the last of an MLP with residual connection; the gradient tells) even corrects the error of the
block's whole output. ``"own"`` only looks at x̂: each layer keeps
its own output, and errors of the layers before it stay.

Experts are never corrected: the two models may send a token to different ones.

Blocks whose tensors are all finished are not encoded again; the models only pass through them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tenpak.calibration.activations import SPILL_BYTES, Activations
from tenpak.calibration.collect import batched, observable, require_finite
from tenpak.calibration.experts import experts, rows_before
from tenpak.calibration.observe import Observer, Product
from tenpak.calibration.skeleton import OUTSIDE, Reader, Skeleton
from tenpak.calibration.sums import BatchSums, Key, Sums
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Statistics
from tenpak.encoding import Lookup, Numbered, encode_unit
from tenpak.kernels.parallel import ordered_map
from tenpak.work import Work

__all__ = ["Walk", "encode_blocks"]


@dataclass
class Walk:
    """What the two models walk through.

    Attributes:
        original: the original model, or None where it is not needed.
        compressed: the model whose weights are replaced.
        tokens: int64 ``[tokens]``, read in disjoint windows.
        window: tokens per window.
        work: finished tensors.
        read: gives a tensor as it will be stored, as far as it is finished.
        curvature: statistics of the original model for codecs that weigh rows by output curvature.
        done: called after each tensor.
        spill_bytes: hidden states beyond this go to disk.
        folder: where they go.
    """

    original: Skeleton | None
    compressed: Skeleton
    tokens: Tensor
    window: int
    work: Work
    read: Reader
    curvature: Lookup | None = None
    done: Callable[[Weight], None] | None = None
    spill_bytes: int = SPILL_BYTES
    folder: Path | None = None


def encode_blocks(walk: Walk, entries: Sequence[Numbered]) -> None:
    """Encode the compressed tensors of all blocks, in order.

    Args:
        walk: models and text. What of ``entries`` is in no block is finished already.
        entries: all entries with a codec.

    Raises:
        CalibrationError: hidden states are not finite, or the disk is full.
        CodecError: a weight cannot be encoded; names it.
    """
    batches = batched(walk.tokens, walk.window)
    by_block: dict[int, list[Numbered]] = {}
    for item in entries:
        by_block.setdefault(walk.compressed.place(item.entry.weight.parameter), []).append(item)
    unfinished = [
        block
        for block, items in by_block.items()
        if block != OUTSIDE and any(not walk.work.has(item.number, item.entry.weight.name) for item in items)
    ]
    with Activations(walk.spill_bytes, walk.folder) as states:
        models = _Models(walk, batches, states)
        if unfinished:
            models.start()
        for block in range(len(walk.compressed.blocks)):
            items = by_block.get(block, [])
            if unfinished and block <= max(unfinished):
                models.block(block, items, last=block == max(unfinished))
                continue
            walk.work.reused.extend(item.entry.weight.name for item in items)
            for item in items:
                models.tell(item.entry.weight)


@dataclass
class _Models:
    """The two models between blocks."""

    walk: Walk
    batches: list[Tensor]
    states: Activations  # original at (2k, batch), compressed at (2k + 1, batch), inputs of steps at (-1 - step, batch)

    def start(self) -> None:
        """Load what is in no block, and go to boundary 0."""
        for offset, model in self._pair():
            model.load(model.parameters_outside, self.walk.read if offset else None)
            self._advance(model, OUTSIDE, offset)
            model.forget_embedding(self.batches[0])

    def block(self, block: int, items: list[Numbered], *, last: bool) -> None:
        """Encode a block's tensors and go past it."""
        compressed, original = self.walk.compressed, self.walk.original
        parameters = compressed.parameters_of(block)
        finished = {item.number for item in items if self.walk.work.has(item.number, item.entry.weight.name)}
        with (original or compressed).holding(parameters):
            steps = self._steps(block, items)
            if original is not None:
                self._pass_original(block, steps if len(finished) < len(items) else [])
        with compressed.holding(parameters, self._read_dense):
            for number, step in enumerate(steps):
                if any(item.number not in finished for item in step.items):
                    sums = self._observe(block, number, step) if step.needs_statistics else Sums()
                    self._encode(step, sums.statistics(), finished)
                    del sums
                else:
                    self.walk.work.reused.extend(item.entry.weight.name for item in step.items)
                for item in step.items:
                    self.tell(item.entry.weight)
                biases = [f"{path.removesuffix('weight')}bias" for path in step.parameters]
                compressed.load([*step.parameters, *(p for p in biases if p in parameters)], self.walk.read)
                for index in range(len(self.batches)):
                    self.states.discard((-1 - number, index))
            if not last:
                self._advance(compressed, block, 1)

    def tell(self, weight: Weight) -> None:
        """Report a tensor as done."""
        if self.walk.done is not None:
            self.walk.done(weight)

    def _pair(self) -> list[tuple[int, Skeleton]]:
        pair = [(0, self.walk.original), (1, self.walk.compressed)]
        return [(offset, model) for offset, model in pair if model is not None]

    def _read_dense(self, weight: Weight) -> Tensor:
        """What is to be encoded comes in its turn."""
        return self.walk.read(weight) if weight.kind == "dense" else self.walk.compressed.checkpoint.read(weight.name)

    def _steps(self, block: int, items: list[Numbered]) -> list[_Step]:
        """The block's tensors in the order in which their inputs are needed."""
        offset, model = self._pair()[0]
        seen = BatchSums()
        weights = observable(model, model.parameters_of(block))
        with torch.no_grad(), Observer(weights, seen.see):
            model.run(self.batches[0], block, block + 1, self.states[2 * block + offset, 0])
        together: list[set[str]] = []
        for _, keys in seen.sums.groups():
            names = {parameter for parameter, _ in keys}
            joined = [group for group in together if group & names]
            for group in joined[1:]:
                names |= group
                together.remove(group)
            if joined:
                joined[0] |= names
            else:
                together.append(names)
        rest = {item.entry.weight.parameter for item in items}.difference(*together)
        groups = [*together, rest] if rest else together
        steps = [
            _Step(sorted(group), [item for item in items if item.entry.weight.parameter in group]) for group in groups
        ]
        return [replace(step, added=self._is_added(block, step)) for step in steps if step.items]

    def _is_added(self, block: int, step: _Step) -> bool:
        """Whether a step is one weight whose output is added to what the block returns, by the gradient on a window."""
        model = self.walk.original
        if model is None or len(step.items) != 1 or step.experts:
            return False
        products: list[Product] = []
        hidden = self.states[2 * block, 0][:1].detach().requires_grad_()
        with torch.enable_grad(), Observer(observable(model, step.parameters), products.append):
            output = model.run(self.batches[0][:1], block, block + 1, hidden)
        if (
            len(products) != 1
            or products[0].part(products[0].result).flatten(0, -2).shape != output.flatten(0, -2).shape
        ):
            return False
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(output, products[0].result, direction, allow_unused=True)
        return gradient is not None and torch.equal(products[0].part(gradient).flatten(0, -2), direction.flatten(0, -2))

    def _pass_original(self, block: int, steps: list[_Step]) -> None:
        """Take the original model past a block and keep the inputs of its steps."""
        model = self.walk.original
        assert model is not None  # the caller looked
        which = {parameter: number for number, step in enumerate(steps) for parameter in step.parameters}
        kept = [p for p in which if not steps[which[p]].experts and not steps[which[p]].added]
        weights = observable(model, kept)

        def work(index: int) -> tuple[Tensor, dict[int, Tensor]]:
            inputs: dict[int, Tensor] = {}

            def see(product: Product) -> None:
                inputs.setdefault(which[product.parameter], product.input.reshape(-1, product.input.shape[-1]))

            with torch.no_grad(), Observer(weights, see):
                return model.run(self.batches[index], block, block + 1, self.states[2 * block, index]), inputs

        for index, (hidden, inputs) in enumerate(ordered_map(work, range(len(self.batches)))):
            require_finite(hidden, block)
            self.states.discard((2 * block, index))
            self.states[2 * block + 2, index] = hidden
            for number, x in inputs.items():
                self.states[-1 - number, index] = x

    def _observe(self, block: int, number: int, step: _Step) -> Sums:
        """Sums over the inputs of a step's weights in the compressed model."""
        model = self.walk.compressed
        weights = observable(model, step.parameters)

        def work(index: int) -> Sums:
            original = self.states.find((-1 - number, index))
            waiting = set(weights)
            batch = BatchSums({(path, 0): original for path in weights} if original is not None else None)
            inputs: list[Tensor] = []
            wanted = self.states.find((2 * block + 2, index)) if step.added else None

            def see(product: Product) -> None:
                batch.see(product)
                waiting.discard(product.parameter)
                if wanted is not None:
                    inputs.append(product.input)
                elif not waiting and not step.experts:
                    model.stop()

            with torch.no_grad(), Observer(weights, see):
                output = model.run(self.batches[index], block, block + 1, self.states[2 * block + 1, index])
                if wanted is not None:
                    missing = (wanted - output).flatten(0, -2)
                    batch.sums.inputs[0].shift = missing.T @ inputs[0].flatten(0, -2)
            return batch.sums

        total = Sums()
        for sums in ordered_map(work, range(len(self.batches))):
            total.add(sums)
        return total

    def _encode(self, step: _Step, statistics: Mapping[Key, Statistics], finished: set[int]) -> None:
        """Encode those tensors of a step that are not finished."""
        before = rows_before([item.entry.weight for item in step.items])

        def encode(item: Numbered) -> None:
            weight, codec = item.entry.weight, item.entry.codec
            assert codec is not None  # dense entries are not encoded
            tensor = self.walk.compressed.checkpoint.read(weight.name)
            rows = before.get(weight.name, 0)
            found = self._known(weight, statistics, rows) if codec.needs_statistics else None
            shared = self.walk.work.shared(codec.to_json())
            self.walk.work.put(item.number, weight.name, encode_unit(codec, weight, tensor, found, shared))

        left = [item for item in step.items if item.number not in finished]
        self.walk.work.reused.extend(item.entry.weight.name for item in step.items if item.number in finished)
        if len(left) == 1:
            encode(left[0])  # with all threads
        else:
            for _ in ordered_map(encode, left):
                pass

    def _known(self, weight: Weight, statistics: Mapping[Key, Statistics], before: int) -> list[Statistics | None]:
        """Statistics of a tensor's matrices, with the original model's curvature where it was collected."""
        found: Sequence[Statistics | None]
        if weight.kind == "expert":
            seen = [matrix for parameter, matrix in statistics if parameter == weight.parameter]
            found = experts(statistics.get, weight, seen, rows_before=before)
        else:
            found = (statistics.get((weight.parameter, 0)),)
        if self.walk.curvature is None:
            return list(found)
        originals = self.walk.curvature(weight)
        return [
            own if own is None or other is None else replace(own, output_curvature=other.output_curvature)
            for own, other in zip(found, originals, strict=True)
        ]

    def _advance(self, model: Skeleton, block: int, offset: int) -> None:
        """Take a model past a block, or to boundary 0 (``OUTSIDE``)."""

        def work(index: int) -> Tensor:
            with torch.no_grad():
                if block == OUTSIDE:
                    return model.run(self.batches[index], None, 0)
                return model.run(self.batches[index], block, block + 1, self.states[2 * block + offset, index])

        for index, hidden in enumerate(ordered_map(work, range(len(self.batches)))):
            require_finite(hidden, block)
            self.states.discard((2 * block + offset, index))
            self.states[2 * block + 2 + offset, index] = hidden


@dataclass(frozen=True)
class _Step:
    """Tensors that are encoded together."""

    parameters: list[str]
    items: list[Numbered]
    added: bool = False  # to what the block returns

    @property
    def needs_statistics(self) -> bool:
        return any(item.entry.codec is not None and item.entry.codec.needs_statistics for item in self.items)

    @property
    def experts(self) -> bool:
        return any(item.entry.weight.kind == "expert" for item in self.items)
