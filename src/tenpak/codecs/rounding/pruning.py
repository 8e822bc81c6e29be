"""``pruning``: which two of every four weights of a row to keep, and their values, with feedback of all errors.

The loss of a row's error E = W - Ŵ is E H' Eᵀ = ‖E U‖², H' = U·Uᵀ the damped Hessian (see ``feedback``). Blocks of four
columns are settled one after another. Given the errors before it, a block's part of E U is least, and zero, for values
t that ``feedback`` names. With G = U_b U_bᵀ its part of U, keeping the pair K and not the pair P costs ::

    t_Pᵀ·(G_PP - G_PK G_KK⁻¹ G_KP)·t_P        at the values  t_K + G_KK⁻¹ G_KP t_P

so the best of the six pairs is known exactly. SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, section 3) walks
the columns in this way with the diagonal only, t_i²·U_ii², which cannot see that two weights of a block make up for
each other. The kept values are rounded at once to the levels of the codec that stores them, the second knowing the
error of the first: later columns make up for pruning and rounding alike.

Columns before a block have not made up for what it loses. ``sweeps`` of block coordinate descent do so: each block gets
pair and values again, given all others, G being H' of its columns; it keeps what it had where that is better, so no
sweep increases the damped loss (but by the rounding of FP32).

Levels belong to groups of kept values. A group's are fitted when its first block is reached, to the values that would
be kept if its columns could take any; with one group per row, before anything is rounded.

Rows do not depend on each other. A tile of rows is one thread's, and is cut by shape only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tenpak.codecs.base import Statistics
from tenpak.codecs.grouping import Segment
from tenpak.codecs.rounding.base import Column, Grids, Rounded, Rounding
from tenpak.codecs.rounding.feedback import feedback
from tenpak.kernels.parallel import one_thread, ordered_map

__all__ = ["PAIRS", "Exact", "Metric", "Pruned", "Pruning", "metric", "prune"]

PAIRS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""The pairs i < j of a block's columns by number, j·(j - 1)/2 + i: a row that ends early uses the first of them."""

_PRODUCTS = tuple((i, j) for i in range(4) for j in range(i, 4))
_BLOCK = 128  # columns per large GEMM
_TILE = 1024  # rows at most
_ONE_AT_A_TIME = Lock()  # held for many small operations, while other threads multiply matrices; as in ``gptq``


