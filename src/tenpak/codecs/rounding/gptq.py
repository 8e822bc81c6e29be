"""``gptq``: columns one after another, each rounded where it makes up best for the errors of those before it.

What a column aims at, and why that is GPTQ, stands in ``feedback``. A group's levels are fitted when its first column
is reached, to what the whole group would aim at then: u of the group minimises the loss over the columns not yet
rounded, as if they could take any value, ::

    w_g + F_gg⁻¹·r        r = Σ_{j before the group} Eⱼ·F[g, j]

In ``order="activation"`` (columns of large E[x²] first) and with one group per row the levels are fitted to the weight
as it is before anything is rounded; groups stay contiguous columns, so the stored format is the same.

``sweeps`` adds cyclic coordinate descent: in each sweep every column is rounded again, given all the others, with the
groups' parameters fixed. No step can increase the damped loss, except by the rounding of FP32.

The work is laid out for BLAS. Weights are kept ``[in, rows]``, so a column is contiguous. Feedback comes in three
steps: from the blocks before (one GEMM per block of about 128 columns), from the groups before in the block and from
chunks before in the group (small GEMMs), and from columns before in the chunk (a matrix-vector product each).

Rows do not depend on each other. They are cut into tiles whose size depends on the weight's shape only; a tile, like
the factorisation, is computed by one thread whatever their number, so the bytes do not depend on it (on a machine: BLAS
adds in another order on another). Output curvature would weigh whole rows, which changes nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Statistics
from tenpak.codecs.grouping import Segment, segments
from tenpak.codecs.rounding.base import Column, Grids, Levels, Rounded, Rounding
from tenpak.codecs.rounding.feedback import Feedback, feedback
from tenpak.codecs.validation import require_choice, require_integer, require_number

__all__ = ["Gptq"]

_BLOCK = 128  # columns per large GEMM
_CHUNK = 32  # columns whose errors are fed back one by one
# Held while columns are rounded one by one: many small operations, which wake each other's threads at every single one
# when two threads make them. Meanwhile the other threads multiply matrices.
_ONE_AT_A_TIME = Lock()
_TILE = 1024  # rows at most; with fewer the cost per call shows, with more a core's cache no longer holds a block


@dataclass(frozen=True)
class Gptq(Rounding):
    """Rounding with feedback of errors through the full Hessian.

    Attributes:
        damping: added to the Hessian's diagonal, relative to its mean; 1e-6 to 1. Tenfold wherever Cholesky fails.
        order: ``"natural"``, or ``"activation"``: columns of large E[x²] first.
        sweeps: sweeps of coordinate descent afterwards, 0 to 100.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    name: ClassVar[str] = "gptq"
    needs_statistics: ClassVar[bool] = True

    damping: float = 0.01
    order: str = "natural"
    sweeps: int = 0

    def __post_init__(self) -> None:
        require_number("rounding gptq", "damping", self.damping, 1e-6, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_choice("rounding gptq", "order", self.order, ("natural", "activation"))
        require_integer("rounding gptq", "sweeps", self.sweeps, 0, 100)

    def round(self, weight: Tensor, grids: Grids, statistics: Statistics | None) -> Iterator[Rounded]:
        """Round all tiles of rows, several at a time where torch has several threads.

        Beyond the weight it takes four FP32 copies of the Hessian while that is factored (six where FP32 does not
        suffice), then one (two with sweeps), and for each thread some four FP32 copies of a tile.

        Raises:
            MissingStatisticsError: there is no Hessian.
            CodecError: it does not fit the weight or is not finite.
            SingularHessianError: it is indefinite.
        """
        rows, columns = weight.shape

        def prepare() -> Feedback:
            by_activation = self.order == "activation"
            shared = feedback(statistics, columns, self.damping, by_activation=by_activation, sweeps=self.sweeps > 0)
            return shared.to(weight.device)

        def work(tile: slice) -> Rounded:
            return _round_tile(weight[tile].float(), tile, grids, shared, self.sweeps)

        tiles = _tiles(rows)
        threads = torch.get_num_threads()
        if threads == 1 or weight.device.type != "cpu":
            shared = prepare()
            yield from map(work, tiles)
            return
        with ThreadPoolExecutor(min(threads, len(tiles)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            shared = pool.submit(prepare).result()
            yield from pool.map(work, tiles)


def _tiles(rows: int) -> list[slice]:
    """Tiles of about equally many rows, an even number of them where one would do but is not small."""
    count = 1 if rows < 256 else 2 * -(-rows // (2 * _TILE))
    step = -(-rows // count)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class _Tile:
    """Some rows on their way to codes: tensors ``[in, rows]``, columns in the order in which they are rounded."""

    weight: Tensor
    errors: Tensor  # weight less what its codes stand for; zero where there are none yet
    codes: Tensor
    rounders: list[Column]  # of each group, as far as its levels are fitted
    parameters: dict[str, list[Tensor]]
    group_of: list[int]  # of each column

    def add(self, levels: Levels, count: int) -> None:
        """Take the levels of the next ``count`` groups."""
        self.rounders.extend(levels.column(index) for index in range(count))
        for field, values in levels.parameters.items():
            self.parameters.setdefault(field, []).append(values)


def _round_tile(block: Tensor, rows: slice, grids: Grids, shared: Feedback, sweeps: int) -> Rounded:
    """``block``, FP32 ``[rows, in]``, rounded."""
    columns = block.shape[1]
    order = list(range(columns)) if shared.order is None else shared.order.tolist()
    size = min(grids.group or columns, columns)
    weight = (block.T if shared.order is None else block.T[shared.order]).contiguous()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=block.device)
    tile = _Tile(weight, torch.zeros_like(weight), codes, [], {}, [column // size for column in order])
    if shared.order is None and size < columns:
        _pass(tile, shared.earlier, size, grids)
    else:
        for segment in segments(columns, grids.group):
            tile.add(grids.fit(segment.view(block.contiguous()), segment), segment.count)
        _pass(tile, shared.earlier, None, grids)
    for _ in range(sweeps):
        assert shared.others is not None  # made wherever there are sweeps
        _sweep(tile, shared.others)
    if shared.order is not None:
        codes = torch.empty_like(codes).index_copy_(0, shared.order, codes)
    by_row = torch.empty(block.shape, dtype=torch.uint8, device=block.device).copy_(codes.T)
    parameters = {field: torch.cat(values, 1) for field, values in tile.parameters.items()}
    return Rounded(rows, by_row, parameters)


def _pass(tile: _Tile, matrix: Tensor, group: int | None, grids: Grids) -> None:
    """Round all columns in order; with ``group``, fit the levels of each group of so many columns on reaching it."""
    columns = len(tile.weight)
    run = group or _BLOCK
    block = run * max(1, _BLOCK // run)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        target = torch.addmm(tile.weight[start:stop], matrix[start:stop, :start], tile.errors[:start])
        errors = tile.errors[start:stop]
        for first in range(0, stop - start, run):
            last = min(first + run, stop - start)
            inner = matrix[start + first : start + last, start : start + last]
            target[first:last].addmm_(inner[:, :first], errors[:first])
            if group is not None:
                _fit(tile, grids, start + first, target[first:last], inner[:, first:])
            _columns(tile, start + first, target[first:last], inner[:, first:], errors[first:last])


def _fit(tile: _Tile, grids: Grids, start: int, target: Tensor, inner: Tensor) -> None:
    """Fit a group's levels to what it would aim at if its weights could take any value."""
    stop = start + len(target)
    weight = tile.weight[start:stop]
    feedback = torch.linalg.solve_triangular(inner, target - weight, upper=False, unitriangular=True)
    groups = feedback.add_(weight).T.contiguous().unsqueeze(1)
    group = len(tile.rounders)
    tile.add(grids.fit(groups, Segment(slice(start, stop), slice(group, group + 1), 1, stop - start)), 1)


def _columns(tile: _Tile, start: int, target: Tensor, inner: Tensor, moved: Tensor) -> None:
    """Round the columns from ``start``, whose targets lack the feedback among themselves.

    Args:
        tile: what is rounded; its codes and errors of these columns are written.
        start: the first column.
        target: FP32 ``[columns, rows]``; used up.
        inner: their part of the feedback matrix, ``[columns, columns]``; only what is below the diagonal is used.
        moved: gets by how much each error has changed, ``[columns, rows]``; may be the errors themselves where they
            have been zero.
    """
    count = len(target)
    errors = tile.errors[start : start + count]
    fresh = moved.data_ptr() == errors.data_ptr()
    # Views are made all at once: one by one they would take as long as the arithmetic.
    weight_of, error_of = tile.weight[start : start + count].unbind(), errors.unbind()
    with _ONE_AT_A_TIME:
        for first in range(0, count, _CHUNK):
            last = min(first + _CHUNK, count)
            aims = target[first:last].addmm_(inner[first:last, :first], moved[:first]).unbind()
            chunk = moved[first:last]
            before, moved_of, feed = chunk.T, chunk.unbind(), inner[first:last, first:last].unbind()
            codes = []
            for index, aim in enumerate(aims):
                if index:
                    aim = torch.addmv(aim, before[:, :index], feed[index][:index])
                code, level = tile.rounders[tile.group_of[start + first + index]](aim)
                codes.append(code)
                error = error_of[first + index]
                if fresh:
                    torch.sub(weight_of[first + index], level, out=error)
                else:
                    now = weight_of[first + index] - level
                    torch.sub(now, error, out=moved_of[index])
                    error.copy_(now)
            tile.codes[start + first : start + last] = torch.stack(codes)


def _sweep(tile: _Tile, matrix: Tensor) -> None:
    """Round every column again, given all others."""
    columns = len(tile.weight)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        target = torch.addmm(tile.weight[start:stop], matrix[start:stop], tile.errors)
        moved = torch.empty_like(target)
        _columns(tile, start, target, matrix[start:stop, start:stop], moved)
