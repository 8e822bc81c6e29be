"""A guess of the output curvature from names and positions, for the fast mode that never goes backward.

What can be measured going forward is the energy tr H of a weight's inputs. On the models that the curvature was
measured on, its product with Σᵢ gᵢ, what it would cost in nats per token to lose the weight altogether to second order,
lies within one order of magnitude for weights of the same role, some 100, while gᵢ itself spans five. So ::

    gᵢ = role · position / (out · tr H)        for all outputs i alike

Queries and keys cost least, values most; early blocks cost more than late ones, since everything after them sees their
errors. Names are the ones in use (``q_proj``, ``query``, ``wv`` …); others count as average.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tenpak.calibration.skeleton import OUTSIDE
from tenpak.calibration.sums import Sums

__all__ = ["guess_curvature", "position", "role"]

# Geometric means over blocks of three small Llamas, rounded.
_ROLES = (
    (re.compile(r"\b(q_proj|k_proj|q|k|query|key|wq|wk|q_lin|k_lin)\b"), 40.0),
    (re.compile(r"\b(v_proj|v|value|wv|v_lin)\b"), 200.0),
    (re.compile(r"\b(o_proj|out_proj|dense|wo|c_proj)\b"), 200.0),
    (re.compile(r"\b(down_proj|fc2|fc_out|dense_4h_to_h|w2)\b"), 200.0),
)
_AVERAGE = 120.0
_FIRST, _LAST = 1.5, 0.7


def role(parameter: str) -> float:
    """What it costs to lose a weight of this name, in nats per token, in a block of average position."""
    return next((cost for pattern, cost in _ROLES if pattern.search(parameter)), _AVERAGE)


def position(block: int, blocks: int) -> float:
    """How much more, or less, an error costs in this block than in one of average position."""
    return _FIRST + (_LAST - _FIRST) * (block / (blocks - 1) if blocks > 1 else 0.0)


def guess_curvature(sums: Sums, part: int, blocks: int, outputs: dict[str, int]) -> None:
    """Fill in a guess of Σ (∂ℓ/∂y)² for every weight of a part.

    Args:
        sums: of the part's weights; their ``squares`` are replaced.
        part: a block's number, or ``OUTSIDE``.
        blocks: how many blocks there are.
        outputs: parameter → outputs of each of its matrices.
    """
    here = 1.0 if part == OUTSIDE else position(part, blocks)
    for key, group in sums.group_of.items():
        inputs = sums.inputs[group]
        energy = float(inputs.outer.diagonal().double().sum()) / max(inputs.count, 1)
        each: Tensor = torch.zeros(outputs[key[0]], dtype=torch.float64)
        if energy > 0:
            each += role(key[0]) * here * inputs.count / (outputs[key[0]] * energy)
        sums.squares[key] = each
