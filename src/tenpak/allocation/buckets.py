"""How much it costs to round a tensor: what the bucket policies decide by.

One number for each group of matrices that are encoded alike (a tensor; all experts of a layer), relative to the most
sensitive group of the model, so that it is 1 for that one and bounds on it mean the same for every model::

    s = cost / weights        sensitivity = s / max s

``cost`` is what rounding to 4 bits in groups of 32 would cost, in nats per token and to second order, summed over a
group and shared by its weights, since groups are paid for by the weight. Two ways to know it:

- *simple*, from names, position and magnitude: the loss of the whole weight as guessed by ``calibration.heuristics``,
  times the share of its energy that rounding loses, ‖W - Ŵ‖² / ‖W‖²
- *fisher*, from statistics: ½ Σᵢ gᵢ (E H Eᵀ)ᵢᵢ of E = W - Ŵ, g the output curvature (the diagonal of the Fisher
  information of the outputs), H the second moments of the inputs; experts by the share of the tokens that they saw
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tenpak.allocation.sensitivity import predicted_loss
from tenpak.calibration.experts import rows_before
from tenpak.calibration.heuristics import position, role
from tenpak.calibration.statistics import StatisticsFolder
from tenpak.checkpoint.parts import Place
from tenpak.checkpoint.source import Checkpoint
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.loss import output_loss
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError
from tenpak.kernels.parallel import ordered_map

__all__ = ["sensitivities"]

_TRIAL = Uniform(bits=4, group=32)


@dataclass(frozen=True)
class _Measured:
    """Of a tensor: its weights, ‖W‖², ‖W - Ŵ‖² and, where statistics are known, its cost in nats per token."""

    weights: int
    energy: float
    lost: float
    cost: float


def sensitivities(
    checkpoint: Checkpoint,
    groups: Sequence[Sequence[Weight]],
    places: Mapping[str, Place],
    known: StatisticsFolder | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[float]:
    """The sensitivity of each group, 0 to 1; *fisher* with statistics and *simple* without. Reads every tensor once.

    Args:
        checkpoint: the source.
        groups: tensors that are encoded alike.
        places: of all of them.
        known: statistics of the original model.
        progress: called with the phase, weights done and weights in all.

    Raises:
        CheckpointError: a tensor cannot be read.
        CodecError: a tensor holds what no codec takes; names it.
        MissingStatisticsError: the statistics hold no output curvature for a tensor; names it.
    """
    order = [weight for group in groups for weight in group]
    before = rows_before(order)

    def measure(weight: Weight) -> _Measured:
        return _measured(weight, checkpoint.read(weight.name), known, before.get(weight.name, 0))

    found: dict[str, _Measured] = {}
    done, total = 0, sum(weight.numel for weight in order)
    for weight, measured in zip(order, ordered_map(measure, order), strict=True):
        found[weight.name] = measured
        done += weight.numel
        if progress is not None:
            progress("weighing", done, total)
    shares = [_share([found[weight.name] for weight in group], group[0], places, known) for group in groups]
    largest = max(shares, default=0.0)
    return [share / largest if largest > 0 else 0.0 for share in shares]


def _share(
    measured: Sequence[_Measured], first: Weight, places: Mapping[str, Place], known: StatisticsFolder | None
) -> float:
    """What a weight of a group costs."""
    weights = sum(m.weights for m in measured)
    if known is not None:
        return sum(m.cost for m in measured) / weights
    place, energy = places[first.name], sum(m.energy for m in measured)
    guess = role(first.parameter) * position(place.block, place.blocks)
    return guess * sum(m.lost for m in measured) / energy / weights if energy > 0 else 0.0


def _measured(weight: Weight, tensor: Tensor, known: StatisticsFolder | None, rows: int) -> _Measured:
    matrices = weight.unstacked(tensor)
    statistics = (None,) * len(matrices) if known is None else known.of(weight, rows_before=rows)
    tokens = 1 if known is None else known.origin.tokens
    energy, lost, replaced = 0.0, 0.0, []
    for matrix in matrices:
        plain = matrix.float()
        try:
            decoded = _TRIAL.decode(_TRIAL.encode(plain))
        except CodecError as error:
            raise type(error)(f"{weight.name}: {error}", hint=error.hint) from error
        energy += float(plain.double().square().sum())
        lost += output_loss(plain, decoded, None, None)
        replaced.append(decoded)
    cost = 0.0 if known is None else predicted_loss(weight, tensor, replaced, statistics, tokens)
    return _Measured(weight.numel, energy, lost, cost)
