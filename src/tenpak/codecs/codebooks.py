"""Codebooks of vectors: the layout that ``vector/1`` and ``additive/1`` share, the nearest entries, and k-means.

A vector is ``dimension`` neighbouring weights of a row; a row of ``in`` weights has ``ceil(in / dimension)`` of them,
and what the last one has beyond the row is cut off in decoding. A weight is the sum of an entry of each book, times the
row's scale where there is one ::

    w = scale[row] · Σ_b codebook_b[code_b]

Distances are ``(x - c) M (x - c)ᵀ`` with a metric M of the vector's columns (the identity without statistics). Less
``x M xᵀ``, which all entries share, they are ``c M cᵀ - 2·(x M)·c``: one matrix product for many vectors and entries,
and a search for the smallest in each row, for which numpy takes a third of torch's time. Tiles of vectors are so small
that distances stay in the cache.

``kmeans`` is Lloyd's iteration (1982) from entries drawn among the vectors. Where each run of vectors has a metric of
its own, an entry's new place solves a small system, ``(Σ g·M)·c = Σ g·M·x``. Entries without vectors are moved to the
vectors that are farthest from the entries which leave the largest errors. All in one thread, sums in FP64 in the order
of the vectors: the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tenpak.codecs.grouping import row_tiles
from tenpak.kernels import pack

__all__ = [
    "DIMENSIONS",
    "ENTRIES",
    "common",
    "cut",
    "expand",
    "kmeans",
    "nearest",
    "packed",
    "root_mean_square",
    "sampled",
    "scatter",
    "vector_count",
]

DIMENSIONS = (2, 4, 8, 16)
ENTRIES = tuple(1 << bits for bits in range(4, 17))

_DISTANCES = 1 << 17  # held at a time: half a MiB
_ITERATIONS = 20
_RIDGE = 1e-6  # of a system's mean diagonal: directions that no vector of an entry has leave it where it is
_PER_ENTRY, _LEAST_SAMPLE, _MOST_SAMPLE = 64, 1 << 15, 1 << 18


def vector_count(columns: int, dimension: int) -> int:
    """Vectors in a row of ``columns`` weights."""
    return -(-columns // dimension)


def cut(weight: Tensor, dimension: int) -> Tensor:
    """The vectors of ``weight`` ``[rows, in]``, ``[rows, vectors, dimension]``; the last one is filled with zeros."""
    rows, columns = weight.shape
    return pad(weight, (0, -columns % dimension)).view(rows, -1, dimension)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[out, n]``, integers of any type, as ``tenpak.kernels.pack`` stores them: uint8 ``[out, bytes]``."""
    kind = torch.uint8 if bits <= 8 else torch.int32
    return torch.cat([pack(codes[tile].to(kind), bits) for tile in row_tiles(*codes.shape)])


