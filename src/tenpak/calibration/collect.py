"""Statistics of a model on a text, block by block.

Forward: hidden states go from boundary to boundary, a block's weights in memory at a time. For every input of a weight
Σ x xᵀ, Σ x, Σ |x| and the count are summed.

Backward, for the curvature: at the head, labels are drawn from the model's own distribution at every position; with
ℓ the summed negative log-likelihood of a window, ∂ℓ/∂logits = p - onehot(label). That gradient goes back from boundary
to boundary, each block run again from the states that were kept; at every product y = Wx (∂ℓ/∂y)² is summed, the
diagonal of the Fisher information, so that ½·Σᵢ gᵢ·(E H Eᵀ)ᵢᵢ estimates in nats what an error E of W costs. The head's
own is E[p(1 - p)], which needs no drawing, and the embedding's output gets ``input_curvature`` in the same way.

A batch is computed by one thread, and batches are added in order: the number of threads changes nothing. A part (a
block, or what is outside of them) is handed over as soon as it is complete, so no more than one block's sums are held.

Sources: Fisher diagonal with sampled labels, Kunstner et al. 2019, arXiv 1905.12558; as a measure of quantization
error, Li et al. 2021, BRECQ, arXiv 2102.05426.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenpak.calibration.activations import SPILL_BYTES, Activations
from tenpak.calibration.observe import Observer, Product
from tenpak.calibration.skeleton import OUTSIDE, Skeleton
from tenpak.calibration.sums import BatchSums, Sums
from tenpak.errors import CalibrationError
from tenpak.kernels.parallel import ordered_map

__all__ = ["Progress", "Sink", "batched", "collect", "observable", "require_finite"]

Progress = Callable[[int, int], None]
"""Called with tokens done so far and in all; a token counts once for every time that a block reads it."""

_BATCH_TOKENS = 2048
_LOGITS_BYTES = 32 << 20


Sink = Callable[[int, Sums, Mapping[str, Tensor]], None]
"""Takes a part's sums, and further tensors by name: ``token_frequency`` and ``input_curvature`` of the embedding."""


