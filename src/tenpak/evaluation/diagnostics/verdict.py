"""What a diagnosis says in plain words, by rules that are all here.

The cost of a tensor is what was measured, and what is expected of it where it was not. An error that is halved by one
bit more has a quarter of the cost, so at an even allocation a byte buys the same everywhere, and tensors compare by
KL per byte:

- *leave uncompressed*: a tensor that was measured to cost at least half of what all are expected to, and whose bytes in
  the checkpoint's dtype would add at most a tenth to the artifact
- *more bits*: measured, and KL per byte at least three times the median of all. Both need a cost of 0.001 nats per
  token: what is less is not worth bits
- *fewer bits*: KL per byte at most a sixteenth of that median, so that even after giving up a bit, at four times its
  cost, it stays below the median's quarter; for tensors of three bits or more, where the whole costs 0.001

From the activations: a last block that is off by half of its norm has drifted; explosions and the culprit are those of
``activations``. From the text: a continuation that is at least half repetition, and at least a quarter more than the
original's, has degenerated.

Where the whole costs 0.1 nats per token, without a culprit and without a tensor that costs half of it, it is *rough*:
the error is everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tenpak.evaluation.diagnostics.activations import Activations, exploded
from tenpak.evaluation.diagnostics.bill import Bill
from tenpak.evaluation.diagnostics.generation import Generation
from tenpak.evaluation.diagnostics.weights import TensorFigures

__all__ = ["NOTHING", "judge"]

NOTHING = "nothing stands out"

_WORTH = 1e-3  # nats per token
_ROUGH = 0.1
_HALF = 0.5  # of the measured costs
_AFFORDABLE = 0.1  # of the artifact's bytes
_MORE, _FEWER = 3.0, 1 / 16  # times the median KL per byte
_LEAST_BITS = 3.0
_FEW = 3  # measured tensors without which there is nothing to compare with
_LISTED = 8  # tensors by name
_DRIFTED = 0.5
_LOOP, _LOOP_MORE = 0.5, 0.25
_HEAVY_TAILS = 8.0  # kurtosis


def judge(
    activations: Activations,
    weights: Sequence[TensorFigures],
    bill: Bill,
    generation: Sequence[Generation],
    *,
    artifact_bytes: int,
    same_source: bool,
) -> tuple[str, ...]:
    """What stands out, most important first; at least that nothing does.

    Args:
        activations: of all blocks.
        weights: all compressed tensors.
        bill: measured costs.
        generation: continuations.
        artifact_bytes: size of the artifact's weight files.
        same_source: whether the artifact was made from this original.
    """
    found = []
    if not same_source:
        found.append("the original is not the checkpoint that the artifact was made from: its bytes differ")
    if not math.isfinite(bill.kl):
        found.append("the artifact's logits are not finite: it cannot be used")
    if bill.kl >= _ROUGH and activations.culprit is None and not _dominated(bill):
        found.append(
            f"the whole is rough, {bill.kl:.3g} nats per token, and no part is half of that: more bits for all of it, "
            "or rounding that reads a text (gptq-… recipes)"
        )
    found += _about_activations(activations)
    found += _about_bits(weights, bill, artifact_bytes)
    found += _about_generation(generation)
    return tuple(found) or (NOTHING,)


def _about_activations(activations: Activations) -> list[str]:
    found = []
    culprit, layers = activations.culprit, activations.layers
    if culprit is not None:
        found.append(f"the error starts in {culprit.layer}: {culprit.why}")
    blown = next((layer for layer in layers if exploded(layer)), None)
    if blown is not None:
        found.append(f"activations explode from {blown.name} on: {exploded(blown)}")
    elif layers[-1].relative_error >= _DRIFTED:
        start = next(layer for layer in layers if layer.relative_error >= _DRIFTED)
        found.append(
            f"activations drift: the last block's output is off by {layers[-1].relative_error:.0%} of its norm; "
            f"{_DRIFTED:.0%} is passed in {start.name}"
        )
    return found


def _about_bits(weights: Sequence[TensorFigures], bill: Bill, artifact_bytes: int) -> list[str]:
    figures = {tensor.name: tensor for tensor in weights}
    broken = [name for name, kl in bill.tensors.items() if not math.isfinite(kl)]
    found = [f"leave {name} uncompressed: with it alone replaced, the logits are not finite" for name in broken]
    costs = _costs(bill)
    total = sum(costs.values())
    rates = {name: kl / figures[name].bytes for name, kl in costs.items()}
    if total < _WORTH or len(rates) < _FEW:
        return found
    median = statistics.median(rates.values())
    measured = sorted((n for n in bill.tensors if costs.get(n, 0.0) >= _WORTH), key=lambda name: -rates[name])
    more = []
    for name in measured:
        tensor, cost = figures[name], f"{costs[name]:.3g} nats per token"
        added = (tensor.dense_bytes - tensor.bytes) / artifact_bytes
        if costs[name] >= _HALF * total and added <= _AFFORDABLE:
            found.append(
                f"leave {name} uncompressed: alone it costs {cost}, {costs[name] / total:.0%} of all, and uncompressed "
                f"it adds {added:.1%} to the bytes"
            )
        elif rates[name] >= _MORE * median:
            tails = f"; its tails are heavy (kurtosis {tensor.kurtosis:.0f}): smaller groups may do"
            times = f"{rates[name] / median:.1f} times the median per byte" if median > 0 else "the median nothing"
            more.append(f"{name}: it costs {cost}, {times}{tails if tensor.kurtosis >= _HEAVY_TAILS else ''}")
    fewer = [n for n in rates if rates[n] <= _FEWER * median and figures[n].bits_per_weight >= _LEAST_BITS]
    less = [
        f"{name}: {costs[name]:.2g} nats per token for {figures[name].bytes:,} bytes"
        for name in sorted(fewer, key=lambda name: -figures[name].bytes)
    ]
    return [*found, *_listed("more bits for", more), *_listed("fewer bits would do for", less)]


def _costs(bill: Bill) -> dict[str, float]:
    """What every tensor costs, as far as that is finite."""
    found = {**bill.expected, **bill.tensors}
    return {name: max(kl, 0.0) for name, kl in found.items() if math.isfinite(kl)}


def _dominated(bill: Bill) -> bool:
    """Whether a single tensor costs half of all, or breaks everything."""
    costs = _costs(bill)
    return len(costs) < len(bill.expected) or max(costs.values(), default=0.0) >= _HALF * sum(costs.values())


def _listed(what: str, tensors: Sequence[str]) -> list[str]:
    rest = len(tensors) - _LISTED
    return [f"{what} {each}" for each in tensors[:_LISTED]] + ([f"{what} {rest} more tensors"] if rest > 0 else [])


def _about_generation(generation: Sequence[Generation]) -> list[str]:
    looping = [
        each
        for each in generation
        if each.repetition >= _LOOP and each.repetition >= each.repetition_original + _LOOP_MORE
    ]
    return [
        f"generation degenerates after {_shortened(each.prompt)!r}: {each.repetition:.0%} of it is repetition, of the "
        f"original's {each.repetition_original:.0%}"
        for each in looping
    ]


def _shortened(prompt: str) -> str:
    text = " ".join(prompt.split())
    return text if len(text) <= 40 else "… " + text[-38:]
