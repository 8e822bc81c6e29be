"""What every tensor's error is expected to cost, from gradients alone: which tensors are worth measuring.

To second order, an error E of one tensor costs KL ≈ ½·E[(g·E)²] per token, where g is the gradient of the negative
log-likelihood of a label drawn from the model's own prediction (the Fisher information along E). Labels drawn at all
positions of a window are independent and their gradients have mean zero, so one backward pass over a window of T
tokens, with gradient G of the summed loss, gives ½·(G·E)²/T without bias for all tensors at once; the mean over n
windows has a relative standard deviation of about √(2/n). That tells tensors apart that differ by factors, and no more:
what is to be known better is measured (``bill``). Errors that are not small cost less or more than expected, and so
does what lies before a router of experts: gradients do not see that a token changes its expert.

A gradient is used as soon as it is there and then dropped, so that only one lives at a time; the decoded weights are
those that the loaded artifact holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenpak.checkpoint.structure import Weight
from tenpak.evaluation.diagnostics.pair import Pair, Progress, part_of
from tenpak.nn.modules import CompressedWeight

__all__ = ["expected_costs"]

_WINDOWS = 16
_SEED = 0


def expected_costs(pair: Pair, progress: Progress | None = None) -> dict[str, float]:
    """The expected cost of every compressed tensor alone, in nats per token; 0 for what no token has used."""
    chosen = torch.linspace(0, len(pair.windows) - 1, min(len(pair.windows), _WINDOWS)).round().long().tolist()
    generator = torch.Generator(device=pair.original.device).manual_seed(_SEED)
    sums: dict[str, float] = dict.fromkeys(pair.artifact.manifest.weights, 0.0)
    tokens = 0
    training = pair.original.training
    pair.original.train(False)
    try:
        with torch.enable_grad(), _projecting(pair, sums):
            for done, index in enumerate(chosen, start=1):
                window = pair.windows[index]
                inputs = pair.tokens[None, window.start : window.stop].to(pair.original.device)
                logits = pair.original(input_ids=inputs, use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
                cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
                tokens += len(labels)
                if progress:
                    progress("expected costs", done, len(chosen))
    finally:
        pair.original.train(training)
    return {name: total / (2 * tokens) for name, total in sums.items()}


@contextmanager
def _projecting(pair: Pair, sums: dict[str, float]) -> Iterator[None]:
    """Have every backward pass add (G·E)² to the sums of the tensors, and leave no gradient."""
    decoded = {module.name: module for module in pair.compressed.modules() if isinstance(module, CompressedWeight)}
    tensors: dict[str, list[Weight]] = defaultdict(list)
    for name in sums:
        tensors[pair.weights[name].parameter].append(pair.weights[name])
    wanted = {path: pair.original.get_parameter(path) for path in tensors}
    asked = [(parameter, parameter.requires_grad) for parameter in pair.original.parameters()]
    handles = []
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        for path, parameter in wanted.items():
            parameter.requires_grad_()

            def project(parameter: Tensor, weights: Sequence[Weight] = tuple(tensors[path])) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                for weight in weights:
                    sums[weight.name] += _projection(pair, weight, gradient, parameter.detach(), decoded) ** 2

            handles.append(parameter.register_post_accumulate_grad_hook(project))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in asked:
            parameter.requires_grad_(before)


def _projection(
    pair: Pair, weight: Weight, gradient: Tensor, parameter: Tensor, decoded: dict[str, CompressedWeight]
) -> float:
    """G·E of one tensor."""
    place, slope = part_of(pair, weight, parameter), part_of(pair, weight, gradient)
    matrices = zip(*(tensor if tensor.ndim == 3 else tensor[None] for tensor in (place, slope)), strict=True)
    total = 0.0
    for index, (own, g) in enumerate(matrices):
        found = decoded[weight.name].matrix(index)
        error = (found.T if weight.transposed else found).to(own) - own
        total += float((error.float() * g.float()).sum(dtype=torch.float64))
    return total
