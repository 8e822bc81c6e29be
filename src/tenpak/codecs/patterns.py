"""Patterns: small square blocks that weights are put together from, ``block ≈ Σ scale·pattern``.

*Base patterns* are made by code, so they cost no bytes: first size² cosine waves, coarse to fine, then size² patterns
of one weight each. The waves are those of the discrete cosine transform, in multiples of 1/64 that are the same on
every machine ::

    c_k(i) = round(64·cos(π·(2i + 1)·k / (2·size)))/64        wave (k, l)[i, j] = c_k(i)·c_l(j), by k + l, then k

*Discovered patterns* are the centres of clusters of a weight's blocks (k-means by direction; a block and its negative
are one, since scales have signs). A centre becomes the sum of its blocks x, each times its product with the centre: a
step of the power method towards the direction of least squared error, which is what the scale leaves.

*Matching* is orthogonal matching pursuit (Pati et al. 1993): the pattern that lowers the squared error most, given
the others before it; then all scales by least squares. With one term it is the best pattern.

Sums are made in an order that does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tenpak.errors import CodecError
from tenpak.kernels.parallel import each, one_thread

__all__ = ["Match", "PatternDictionary", "base_patterns", "discover", "match", "to_blocks"]

_SAMPLES = 64  # blocks per pattern that clustering looks at; four times as many lowered an error by a hundredth
_MOST_SAMPLES = 1 << 16  # of them, where that leaves four per pattern: thousands of patterns would take minutes
_ROUNDS = 20  # three times as many lowered an error by a four-hundredth at most
_PRODUCTS = 1 << 22  # of blocks and patterns at a time: 16 MiB
_RIDGE = 1e-9  # so that patterns which are nearly one another's multiples have finite scales


def base_patterns(size: int, count: int | None = None) -> Tensor:
    """The first ``count`` base patterns, all 2·size² where it is None, FP32 ``[count, size, size]``, within ±1."""
    waves = [
        [round(64 * math.cos(math.pi * (2 * i + 1) * k / (2 * size))) / 64 for i in range(size)] for k in range(size)
    ]
    wave = torch.tensor(waves, dtype=torch.float32)
    order = sorted((down + across, down, across) for down in range(size) for across in range(size))
    cosines = torch.stack([wave[down][:, None] * wave[across] for _, down, across in order])
    cosines = cosines + 0.0  # a zero times a negative number is -0, but these are integers over 4096
    single = torch.eye(size * size).view(-1, size, size)
    return torch.cat((cosines, single))[:count]


def to_blocks(weight: Tensor, size: int) -> Tensor:
    """Blocks of a matrix, row by row, FP32 ``[blocks, size²]``; what lies beyond the matrix is zero."""
    rows, columns = weight.shape
    down, across = -(-rows // size), -(-columns // size)
    padded = torch.zeros((down * size, across * size), dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    return padded.view(down, size, across, size).transpose(1, 2).reshape(down * across, size * size)


def discover(blocks: Tensor, count: int, seed: int) -> Tensor:
    """Recurring patterns of ``blocks``, FP32 ``[n, d]``, on the CPU.

    Returns:
        FP32 ``[count, d]``, root mean square one; zero where there are fewer blocks than patterns.
    """
    patterns = torch.zeros(count, blocks.shape[1])
    blocks = blocks.cpu().float()
    largest = blocks.abs().amax(1)
    found = (largest > 0).nonzero()[:, 0]
    if count == 0 or len(found) == 0:
        return patterns
    generator = torch.Generator().manual_seed(seed)
    samples = min(_SAMPLES * count, max(_MOST_SAMPLES, 4 * count))
    found = found[torch.randperm(len(found), generator=generator)[:samples]]
    if len(found) <= count:
        patterns[: len(found)] = _unit(blocks[found] / largest[found, None])
    else:
        patterns = _clustered(blocks[found] / float(largest[found].max()), count)
    return patterns * math.sqrt(blocks.shape[1])


def _unit(blocks: Tensor) -> Tensor:
    """Each row divided by its length; zero rows stay."""
    length = blocks.norm(dim=1, keepdim=True)
    return torch.where(length > 0, blocks / length, 0.0)


def _clustered(blocks: Tensor, count: int) -> Tensor:
    """Centres of length one, ``[count, d]``; there are more ``blocks`` than that."""
    with one_thread():
        centres, energy = _unit(blocks[:count] / blocks[:count].abs().amax(1, keepdim=True)), blocks.square().sum(1)
        before: Tensor | None = None
        for _ in range(_ROUNDS):
            products, nearest = _nearest(blocks, centres)
            if before is not None and torch.equal(nearest, before):
                break
            before = nearest
            sums = torch.zeros_like(centres).index_add_(0, nearest, blocks * products[:, None])
            moved = _unit(sums / sums.abs().amax(1, keepdim=True).clamp_min(1e-30))
            empty = (moved.abs().amax(1) == 0).nonzero()[:, 0]
            if len(empty):
                worst = torch.sort(energy - products.square(), descending=True, stable=True).indices[: len(empty)]
                moved[empty] = _unit(blocks[worst] / blocks[worst].abs().amax(1, keepdim=True))
            centres = moved
    return centres


def _nearest(blocks: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Product of each block with its nearest centre by direction, and which that is."""
    step = max(1, _PRODUCTS // len(centres))
    products, nearest = [], []
    for part in torch.split(blocks, step):
        product = part @ centres.T
        index = product.abs().argmax(1)
        nearest.append(index)
        products.append(product.gather(1, index[:, None])[:, 0])
    return torch.cat(products), torch.cat(nearest)


def match(blocks: Tensor, weights: Tensor | None, patterns: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """The patterns that approximate each block best, one after another, with least-squares scales.

    Args:
        blocks: FP32 ``[n, d]``.
        weights: of the squared errors, FP32 ``[n, d]``, or None for equal ones.
        patterns: FP32 ``[k, d]``, at least ``terms``.
        terms: patterns per block.

    Returns:
        Indices int64 and scales FP32, each ``[n, terms]``.
    """
    step = max(1, _PRODUCTS // len(patterns))
    starts = list(range(0, len(blocks), step))

    def work(start: int) -> tuple[Tensor, Tensor]:
        part = slice(start, start + step)
        return _pursued(blocks[part], None if weights is None else weights[part], patterns, terms)

    ids, scales = zip(*each(work, starts), strict=True)
    return torch.cat(ids), torch.cat(scales)


def _pursued(blocks: Tensor, weights: Tensor | None, patterns: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    # Squares of very small or large weights would leave FP32.
    largest = blocks.abs().amax(1, keepdim=True)
    target = torch.where(largest > 0, blocks / largest, 0.0)
    squares = patterns.square()
    norms = squares.sum(1)[None] if weights is None else weights @ squares.T
    inverse = torch.where(norms > 0, norms.reciprocal(), 0.0)
    ids = torch.empty((len(blocks), terms), dtype=torch.int64, device=blocks.device)
    left, scales = target, target.new_zeros(len(blocks), 0)
    for term in range(terms):
        gain = (left if weights is None else left * weights) @ patterns.T
        gain = gain.square_().mul_(inverse)
        gain.scatter_(1, ids[:, :term], -1.0)  # no pattern twice
        ids[:, term] = gain.argmax(1)
        chosen = patterns[ids[:, : term + 1]]
        scales = _least_squares(chosen, target, weights)
        left = target - (chosen * scales[..., None]).sum(1)
    return ids, scales * largest


def _least_squares(chosen: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Scales of ``chosen`` ``[n, terms, d]`` for ``target`` ``[n, d]``, FP32 ``[n, terms]``."""
    rows = chosen.double()
    weighted = rows if weights is None else rows * weights[:, None].double()
    gram = weighted @ rows.mT
    right = weighted @ target.double()[..., None]
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    length = torch.where(length > 0, length, 1.0)
    gram = gram / (length[:, :, None] * length[:, None, :])
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    solved = torch.linalg.solve_ex(gram, right / length[..., None])[0][..., 0] / length
    return torch.where(solved.isfinite(), solved, 0.0).float()


@dataclass(frozen=True)
class Match:
    """A pattern that approximates a target by itself.

    Attributes:
        pattern: its id.
        scale: by which it is multiplied.
        error: what it leaves of the target, relative in norm, 0 to 1.
    """

    pattern: int
    scale: float
    error: float


class PatternDictionary:
    """At most so many patterns of one size, by id; it grows by discovery and forgets what is least used.

    Ids are never given twice, so a reference to a pattern that was evicted is an error and not another pattern. Base
    patterns, which cannot be found again in the weights, stay. Patterns are of FP16 values, as they are stored.

    Args:
        size: of the patterns, ``[size, size]``; 2 to 32.
        max_patterns: how many it holds, base patterns included.
        base: how many base patterns, all that fit where it is None.

    Raises:
        CodecError: sizes or numbers are out of range.
    """

    def __init__(self, size: int, max_patterns: int = 1024, base: int | None = None) -> None:
        if not 2 <= size <= 32 or max_patterns < 1 or (base is not None and base < 0):
            raise CodecError(
                f"a dictionary of {max_patterns} patterns, {base} of them base patterns, of size {size} cannot be",
                hint="choose a size from 2 to 32 and at least one pattern",
            )
        self.size, self.max_patterns = size, max_patterns
        known = base_patterns(size, max_patterns if base is None else min(base, max_patterns))
        self._patterns: dict[int, Tensor] = dict(enumerate(known))
        self.base = self._next = len(known)
        self._uses: dict[int, int] = dict.fromkeys(self._patterns, 0)

    @classmethod
    def restored(
        cls, size: int, max_patterns: int, base: int, found: Mapping[int, Tensor], uses: Sequence[int], next_id: int
    ) -> Self:
        """A dictionary as it was: patterns that were added, FP16 ``[size, size]`` by id, and the uses of all.

        Raises:
            CodecError: sizes or numbers are out of range or contradict each other.
        """
        made = cls(size, max_patterns, base)
        shapes = all(
            tuple(p.shape) == (size, size) and bool(p.isfinite().all()) and bool(p.any()) for p in found.values()
        )
        rising = [made._next - 1, *found, next_id] == sorted({made._next - 1, *found, next_id})
        counts = len(uses) == len(made) + len(found) <= max_patterns and min(uses, default=0) >= 0
        if not shapes or not rising or not counts:
            raise CodecError(
                f"a dictionary of {max_patterns} patterns of size {size} cannot hold these", hint="its file is damaged"
            )
        made._patterns |= {pattern: values.float() for pattern, values in found.items()}
        made._uses, made._next = dict(zip(made._patterns, uses, strict=True)), next_id
        return made

    def __len__(self) -> int:
        return len(self._patterns)

    def __contains__(self, pattern: int) -> bool:
        return pattern in self._patterns

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all patterns, in the order in which they came."""
        return tuple(self._patterns)

    @property
    def nbytes(self) -> int:
        """Bytes that the patterns take in memory."""
        return 4 * self.size * self.size * len(self._patterns)

    @property
    def next_id(self) -> int:
        """The id that the next pattern will get."""
        return self._next

    @property
    def found(self) -> Tensor:
        """The patterns that were added, FP16 ``[n, size, size]``, in the order of their ids."""
        rows = [values for pattern, values in self._patterns.items() if pattern >= self.base]
        return torch.stack(rows).half() if rows else torch.zeros(0, self.size, self.size, dtype=torch.float16)

    def uses(self, pattern: int) -> int:
        """How often a pattern was used."""
        self.get(pattern)
        return self._uses[pattern]

    def count(self, places: Tensor) -> None:
        """Count patterns as used, by their places among ``ids``, int64 of any shape."""
        for pattern, times in zip(
            self._uses, torch.bincount(places.flatten(), minlength=len(self)).tolist(), strict=True
        ):
            self._uses[pattern] += times

    def get(self, pattern: int) -> Tensor:
        """The pattern of an id, FP32 ``[size, size]``.

        Raises:
            CodecError: there is none, or it was evicted.
        """
        if pattern not in self._patterns:
            raise CodecError(
                f"the dictionary holds no pattern {pattern}",
                hint=f"it has evicted it, or never had it: it holds {len(self)} of {self._next}",
            )
        return self._patterns[pattern]

    def add(self, pattern: Tensor) -> int:
        """Add a pattern, finite ``[size, size]``, and return its id; where all are taken, the least used goes.

        Raises:
            CodecError: it is of another size, zero or not finite, or base patterns take all the room.
        """
        if tuple(pattern.shape) != (self.size, self.size):
            raise CodecError(f"a pattern is [{self.size}, {self.size}], got {tuple(pattern.shape)}")
        largest = float(pattern.detach().abs().amax())
        if not 0 < largest < math.inf:
            raise CodecError("a pattern that is zero or not finite matches nothing", hint="leave it out")
        if len(self) >= self.max_patterns:
            self._evict()
        unit = _unit((pattern.detach().float().cpu() / largest).view(1, -1)).view(self.size, self.size) * self.size
        self._patterns[self._next], self._uses[self._next] = unit.half().float(), 0
        self._next += 1
        return self._next - 1

    def discover(self, weight: Tensor, count: int, seed: int = 0) -> list[int]:
        """Add up to ``count`` patterns that recur in ``weight`` ``[rows, columns]``; their ids.

        Raises:
            CodecError: base patterns take all the room.
        """
        found = discover(to_blocks(weight.detach(), self.size), min(count, self.max_patterns), seed)
        return [self.add(pattern.view(self.size, self.size)) for pattern in found if bool(pattern.any())]

    def find_best_matches(self, target: Tensor, top_k: int = 1) -> list[Match]:
        """The patterns that approximate ``target`` ``[size, size]`` best by themselves, best first; counts the best.

        Raises:
            CodecError: the target is of another size.
        """
        if tuple(target.shape) != (self.size, self.size):
            raise CodecError(f"a target is [{self.size}, {self.size}], got {tuple(target.shape)}")
        table, ids = torch.stack(list(self._patterns.values())).flatten(1), self.ids
        flat = target.detach().float().cpu().flatten()
        products, norms, energy = table @ flat, table.square().sum(1), float(flat.square().sum())
        order = torch.sort(products.square() / norms, descending=True, stable=True).indices[:top_k].tolist()
        scales = (products / norms).tolist()
        matches = []
        for index in order:
            left = max(0.0, energy - scales[index] * float(products[index]))
            matches.append(Match(ids[index], scales[index], math.sqrt(left / energy) if energy > 0 else 0.0))
        if matches:
            self._uses[matches[0].pattern] += 1
        return matches

    def fit(self, targets: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """Sums of ``terms`` patterns for ``targets`` ``[n, size, size]``: ids int64 and scales FP32, ``[n, terms]``.

        Every pattern that is chosen counts as used.
        """
        table = torch.stack(list(self._patterns.values())).flatten(1)
        places, scales = match(targets.detach().float().cpu().flatten(1), None, table, min(terms, len(self)))
        self.count(places)
        return torch.tensor(self.ids)[places], scales

    def synthesize(self, ids: Tensor, scales: Tensor) -> Tensor:
        """Σ scale·pattern, FP32 ``[n, size, size]``; ``ids`` and ``scales`` are ``[n, terms]``.

        Raises:
            CodecError: an id is not in the dictionary.
        """
        known = torch.tensor(self.ids)  # in ascending order
        places = torch.searchsorted(known, ids.contiguous()).clamp_max(len(known) - 1)
        if not torch.equal(known[places], ids):
            self.get(int(ids[known[places] != ids][0]))
        table = torch.stack(list(self._patterns.values()))
        blocks = torch.zeros(len(ids), self.size, self.size)
        for term in range(ids.shape[1]):
            blocks += scales[:, term, None, None] * table[places[:, term]]
        return blocks

    def _evict(self) -> None:
        """Forget the pattern that was used least, of those the oldest."""
        others = [pattern for pattern in self._patterns if pattern >= self.base]
        if not others:
            raise CodecError(
                f"the dictionary is full of base patterns ({len(self)})", hint="allow more patterns, or fewer base ones"
            )
        least = min(others, key=lambda pattern: (self._uses[pattern], pattern))
        del self._patterns[least], self._uses[least]
