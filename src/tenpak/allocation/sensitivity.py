"""What an encoding of a tensor is predicted to cost the model, to second order, in nats per token of text.

Of a layer y = Wx an error E = W - Ŵ costs ½·Σᵢ gᵢ·(E H Eᵀ)ᵢᵢ, with H = E[x xᵀ] and g the output curvature, the
diagonal of the Fisher information of the outputs. An expert counts for the share of the tokens that it saw. Of an
embedding, tied to the head or not, row v costs ½·E_v (g_v H + f_v diag c) E_vᵀ, f its frequency in the text and c the
curvature at its output. A matrix of which nothing is known counts as if losing it whole cost ``UNKNOWN`` nats: too much
rather than too little.

It leaves out what errors of different tensors do to each other, and that later tensors are rounded for what became of
earlier ones; ``profile --measure`` shows how near it comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Statistics
from tenpak.codecs.grouping import row_tiles
from tenpak.codecs.loss import output_loss
from tenpak.errors import CalibrationError, MissingStatisticsError

__all__ = ["predicted_loss"]

UNKNOWN = 1.0


def predicted_loss(
    weight: Weight,
    tensor: Tensor,
    decoded: Sequence[Tensor],
    statistics: Sequence[Statistics | None],
    tokens: int,
) -> float:
    """The predicted loss of a tensor that is replaced, nats per token; infinite where it is not a number.

    Args:
        weight: what it is.
        tensor: its values, in their stored shape.
        decoded: what each of its matrices would become, FP32 ``[out, in]``.
        statistics: of its matrices.
        tokens: that the statistics are of.

    Raises:
        MissingStatisticsError: no output curvature was collected for a matrix; names the tensor.
        CalibrationError: statistics are of another shape; names the tensor.
    """
    total = 0.0
    for plain, other, known in zip(weight.unstacked(tensor), decoded, statistics, strict=True):
        total += _of_matrix(weight, plain, other, known or Statistics(), tokens)
    return total


def _of_matrix(weight: Weight, plain: Tensor, decoded: Tensor, known: Statistics, tokens: int) -> float:
    """Of one matrix, in its own dtype: in FP32 an embedding would take a lot."""
    rows, columns = plain.shape
    for name, length in (("output_curvature", rows), ("hessian", columns), ("token_frequency", rows)):
        found = getattr(known, name)
        if found is not None and len(found) != length:
            raise CalibrationError(f"{weight.name}: the statistics are of another shape", hint="calibrate this model")
    total = 0.0
    looked_up = known.input_curvature is not None and known.token_frequency is not None
    if looked_up:
        total += output_loss(plain, decoded, known.input_curvature, known.token_frequency) / 2
    if known.hessian is not None and known.output_curvature is not None:
        seen = min(1.0, (known.count or 0) / max(tokens, 1)) if weight.kind == "expert" else 1.0
        total += seen * output_loss(plain, decoded, known.hessian, known.output_curvature) / 2
    elif not looked_up and known.hessian is not None:
        raise MissingStatisticsError(
            f"{weight.name}: the statistics hold no output curvature", hint="collect them with `tenpak calibrate`"
        )
    elif not looked_up:
        energy = sum(float(plain[tile].double().square().sum()) for tile in row_tiles(rows, columns))
        lost = output_loss(plain, decoded, None, None)
        total = UNKNOWN * lost / energy if energy > 0 else 0.0
    return total
