"""Codes and codebooks that keep the error of the layer's output small: what ``vector/1`` and ``additive/1`` search.

With E = W - Ŵ the loss is Σᵢ gᵢ·(E H Eᵀ)ᵢᵢ. ``rounding.feedback`` gives F, unit lower triangular, and pivots D with
H = Fᵀ D F (H damped). Codes are chosen in three ways, which all come down to ``codebooks.nearest``; J are the columns
of a vector and r what the other vectors' errors add to it:

*Feedback* (GPTQ with vectors for columns; van Baalen et al. 2024, GPTVQ, arXiv 2402.15319): vectors from left to right,
each nearest to ``w_J + F_JJ⁻¹·r``, r = Σ_{j<J} F_Jj·e_j, in the metric ``F_JJᵀ D_J F_JJ``. Unlike a metric of the
Hessian's diagonal this is exact: given the vectors before, no other code leaves a smaller loss up to here.

*Sweeps* (coordinate descent, as Egiazarian et al. 2024, AQLM, arXiv 2401.06118, section 3.2): each vector again, given
all others: nearest to ``w_J + H_JJ⁻¹·r``, r = Σ_{j∉J} H_Jj·e_j, in the metric ``H_JJ``. No step increases the loss.

*Nearest*, without statistics: H is the identity, each vector by itself.

Between sweeps all entries of all codebooks are solved for at once by least squares under the whole Hessian: conjugate
gradients on the normal equations, one product E·H an iteration. Then each row's scale is solved for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tenpak.codecs.base import Statistics
from tenpak.codecs.codebooks import cut, expand, kmeans, nearest, root_mean_square, sampled, scatter
from tenpak.codecs.grouping import row_importance
from tenpak.codecs.rounding.feedback import feedback
from tenpak.errors import CodecError

__all__ = ["Fitted", "Loss", "Plan", "fit", "least_squares", "loss_of"]

_BLOCK = 128  # columns per large GEMM, whole vectors of any dimension
_TILE = 1 << 19  # weights that are worked on at a time
_CONJUGATE_GRADIENTS = 12  # further ones are worth less than another sweep
_ENOUGH = 1e-3  # relative gain of a round below which there is no other
_PADDING = 1e-6  # pivot of columns beyond the row, relative: next to nothing, but no singular system


@dataclass(frozen=True)
class Plan:
    """What is searched for.

    Attributes:
        dimension: weights per vector.
        entries: of each codebook.
        books: number of codebooks.
        scaled: whether rows have scales.
        width: of the beam search.
        rounds: of codebooks, scales and codes, after the first codes.
        seed: of k-means.
    """

    dimension: int
    entries: int
    books: int
    scaled: bool
    width: int
    rounds: int
    seed: int


@dataclass(frozen=True)
class Fitted:
    """A weight on its way to a payload.

    Attributes:
        scales: FP16 ``[out]``, ones where rows have none.
        codebooks: FP16 ``[books, entries, dimension]``.
        codes: int64 ``[out, vectors, books]``.
    """

    scales: Tensor
    codebooks: Tensor
    codes: Tensor

    @property
    def books(self) -> list[Tensor]:
        """The codebooks in FP32."""
        return list(self.codebooks.float())

    def sums(self, rows: slice) -> Tensor:
        """The sums of entries of some rows, FP32 ``[rows, padded in]``, not scaled."""
        return expand(self.codes[rows], self.books).flatten(1)


@dataclass(frozen=True)
class Loss:
    """H and its factors, padded to whole vectors; FP32. All rows share them.

    Attributes:
        earlier: F, ``[in, in]``.
        hessian: ``[in, in]``.
        feedback: F_JJ⁻¹, ``[vectors, dimension, dimension]``.
        others: H_JJ⁻¹, likewise.
        pivots: F_JJᵀ D_J F_JJ, likewise.
        blocks: H_JJ, likewise.
    """

    earlier: Tensor
    hessian: Tensor
    feedback: Tensor
    others: Tensor
    pivots: Tensor
    blocks: Tensor


def fit(
    weight: Tensor,
    plan: Plan,
    damping: float,
    statistics: Statistics | None,
    by_magnitude: bool,
    codebooks: Tensor | None = None,
) -> Fitted:
    """Codes, codebooks and scales for ``weight``, FP32 ``[out, in]`` on the CPU, to be called with one thread.

    Args:
        weight: what is encoded.
        plan: what is searched for.
        damping: of the Hessian, relative to its mean diagonal.
        statistics: Hessian and output curvature, or None: all inputs and outputs count the same.
        by_magnitude: vectors count as much as they are long, without statistics.
        codebooks: stay as they are, FP16 ``[books, entries, dimension]``; None where they are to be found.

    Raises:
        CodecError: statistics do not fit the weight or are not finite, or the weight exceeds FP16's range.
        MissingStatisticsError: there are statistics, but no Hessian.
        SingularHessianError: the Hessian is indefinite.
    """
    rows, columns = weight.shape
    known = None if statistics is None else loss_of(statistics, columns, plan.dimension, damping)
    vectors = cut(weight, plan.dimension)
    by_row = row_importance(statistics, rows, weight.device)
    importance = torch.ones(rows, 1) if by_row is None else by_row.unsqueeze(1)
    if by_magnitude:
        # Relative to the mean, so that squares stay in FP32's range.
        importance = vectors.norm(dim=-1)
        importance = importance / importance.mean().clamp(1e-30)
    scales = torch.ones(rows, dtype=torch.float16)
    if plan.scaled:
        scales = torch.cat([root_mean_square(weight[tile]) for tile in _tiles(rows, columns)]).half()
    start = Fitted(scales, torch.zeros(plan.books, plan.entries, plan.dimension, dtype=torch.float16), torch.empty(0))
    found = _initial(vectors, importance, known, start, plan) if codebooks is None else codebooks
    start = replace(start, codebooks=found)
    _require_finite(start)
    target = vectors.flatten(1)
    best = fitted = replace(start, codes=_codes(target, start, known, plan.width, first=True))
    least = _total(target, importance, known, fitted) if plan.rounds else 0.0
    for _ in range(plan.rounds):
        if codebooks is None:
            fitted = replace(fitted, codebooks=least_squares(target, importance, known, fitted))
        if plan.scaled:
            fitted = replace(fitted, scales=_rescaled(target, known, fitted))
        _require_finite(fitted)
        fitted = replace(fitted, codes=_codes(target, fitted, known, plan.width, first=False))
        now = _total(target, importance, known, fitted)
        if not now < least:
            break
        enough, best, least = now > (1 - _ENOUGH) * least, fitted, now
        if enough:
            break
    return best


def _require_finite(fitted: Fitted) -> None:
    if not bool(fitted.scales.isfinite().all() and fitted.codebooks.isfinite().all()):
        raise CodecError(
            "scales or codebooks of the weight exceed FP16's range (±65504)",
            hint="leave this tensor dense (--set 'NAME=dense')",
        )


def _tiles(rows: int, columns: int) -> list[slice]:
    """Rows that are worked on together; they depend on the shape only, as then do the sums of products."""
    step = max(1, _TILE // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def loss_of(statistics: Statistics, columns: int, dimension: int, damping: float) -> Loss:
    """The matrices of the loss, from the damped Hessian."""
    shared = feedback(statistics, columns, damping, by_activation=False, sweeps=False).to(torch.device("cpu"))
    more = -columns % dimension
    earlier = pad(shared.earlier, (0, more, 0, more))
    earlier.diagonal()[columns:] = 1
    pivots = pad(shared.pivots / shared.pivots.mean(), (0, more), value=_PADDING)
    hessian = (earlier.T * pivots) @ earlier  # that with which Cholesky succeeded

    def blocks(matrix: Tensor) -> Tensor:
        cells = matrix.view(len(matrix) // dimension, dimension, -1, dimension)
        return cells.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    own, of_hessian = blocks(earlier), blocks(hessian)
    identity = torch.eye(dimension).expand_as(own)
    return Loss(
        earlier,
        hessian,
        torch.linalg.solve_triangular(own, identity, upper=False, unitriangular=True),
        torch.linalg.inv(of_hessian.double()).float(),
        (own.mT * pivots.view(-1, 1, dimension)) @ own,
        of_hessian,
    )


def _inverse(scales: Tensor) -> Tensor:
    """1/scale in FP32, zero where the scale is."""
    scales = scales.float()
    return torch.where(scales != 0, scales.reciprocal(), 0.0)


def _initial(vectors: Tensor, importance: Tensor, known: Loss | None, start: Fitted, plan: Plan) -> Tensor:
    """Codebooks by k-means, each of what those before it leave: FP16 ``[books, entries, dimension]``."""
    generator = torch.Generator().manual_seed(plan.seed)
    count = vectors.shape[1]
    points = (vectors * _inverse(start.scales)[:, None, None]).transpose(0, 1)
    weights = (importance * start.scales.float().square().unsqueeze(1)).expand(-1, count).T
    if known is None:
        points, weights = points.reshape(1, -1, plan.dimension), weights.reshape(1, -1)
    points, weights = sampled(points, weights, plan.entries, generator)
    metric = None if known is None else known.pivots
    codebooks = []
    for number in range(plan.books):
        codebook = kmeans(points, weights, metric, plan.entries, generator).half()
        codebooks.append(codebook)
        if number < plan.books - 1:
            metrics = [None] if metric is None else metric
            book = [codebook.float()]
            points = torch.stack([p - expand(nearest(p, book, m), book) for p, m in zip(points, metrics, strict=True)])
    return torch.stack(codebooks)


def _codes(target: Tensor, fitted: Fitted, known: Loss | None, width: int, first: bool) -> Tensor:
    """Codes for these codebooks and scales, int64 ``[out, vectors, books]``; not ``first``: better ones."""
    parts = []
    inverse, books = _inverse(fitted.scales), fitted.books
    for tile in _tiles(*target.shape):
        current = None if first else fitted.codes[tile]
        if known is None:
            points = (target[tile] * inverse[tile, None]).view(-1, books[0].shape[1])
            before = None if current is None else current.view(len(points), -1)
            parts.append(nearest(points, books, None, width, before).view(tile.stop - tile.start, -1, len(books)))
            continue
        part = _Rows(target[tile].T.contiguous(), fitted.scales[tile].float(), inverse[tile], books, width)
        if current is None:
            parts.append(part.fed_back(known))
        else:
            parts.append(part.swept(known, current, fitted.sums(tile)))
    return torch.cat(parts)


@dataclass(frozen=True)
class _Rows:
    """Some rows whose codes are chosen; ``weight`` is FP32 ``[in, rows]``: a vector's columns are contiguous."""

    weight: Tensor
    scales: Tensor
    inverse: Tensor
    books: list[Tensor]
    width: int

    def vectors(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """Number of each vector from column ``start`` to ``stop``, its columns, and these counted from ``start``."""
        dimension = self.books[0].shape[1]
        for first in range(start, stop, dimension):
            own = slice(first, first + dimension)
            yield first // dimension, own, slice(first - start, first - start + dimension)

    def choose(self, aim: Tensor, metric: Tensor, current: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes for ``aim``, ``[dimension, rows]``, and what they stand for."""
        codes = nearest((aim * self.inverse).T.contiguous(), self.books, metric, self.width, current)
        return codes, expand(codes, self.books).T * self.scales

    def fed_back(self, known: Loss) -> Tensor:
        """Codes ``[rows, vectors, books]``, from left to right."""
        weight, matrix = self.weight, known.earlier
        errors, codes = torch.zeros_like(weight), []
        for start in range(0, len(weight), _BLOCK):
            stop = min(start + _BLOCK, len(weight))
            fed = matrix[start:stop, :start] @ errors[:start]
            for number, own, local in self.vectors(start, stop):
                rest = torch.addmm(fed[local], matrix[own, start : own.start], errors[start : own.start])
                aim = torch.addmm(weight[own], known.feedback[number], rest)
                code, value = self.choose(aim, known.pivots[number], None)
                torch.sub(weight[own], value, out=errors[own])
                codes.append(code)
        return torch.stack(codes, 1)

    def swept(self, known: Loss, current: Tensor, sums: Tensor) -> Tensor:
        """Codes ``[rows, vectors, books]`` of no larger loss than the ``current``, whose sums are ``[rows, in]``."""
        weight, matrix = self.weight, known.hessian
        errors, codes = weight - sums.T * self.scales, []
        for start in range(0, len(weight), _BLOCK):
            stop = min(start + _BLOCK, len(weight))
            fed = matrix[start:stop] @ errors
            moved = torch.zeros_like(fed)
            for number, own, local in self.vectors(start, stop):
                rest = torch.addmm(fed[local], matrix[own, start : own.start], moved[: local.start])
                rest -= known.blocks[number] @ errors[own]
                aim = torch.addmm(weight[own], known.others[number], rest)
                code, value = self.choose(aim, known.blocks[number], current[:, number])
                torch.sub(weight[own] - value, errors[own], out=moved[local])
                errors[own] += moved[local]
                codes.append(code)
        return torch.stack(codes, 1)


def _gradient(errors: Tensor, importance: Tensor, known: Loss | None) -> Tensor:
    """E H, its vectors as much as they count, ``[rows, vectors, dimension]``."""
    count = importance.shape[1]
    product = errors if known is None else errors @ known.hessian
    return product.view(len(errors), count, -1) * importance.unsqueeze(-1)


def _total(target: Tensor, importance: Tensor, known: Loss | None, fitted: Fitted) -> float:
    """The loss."""
    total = 0.0
    for tile in _tiles(*target.shape):
        errors = target[tile] - fitted.sums(tile) * fitted.scales[tile, None].float()
        gradient = _gradient(errors, importance[tile], known)
        total += float((gradient.flatten(1) * errors).double().sum())
    return total


def _rescaled(target: Tensor, known: Loss | None, fitted: Fitted) -> Tensor:
    """Each row's scale of least loss given codes and codebooks, FP16 ``[out]``."""
    parts = []
    for tile in _tiles(*target.shape):
        sums = fitted.sums(tile)
        product = sums if known is None else sums @ known.hessian
        top, bottom = (product * target[tile]).double().sum(1), (product * sums).double().sum(1)
        best = (top / bottom).half()
        parts.append(torch.where((best > 0) & best.isfinite(), best, fitted.scales[tile]))
    return torch.cat(parts)


def least_squares(target: Tensor, importance: Tensor, known: Loss | None, fitted: Fitted) -> Tensor:
    """Codebooks of least loss given codes and scales, FP16 ``[books, entries, dimension]``: conjugate gradients."""
    books, entries, dimension = fitted.codebooks.shape
    tiles = _tiles(*target.shape)
    scales = fitted.scales.float()

    def collected(tile: slice, values: Tensor) -> Tensor:
        """Sums by entry of ``values``, ``[rows, vectors, dimension]``, times the scales."""
        flat = (values * scales[tile, None, None]).reshape(-1, dimension)
        codes = fitted.codes[tile].reshape(-1, books)
        return torch.stack([scatter(flat, code, entries) for code in codes.unbind(1)])

    def applied(change: Tensor) -> Tensor:
        """The normal equations' matrix times a change of the codebooks."""
        total, moved = torch.zeros_like(change), list(change.float())
        for tile in tiles:
            errors = expand(fitted.codes[tile], moved).flatten(1) * scales[tile, None]
            total += collected(tile, _gradient(errors, importance[tile], known))
        return total

    rest = torch.zeros(books, entries, dimension, dtype=torch.float64)
    diagonal = torch.zeros_like(rest)
    own = torch.ones(1, target.shape[1]) if known is None else known.hessian.diagonal().unsqueeze(0)
    for tile in tiles:
        errors = target[tile] - fitted.sums(tile) * scales[tile, None]
        rest += collected(tile, _gradient(errors, importance[tile], known))
        cells = (own * scales[tile, None]).view(tile.stop - tile.start, -1, dimension)
        diagonal += collected(tile, cells * importance[tile].unsqueeze(-1))
    inverse = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)
    change = torch.zeros_like(rest)
    direction = inverse * rest
    product = float((rest * direction).sum())
    enough = 1e-8 * product
    for _ in range(_CONJUGATE_GRADIENTS):
        if not product > enough:
            break
        image = applied(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        change += product / curvature * direction
        rest -= product / curvature * image
        conditioned = inverse * rest
        before, product = product, float((rest * conditioned).sum())
        direction = conditioned + product / before * direction
    return (fitted.codebooks + change).half()