def expand(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """The sums of entries, FP32 ``[*, dimension]``, added in the order of books.

    Args:
        codes: integers ``[*, books]``.
        codebooks: of each book, FP32 ``[entries, dimension]``.
    """
    total: Tensor | None = None
    for book, code in zip(codebooks, codes.unbind(-1), strict=True):
        part = book.index_select(0, code.reshape(-1).int())
        total = part if total is None else total.add_(part)
    assert total is not None  # there is at least one book
    return total.view(*codes.shape[:-1], total.shape[-1])


def nearest(
    points: Tensor,
    codebooks: Sequence[Tensor],
    metric: Tensor | None = None,
    width: int = 1,
    current: Tensor | None = None,
) -> Tensor:
    """Codes whose sums of entries are nearest to ``points``, int64 ``[n, books]``.

    With one book that is exact. With several it is a beam search: book after book, the ``width`` best sums so far are
    continued by all entries.

    Args:
        points: FP32 ``[n, dimension]``.
        codebooks: of each book, FP32 ``[entries, dimension]``.
        metric: FP32 ``[dimension, dimension]``, or None for the identity.
        width: of the beam, 1 or more.
        current: codes that are kept where the search finds nothing better, int64 ``[n, books]``.
    """
    terms = []
    for book in codebooks:
        measured = book if metric is None else book @ metric
        terms.append((book, (measured.T * -2).contiguous(), (measured * book).sum(1)))
    if len(terms) == 1:
        return _exact(points, *terms[0][1:]).unsqueeze(1)
    step = max(16, _DISTANCES // (len(terms[0][0]) * width))
    found = torch.cat([_beam(part, terms, width) for part in torch.split(points, step)])
    if current is None:
        return found
    better = _distance(points - expand(found, codebooks), metric) < _distance(
        points - expand(current, codebooks), metric
    )
    return torch.where(better.unsqueeze(-1), found, current)


def _exact(points: Tensor, product: Tensor, square: Tensor) -> Tensor:
    """``nearest`` for one book, int64 ``[n]``; ``product`` and ``square`` are -2·M·cᵀ and c M cᵀ of its entries c."""
    entries = len(square)
    found = torch.empty(len(points), dtype=torch.int64)
    room = torch.empty(min(max(16, _DISTANCES // entries), len(points)), entries)
    for part, codes in zip(torch.split(points, len(room)), torch.split(found, len(room)), strict=True):
        distance = torch.addmm(square, part, product, out=room[: len(part)])
        np.argmin(distance.numpy(), 1, out=codes.numpy())
    return found


def _beam(points: Tensor, terms: Sequence[tuple[Tensor, Tensor, Tensor]], width: int) -> Tensor:
    """``nearest`` for a few vectors; ``terms`` are of each book its entries c, -2·M·cᵀ and c M cᵀ."""
    n, dimension = points.shape
    rest = points.unsqueeze(1)
    score = points.new_zeros(n, 1)
    codes = torch.zeros(n, 1, 0, dtype=torch.int64)
    for number, (book, product, square) in enumerate(terms):
        paths, entries = rest.shape[1], len(book)
        distance = torch.addmm(square, rest.reshape(-1, dimension), product)
        if paths > 1:
            distance = distance.view(n, paths, entries).add_(score.unsqueeze(-1))
        distance = distance.view(n, paths * entries)
        if number == len(terms) - 1 or width == 1:
            index = torch.from_numpy(distance.numpy().argmin(1)).unsqueeze(1)
            score = distance.gather(1, index)
        else:
            score, index = distance.topk(min(width, paths * entries), largest=False)
        parent, code = index // entries, index % entries
        codes = torch.cat((codes.gather(1, parent.unsqueeze(-1).expand(-1, -1, number)), code.unsqueeze(-1)), 2)
        if number < len(terms) - 1:
            rest = rest.gather(1, parent.unsqueeze(-1).expand(-1, -1, dimension)) - book[code]
    return codes[:, 0]


def _distance(difference: Tensor, metric: Tensor | None) -> Tensor:
    """``difference`` M ``difference``ᵀ along the last dimension."""
    measured = difference if metric is None else difference @ metric
    return (measured * difference).sum(-1)


def scatter(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sums of the ``values`` of each code, FP64 ``[entries, d]``, in the order of rows.

    Args:
        values: ``[n, d]``.
        codes: int64 ``[n]``.
        entries: number of codes.
    """
    return torch.stack([torch.bincount(codes, column.double(), entries) for column in values.unbind(1)], 1)


def common(
    weights: Iterable[Tensor], dimension: int, entries: int, generator: torch.Generator, *, by_magnitude: bool
) -> Tensor:
    """A codebook for the vectors of several matrices, rows divided by their root mean squares.

    Where there are many, each is as likely as any other to be among those that it is learned from.

    Returns:
        FP32 ``[entries, dimension]``.

    Args:
        weights: FP32 matrices ``[rows, in]``.
        dimension: of the vectors.
        entries: of the codebook.
        generator: draws the vectors, and the entries to start from.
        by_magnitude: vectors count as much as they are long.
    """
    most = 2 * _sample(entries)
    points, lots = torch.empty(0, dimension), torch.empty(0, dtype=torch.float64)
    for weight in weights:
        vectors = cut(weight, dimension)
        inverse = root_mean_square(weight).half().float().reciprocal()  # of scales as they will be stored
        inverse = torch.where(inverse.isfinite(), inverse, 0.0)
        drawn = torch.rand(vectors.shape[:2], dtype=torch.float64, generator=generator).view(-1)
        kept = _lowest(drawn, most)
        scaled = vectors.view(-1, dimension)[kept] * inverse[kept // vectors.shape[1], None]
        points, lots = torch.cat((points, scaled)), torch.cat((lots, drawn[kept]))
        kept = _lowest(lots, most)
        points, lots = points[kept], lots[kept]
    importance = points.norm(dim=1) if by_magnitude else torch.ones(len(points))
    return kmeans(points.unsqueeze(0), importance.unsqueeze(0), None, entries, generator)


def _lowest(lots: Tensor, count: int) -> Tensor:
    """Places of the ``count`` lowest, in their order."""
    if len(lots) <= count:
        return torch.arange(len(lots))
    return lots.topk(count, largest=False).indices.sort().values


def sampled(points: Tensor, importance: Tensor, entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many vectors of each run, and what they count, that k-means for ``entries`` learns no more from all.

    Args:
        points: ``[runs, n, dimension]``.
        importance: ``[runs, n]``.
        entries: of the codebook.
        generator: draws them.
    """
    runs, n, dimension = points.shape
    size = -(-_sample(entries) // runs)
    if n <= 2 * size:
        return points.contiguous(), importance.contiguous()
    index = torch.randint(n, (runs, size), generator=generator)
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, dimension)), importance.gather(1, index)


def _sample(entries: int) -> int:
    """Vectors from which so many entries can be learned."""
    return min(max(_PER_ENTRY * entries, _LEAST_SAMPLE), max(_MOST_SAMPLE, 2 * entries))


def kmeans(
    points: Tensor, importance: Tensor, metric: Tensor | None, entries: int, generator: torch.Generator
) -> Tensor:
    """A codebook of small weighted distance from ``points``, FP32 ``[entries, dimension]``; entries too many are zero.

    Args:
        points: FP32 ``[runs, n, dimension]``.
        importance: of each, FP32 ``[runs, n]``, not negative.
        metric: of each run, FP32 ``[runs, dimension, dimension]``, or None for the identity.
        entries: of the codebook.
        generator: draws the entries to start from.
    """
    dimension = points.shape[-1]
    flat = points.reshape(-1, dimension)
    if len(flat) <= entries:
        return pad(flat, (0, 0, 0, entries - len(flat)))
    codebook = flat[torch.randperm(len(flat), generator=generator)[:entries]]
    before: Tensor | None = None
    for _ in range(_ITERATIONS):
        if metric is None:
            codes = nearest(flat, [codebook])[:, 0]
        else:
            codes = torch.cat([nearest(run, [codebook], m)[:, 0] for run, m in zip(points, metric, strict=True)])
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        codebook = _centroids(points, importance, metric, codes, codebook)
    return codebook


def _centroids(points: Tensor, importance: Tensor, metric: Tensor | None, codes: Tensor, codebook: Tensor) -> Tensor:
    """The entries of least distance for these ``codes``, int64 ``[runs·n]``; empty ones are moved."""
    entries, dimension = codebook.shape
    difference = points - codebook[codes].view(points.shape)
    measured = difference if metric is None else difference @ metric
    weighted = (measured * importance.unsqueeze(-1)).view(-1, dimension)
    moment = scatter(weighted, codes, entries)
    mass = torch.bincount(codes, importance.reshape(-1).double(), entries)
    if metric is None:
        step = torch.where(mass.unsqueeze(1) > 0, moment / mass.unsqueeze(1), 0.0)
    else:
        products = (metric.flatten(1).unsqueeze(1) * importance.unsqueeze(-1)).view(len(codes), -1)
        system = scatter(products, codes, entries).view(entries, dimension, dimension)
        ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1)
        system.diagonal(dim1=1, dim2=2).add_(torch.where(ridge > 0, ridge, 1.0).unsqueeze(1))
        step = torch.linalg.solve(system, moment)
    moved = (codebook + step).float()
    empty = (torch.bincount(codes, minlength=entries) == 0).nonzero()[:, 0]
    if len(empty):
        error = (measured * difference).sum(-1).mul_(importance).view(-1)
        farthest = _farthest(error, codes, entries)[: len(empty)]
        moved[empty[: len(farthest)]] = points.reshape(-1, dimension)[farthest]
    return moved


def _farthest(error: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Of each entry the vector of largest ``error``, if it has any; entries of the largest sum of errors first.

    Not simply the largest errors: these may be many copies of one vector.
    """
    order = torch.argsort(error, descending=True, stable=True)
    first = torch.full((entries,), len(order)).scatter_reduce(0, codes[order], torch.arange(len(order)), "amin")
    total = torch.bincount(codes, error.double(), entries)
    worst = torch.argsort(total, descending=True, stable=True)
    return order[first[worst[total[worst] > 0]]]


def root_mean_square(weight: Tensor) -> Tensor:
    """Of each row, FP64 ``[rows]``; numpy adds in one order."""
    return torch.from_numpy(np.sqrt(np.square(weight.double().numpy()).mean(1)))