@dataclass(frozen=True)
class _Costs:
    """For each block of four columns, tables over the six pairs that may be kept; FP32.

    Attributes:
        losses: coefficients of the products t_i t_j, i ≤ j, ``[blocks, 6, 10]``.
        values: what is kept as a function of t, ``[blocks, 12, 4]``, two rows for each pair.
        ratio: how far the second kept value moves by the error of the first, ``[blocks, 6]``.
        forbidden: infinite for pairs beyond the row's end, else zero, ``[blocks, 6, 1]``.
    """

    losses: Tensor
    values: Tensor
    ratio: Tensor
    forbidden: Tensor

    def choose(self, first: int, free: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs and kept values of blocks from ``first`` for t = ``free``, FP32 ``[blocks, 4, rows]``.

        Returns:
            int64 ``[blocks, rows]`` and FP32 ``[blocks, 2, rows]``.
        """
        these = slice(first, first + len(free))
        products = torch.stack([free[:, i] * free[:, j] for i, j in _PRODUCTS], 1)
        pairs = torch.baddbmm(self.forbidden[these], self.losses[these], products).argmin(1)
        every = torch.bmm(self.values[these], free).view(len(free), 6, 2, -1)
        chosen = pairs[:, None, None].expand(-1, 1, 2, -1)
        return pairs, every.gather(1, chosen).squeeze(1)


@dataclass(frozen=True)
class Metric:
    """What all rows of a weight share; columns are padded to a multiple of four with ones that do not matter.

    Attributes:
        columns: input columns of the weight.
        earlier: F of the columns before, see ``feedback``, FP32 ``[in, in]``.
        hessian: H', FP32 ``[in, in]``, relative to its mean diagonal; None where no sweep is made.
        greedy: costs of a block whose later columns make up for it.
        settled: costs of a block given all others; None where no sweep is made.
    """

    columns: int
    earlier: Tensor
    hessian: Tensor | None
    greedy: _Costs
    settled: _Costs | None


@dataclass(frozen=True)
class Pruned:
    """Some rows, pruned.

    Attributes:
        rows: which rows.
        pairs: numbers of the kept pairs, uint8 ``[rows, blocks]``.
        codes: codes of the kept values within the row, uint8 ``[rows, half]``.
        values: what they stand for, FP32 of that shape.
        parameters: payload field → its values, ``[rows, groups of a row]``.
    """

    rows: slice
    pairs: Tensor
    codes: Tensor
    values: Tensor
    parameters: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pruning(Rounding):
    """The rounding with which a codec stores the values kept of ``weight``; ``pairs`` is filled as it goes.

    What a codec hands over is of half the width and shows it how large the values are; they are chosen anew.
    """

    name: ClassVar[str] = "pruning"

    weight: Tensor
    metric: Metric
    sweeps: int
    pairs: list[Tensor] = field(default_factory=list)

    def round(self, weight: Tensor, grids: Grids, statistics: Statistics | None) -> Iterator[Rounded]:
        """Prune and round all rows in tiles; codes are those of the kept values."""
        for tile in prune(self.weight, self.metric, grids, self.sweeps):
            self.pairs.append(tile.pairs)
            yield Rounded(tile.rows, tile.codes, tile.parameters)

    def to_json(self) -> dict[str, Any]:
        """Its name: it is part of an encoder and never of a configuration."""
        return {"name": self.name}


class Exact:
    """Grids of codecs that store values as they are, or in a way of their own."""

    group: ClassVar[int | None] = None
    parameters: ClassVar[dict[str, Tensor]] = {}

    def fit(self, groups: Tensor, segment: Segment) -> Exact:
        return self

    def nearest(self, groups: Tensor) -> Tensor:
        return torch.zeros_like(groups)

    def column(self, group: int) -> Column:
        return lambda values: (torch.zeros_like(values), values)


def metric(
    statistics: Statistics | None, columns: int, damping: float, *, sweeps: bool, device: torch.device
) -> Metric:
    """What the rows of a weight with so many input columns share, on ``device``; takes five copies of the Hessian.

    Raises:
        MissingStatisticsError: there is no Hessian.
        CodecError: it does not fit the weight or is not finite.
        SingularHessianError: it is indefinite.
    """
    with one_thread():
        shared = feedback(statistics, columns, damping, by_activation=False, sweeps=False)
        missing = -columns % 4
        # Padding neither gives nor takes feedback: its weights and values are zero.
        earlier = pad(shared.earlier, (0, missing, 0, missing))
        earlier.diagonal().fill_(1.0)
        pivots = pad(shared.pivots.double() / shared.pivots.double().mean(), (0, missing), value=1.0).float()
        upper = (earlier * pivots.sqrt()[:, None]).T
        greedy = _costs(torch.stack([block @ block.T for block in _diagonal(upper)]), columns)
        hessian = upper @ upper.T if sweeps else None
        settled = None if hessian is None else _costs(_diagonal(hessian), columns)
    return Metric(columns, *_moved((earlier, hessian, greedy, settled), device))


def _moved(parts: tuple[Tensor, Tensor | None, _Costs, _Costs | None], device: torch.device) -> Any:
    def moved(part: Tensor | _Costs | None) -> Any:
        if isinstance(part, _Costs):
            return _Costs(*(getattr(part, name).to(device) for name in ("losses", "values", "ratio", "forbidden")))
        return None if part is None else part.to(device).contiguous()

    return tuple(moved(part) for part in parts)


def _diagonal(matrix: Tensor) -> Tensor:
    """The 4x4 blocks on the diagonal, ``[blocks, 4, 4]``."""
    blocks = len(matrix) // 4
    index = torch.arange(blocks, device=matrix.device)
    return matrix.view(blocks, 4, blocks, 4)[index, :, index, :]


def _costs(blocks: Tensor, columns: int) -> _Costs:
    """The tables for the metric G of each block, ``[blocks, 4, 4]``, positive definite."""
    g = blocks.double()
    losses, values = g.new_zeros(len(g), 6, 10), g.new_zeros(len(g), 6, 2, 4)
    ratio, forbidden = g.new_zeros(len(g), 6), g.new_zeros(len(g), 6, 1)
    for number, pair in enumerate(PAIRS):
        keep = torch.tensor(pair, device=g.device)
        drop = torch.tensor([i for i in range(4) if i not in pair], device=g.device)
        kept, cross, dropped = (g[:, a[:, None], b] for a, b in ((keep, keep), (keep, drop), (drop, drop)))
        moves = torch.linalg.solve(kept, cross)
        left = dropped - cross.mT @ moves
        p, q = drop.tolist()
        for i, j, value in ((p, p, left[:, 0, 0]), (p, q, 2 * left[:, 0, 1]), (q, q, left[:, 1, 1])):
            losses[:, number, _PRODUCTS.index((i, j))] = value
        values[:, number][:, :, drop] = moves
        values[:, number, [0, 1], list(pair)] = 1.0
        ratio[:, number] = kept[:, 1, 0] / kept[:, 1, 1]
    rest = columns % 4
    if rest:
        forbidden[-1, max(1, rest * (rest - 1) // 2) :] = torch.inf
    return _Costs(losses.float(), values.flatten(1, 2).float(), ratio.float(), forbidden.float())


def prune(weight: Tensor, shared: Metric, grids: Grids, sweeps: int) -> Iterator[Pruned]:
    """Prune ``weight``, finite ``[out, in]``, in tiles of rows, in order.

    Takes, beyond ``shared``, some five FP32 copies of a tile for each thread.
    """
    rows = len(weight)
    count = 1 if rows < 256 else 2 * -(-rows // (2 * _TILE))
    step = -(-rows // count)

    def work(rows: slice) -> Pruned:
        tile = _Tile(weight[rows].float(), shared, grids)
        tile.descend()
        for _ in range(sweeps):
            tile.sweep()
        return tile.pruned(rows)

    yield from ordered_map(work, [slice(start, min(start + step, rows)) for start in range(0, rows, step)])


class _Tile:
    """Some rows on their way to pairs and codes; tensors ``[in, rows]``, so that a column is contiguous."""

    def __init__(self, block: Tensor, shared: Metric, grids: Grids) -> None:
        self.shared, self.grids = shared, grids
        self.weight = pad(block, (0, -block.shape[1] % 4)).T.contiguous()
        columns, rows = self.weight.shape
        self.errors = torch.zeros_like(self.weight)
        self.pairs = torch.zeros(columns // 4, rows, dtype=torch.int64, device=block.device)
        self.codes = torch.zeros(columns // 2, rows, dtype=torch.uint8, device=block.device)
        self.values = torch.zeros(columns // 2, rows, device=block.device)
        # Levels are fitted to values that are stored: of a row that ends early there are fewer than two a block.
        self.stored = 2 * (shared.columns // 4) + min(2, shared.columns % 4)
        self.group = min(grids.group or self.stored, self.stored)
        self.rounders: list[Column] = []
        self.parameters: dict[str, list[Tensor]] = {}
        self.places = torch.tensor(PAIRS, device=block.device).T.contiguous()

    def descend(self) -> None:
        """Settle all blocks in order, each given those before it."""
        matrix, columns = self.shared.earlier, len(self.weight)
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            target = torch.addmm(self.weight[start:stop], matrix[start:stop, :start], self.errors[:start])
            for first in range(start, stop, 4):
                self._fit(first)
                with _ONE_AT_A_TIME:
                    four, before = slice(first, first + 4), slice(start, first)
                    rest = target[first - start : first - start + 4]
                    aim = torch.addmm(rest, matrix[four, before], self.errors[before])
                    self._keep(first // 4, *self._round(first // 4, self.shared.greedy, self._free(aim, four)))

    def sweep(self) -> None:
        """Settle every block again, given all others."""
        matrix, costs = self.shared.hessian, self.shared.settled
        assert matrix is not None  # made wherever there are sweeps
        assert costs is not None
        columns = len(self.weight)
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            gradient = torch.mm(matrix[start:stop], self.errors)
            with _ONE_AT_A_TIME:
                self._again(matrix[start:stop, start:stop], costs, start, gradient)

    def _again(self, matrix: Tensor, costs: _Costs, start: int, gradient: Tensor) -> None:
        """Settle the blocks from column ``start``, given H' of them and how the loss changes with their errors."""
        was = self.errors[start : start + len(matrix)].clone()
        for place in range(0, len(matrix), 4):
            block, four = (start + place) // 4, slice(start + place, start + place + 4)
            moved = self.errors[start : start + place] - was[:place]
            here = slice(place, place + 4)
            own = matrix[here, here]
            now = self.weight[four] - self.errors[four]
            free = torch.linalg.solve(own, torch.addmm(gradient[here], matrix[here, :place], moved)).add_(now)
            pairs, codes, values, levels = self._round(block, costs, free)
            better = _loss(own, free - levels) < _loss(own, free - now)
            two = slice(2 * block, 2 * block + 2)
            self._keep(
                block,
                torch.where(better, pairs, self.pairs[block]),
                torch.where(better, codes, self.codes[two]),
                torch.where(better, values, self.values[two]),
                torch.where(better, levels, now),
            )

    def pruned(self, rows: slice) -> Pruned:
        """The result, by row."""
        return Pruned(
            rows,
            _by_row(self.pairs.to(torch.uint8)),
            _by_row(self.codes[: self.stored]),
            _by_row(self.values[: self.stored]),
            {name: torch.cat(parts, 1) for name, parts in self.parameters.items()},
        )

    def _free(self, aim: Tensor, columns: slice) -> Tensor:
        """What columns would aim at if they could take any value; ``aim`` lacks the feedback among themselves."""
        weight = self.weight[columns]
        moves: Tensor = torch.linalg.solve_triangular(
            self.shared.earlier[columns, columns], aim - weight, upper=False, unitriangular=True
        )
        return moves.add_(weight)

    def _fit(self, first: int) -> None:
        """Fit the groups that begin with a value of the block at column ``first``."""
        while (start := len(self.rounders) * self.group) < min(first // 2 + 2, self.stored):
            stop = min(start + self.group, self.stored)
            columns = slice(first, 4 * -(-stop // 2))
            matrix = self.shared.earlier[columns, :first]
            free = self._free(torch.addmm(self.weight[columns], matrix, self.errors[:first]), columns)
            _, kept = self.shared.greedy.choose(first // 4, free.view(-1, 4, free.shape[1]))
            values = kept.flatten(0, 1)[start - first // 2 : stop - first // 2].T.contiguous().unsqueeze(1)
            group = len(self.rounders)
            levels = self.grids.fit(values, Segment(slice(start, stop), slice(group, group + 1), 1, stop - start))
            self.rounders.append(levels.column(0))
            for name, parameter in levels.parameters.items():
                self.parameters.setdefault(name, []).append(parameter)

    def _round(self, block: int, costs: _Costs, free: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs ``[rows]``, codes and values ``[2, rows]``, and the block as they make it, ``[4, rows]``."""
        pairs, kept = costs.choose(block, free[None])
        pairs, first, second = pairs[0], kept[0, 0], kept[0, 1]
        one = self.rounders[min(2 * block, self.stored - 1) // self.group]
        two = self.rounders[min(2 * block + 1, self.stored - 1) // self.group]
        code, value = one(first)
        other, level = two(torch.addcmul(second, costs.ratio[block][pairs], first - value))
        if 2 * block + 1 >= self.stored:
            level = torch.zeros_like(level)  # there is no second value
        values = torch.stack((value, level))
        levels = torch.zeros_like(free).scatter_(0, self.places[:, pairs], values)
        return pairs, torch.stack((code, other)).to(torch.uint8), values, levels

    def _keep(self, block: int, pairs: Tensor, codes: Tensor, values: Tensor, levels: Tensor) -> None:
        two, four = slice(2 * block, 2 * block + 2), slice(4 * block, 4 * block + 4)
        self.pairs[block], self.codes[two], self.values[two] = pairs, codes, values
        torch.sub(self.weight[four], levels, out=self.errors[four])


def _by_row(columns: Tensor) -> Tensor:
    """``[rows, n]`` of ``[n, rows]``; ``contiguous`` would leave a single row with the strides of a column."""
    rows: Tensor = columns.T.clone(memory_format=torch.contiguous_format)
    return rows


def _loss(matrix: Tensor, error: Tensor) -> Tensor:
    """eᵀ G e of each row, ``[rows]``."""
    moved: Tensor = torch.mm(matrix, error)
    return moved.mul_(error).sum(0)