def batched(tokens: Tensor, window: int) -> list[Tensor]:
    """Disjoint windows of a text in batches, int64 ``[windows, window]``; a shorter last one comes by itself.

    Raises:
        CalibrationError: the text has fewer than 2 tokens.
    """
    if tokens.numel() < 2:
        raise CalibrationError("the calibration text has fewer than 2 tokens", hint="give a longer --calibration text")
    whole = tokens.numel() // window * window
    size = max(1, _BATCH_TOKENS // window)
    batches = list(torch.split(tokens[:whole].view(-1, window), size)) if whole else []
    return batches + ([tokens[whole:].unsqueeze(0)] if whole < tokens.numel() else [])


def observable(skeleton: Skeleton, parameters: Sequence[str]) -> dict[str, Tensor]:
    """Those of the parameters that are loaded and can be multiplied with."""
    weights = {w.parameter for w in skeleton.weights if w.kind in ("matrix", "head", "expert", "embedding")}
    return skeleton.loaded(path for path in parameters if path in weights)


def collect(
    skeleton: Skeleton,
    tokens: Tensor,
    sink: Sink,
    *,
    window: int,
    curvature: bool = True,
    seed: int = 0,
    spill_bytes: int = SPILL_BYTES,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Sum what the weights of a model see on a text.

    Args:
        skeleton: the model; nothing of it is loaded before or after.
        tokens: int64 ``[tokens]``, read in disjoint windows.
        sink: takes the sums of each part when they are complete, what is in no block last.
        window: tokens per window.
        curvature: go backward as well.
        seed: of the labels that are drawn.
        spill_bytes: hidden states beyond this go to disk.
        folder: where they go.
        progress: called after each batch.

    Raises:
        CalibrationError: fewer than 2 tokens, hidden states that are not finite, or a full disk.
    """
    batches = batched(tokens, window)
    blocks = range(len(skeleton.blocks))
    tick = _ticker(batches, (2 if curvature else 1) * len(blocks) * tokens.numel(), progress)
    with Activations(spill_bytes, folder) as states:
        walk = _Walk(skeleton, batches, states, seed, tick)
        outside, extra = Sums(), {"token_frequency": _frequency(skeleton, tokens)}
        skeleton.load(skeleton.parameters_outside)
        outside.add(walk.forward(OUTSIDE, observe=not curvature))
        for block in blocks:
            with skeleton.holding(skeleton.parameters_of(block)):
                sums = walk.forward(block, observe=not curvature)
            if not curvature:
                walk.discard(block)
                sink(block, sums, {})
        with skeleton.holding(filter(None, [skeleton.head])):
            outside.add(walk.head(curvature))
        for block in reversed(blocks) if curvature else ():
            with skeleton.holding(skeleton.parameters_of(block)):
                sink(block, walk.backward(block), {})
        if curvature:
            sums, squares = walk.backward_to_embedding()
            outside.add(sums)
            extra["input_curvature"] = (squares / tokens.numel()).float()
        sink(OUTSIDE, outside, extra)
    skeleton.drop(skeleton.parameters_outside)


def _frequency(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """How often each token is in the text, per token, FP32 ``[vocabulary]``."""
    rows = skeleton.model.get_input_embeddings().num_embeddings
    return torch.bincount(tokens, minlength=rows).double().div_(tokens.numel()).float()


@dataclass
class _Walk:
    """A model on its way through its blocks, all batches at each."""

    skeleton: Skeleton
    batches: list[Tensor]
    states: Activations  # hidden states; on the way back, at boundary k their gradient at -1 - k
    seed: int
    tick: Callable[[int], None]

    def forward(self, block: int, *, observe: bool) -> Sums:
        """From the boundary before a block to the one after it; ``OUTSIDE`` gives boundary 0."""
        found = Sums()
        weights = observable(self.skeleton, self._parameters(block)) if observe else {}
        start, stop = (None, 0) if block == OUTSIDE else (block, block + 1)

        def work(index: int) -> tuple[Tensor, Sums]:
            batch = BatchSums()
            with torch.no_grad(), Observer(weights, batch.see) if weights else nullcontext():
                given = None if start is None else self.states[start, index]
                return self.skeleton.run(self.batches[index], start, stop, given), batch.sums

        for index, (hidden, sums) in enumerate(ordered_map(work, range(len(self.batches)))):
            require_finite(hidden, block)
            self.states[stop, index] = hidden
            found.add(sums)
            self.tick(index if block != OUTSIDE else -1)
        return found

    def discard(self, boundary: int) -> None:
        """Forget the hidden states at a boundary."""
        for index in range(len(self.batches)):
            self.states.discard((boundary, index))

    def head(self, curvature: bool) -> Sums:
        """The head's sums; for the curvature also the gradient at its input."""
        found = Sums()
        last = len(self.skeleton.blocks)
        weights = observable(self.skeleton, [*self.skeleton.parameters_outside, *filter(None, [self.skeleton.head])])
        own = self.skeleton.head or self.skeleton.embedding or ""

        def work(index: int) -> tuple[Tensor | None, Sums]:
            batch = BatchSums()
            hidden, ids = self.states[last, index], self.batches[index]
            if not curvature:
                with torch.no_grad(), Observer(weights, lambda product: self._see_head(product, batch)):
                    for window in range(len(ids)):
                        self.skeleton.run(ids[window : window + 1], last, None, hidden[window : window + 1])
                return None, batch.sums
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
            return _head_gradient(self.skeleton, ids, hidden, weights, own, batch, generator), batch.sums

        for index, (gradient, sums) in enumerate(ordered_map(work, range(len(self.batches)))):
            self.states.discard((last, index))
            if gradient is not None:
                require_finite(gradient, last)
                self.states[-1 - last, index] = gradient
            found.add(sums)
        return found

    def _see_head(self, product: Product, batch: BatchSums) -> None:
        """What comes before the blocks runs again on the way to the head, and has been seen."""
        if self.skeleton.past_blocks:
            batch.see(product)

    def backward(self, block: int) -> Sums:
        """From the gradient after a block to the one before it."""
        found = Sums()
        weights = observable(self.skeleton, self._parameters(block))

        def work(index: int) -> tuple[Tensor, Sums]:
            batch = BatchSums()
            given = self.states[block, index].detach().requires_grad_()
            with torch.enable_grad(), Observer(weights, batch.see):
                output = self.skeleton.run(self.batches[index], block, block + 1, given)
                (gradient,) = torch.autograd.grad(output, given, self.states[-2 - block, index])
            return gradient, batch.sums

        for index, (gradient, sums) in enumerate(ordered_map(work, range(len(self.batches)))):
            require_finite(gradient, block)
            self.states.discard((block, index))
            self.states.discard((-2 - block, index))
            self.states[-1 - block, index] = gradient
            found.add(sums)
            self.tick(index)
        return found

    def backward_to_embedding(self) -> tuple[Sums, Tensor]:
        """From the gradient at boundary 0 to the embedding's output: Σ (∂ℓ/∂e)², FP64 ``[hidden]``."""
        found = Sums()
        weights = observable(self.skeleton, [p for p in self._parameters(OUTSIDE) if p != self.skeleton.embedding])

        def work(index: int) -> tuple[Tensor, Sums]:
            batch = BatchSums()
            with torch.enable_grad(), Observer(weights, batch.see):
                embedded, hidden = self.skeleton.run_from_embedding(self.batches[index])
                (gradient,) = torch.autograd.grad(hidden, embedded, self.states[-1, index])
            return gradient.flatten(0, -2).float().square().sum(0, dtype=torch.float64), batch.sums

        total = torch.zeros((), dtype=torch.float64)
        for squares, sums in ordered_map(work, range(len(self.batches))):
            total = total + squares
            found.add(sums)
        return found, total

    def _parameters(self, block: int) -> list[str]:
        return self.skeleton.parameters_outside if block == OUTSIDE else self.skeleton.parameters_of(block)


def _head_gradient(
    skeleton: Skeleton,
    ids: Tensor,
    hidden: Tensor,
    weights: dict[str, Tensor],
    own: str,
    batch: BatchSums,
    generator: torch.Generator,
) -> Tensor:
    """∂ℓ/∂hidden for labels drawn from the model; the head's curvature goes into ``batch``.

    Windows go one by one, and the logits of a few positions at a time where the model computes only those asked for.
    """
    last, gradients = len(skeleton.blocks), []
    for window in range(len(ids)):
        leaf = hidden[window : window + 1].detach().requires_grad_()
        total = torch.zeros_like(leaf)
        for call in _parts(skeleton, ids.shape[1]):
            products: list[Product] = []

            def see(product: Product, products: list[Product] = products) -> None:
                if not skeleton.past_blocks:
                    return
                if product.parameter == own:
                    products.append(product)
                    product = replace(product, result=product.result.detach())
                batch.see(product)

            with torch.enable_grad(), Observer(weights, see):
                logits = skeleton.run(ids[window : window + 1], last, None, leaf, **call)
                p = logits.detach().float().softmax(-1)
                for product in products:
                    # Logits may be a function of the product (scaled, capped), each of one element.
                    (slope,) = torch.autograd.grad(logits, product.result, torch.ones_like(logits), retain_graph=True)
                    squares = (slope.float().square() * p * (1 - p)).flatten(0, -2).sum(0, dtype=torch.float64)
                    batch.square((own, 0), squares)
                labels = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(*p.shape[:-1], 1)
                direction = p.scatter_add_(-1, labels, torch.full(labels.shape, -1.0)).to(logits.dtype)
                total += torch.autograd.grad(logits, leaf, direction)[0]
        gradients.append(total)
    return torch.cat(gradients)


def _parts(skeleton: Skeleton, length: int) -> list[dict[str, Any]]:
    """Arguments of ``forward`` for the logits of a window, a few positions at a time."""
    if not skeleton.keeps_logits:
        return [{}]
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings
    step = max(1, _LOGITS_BYTES // (4 * vocabulary))
    return [{"logits_to_keep": torch.arange(first, min(first + step, length))} for first in range(0, length, step)]


def require_finite(hidden: Tensor, block: int) -> None:
    """Raise CalibrationError where a block gives NaN or infinity."""
    if not bool(torch.isfinite(torch.stack(torch.aminmax(hidden))).all()):
        where = "the embedding" if block == OUTSIDE else f"block {block}"
        raise CalibrationError(
            f"{where} gives values that are not finite on this text",
            hint="check the checkpoint: its weights overflow FP32",
        )


def _ticker(batches: list[Tensor], total: int, progress: Progress | None) -> Callable[[int], None]:
    """Counts batches for ``progress``."""
    done = 0

    def tick(index: int) -> None:
        nonlocal done
        if progress is not None:
            done += batches[index].numel() if index >= 0 else 0
            progress(done, total)

    return tick
