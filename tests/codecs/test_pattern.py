"""Patterns: against plain loops, at borders, where there is nothing to find, and what a payload may not say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Payload, Statistics
from tenpak.codecs.block_cache import BlockCache
from tenpak.codecs.dense import Dense
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.patterns import (
    PatternDictionary,
    base_patterns,
    discover,
    match,
    to_blocks,
)
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError, InvalidPayloadError, MissingStatisticsError, RecipeError

FP32 = Dense("float32")


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def repeating(rows: int, columns: int, patterns: Tensor, seed: int = 0) -> Tensor:
    """A weight whose blocks are multiples of ``patterns``, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    size = patterns.shape[1]
    which = torch.randint(len(patterns), (rows // size, columns // size), generator=generator)
    scales = torch.randn(which.shape, generator=generator)
    blocks = patterns[which] * scales[..., None, None]
    return blocks.transpose(1, 2).reshape(rows, columns)


def error(weight: Tensor, codec: Pattern, known: Statistics | None = None) -> float:
    return float((weight - codec.decode(codec.encode(weight, known))).norm() / weight.norm())


@pytest.mark.parametrize("size", range(2, 33))
def test_base_patterns_are_whole_numbers_far_from_a_tie(size: int) -> None:
    """So that every machine rounds the cosines alike, whatever the last bit of its library."""
    for k, i in itertools.product(range(size), repeat=2):
        wave = 64 * math.cos(math.pi * (2 * i + 1) * k / (2 * size))
        assert abs(wave - math.floor(wave) - 0.5) > 1e-6
    base = base_patterns(size)
    assert base.shape == (2 * size * size, size, size)
    assert base.abs().max() == 1
    assert torch.equal(base[0], torch.ones(size, size))
    assert torch.equal((4096 * base).round(), 4096 * base)
    if size <= 8:
        assert torch.linalg.matrix_rank(base[: size * size].flatten(1).double()) == size * size


def test_blocks_are_those_of_the_matrix() -> None:
    weight = torch.arange(35.0).view(5, 7)
    blocks = to_blocks(weight, 3).view(2, 3, 3, 3)
    assert torch.equal(blocks[0, 1], weight[:3, 3:6])
    assert blocks[1, 2].tolist() == [[27, 0, 0], [34, 0, 0], [0, 0, 0]]


def test_one_term_is_the_best_pattern() -> None:
    blocks, table = weights(50, 16), base_patterns(4).flatten(1)
    ids, scales = match(blocks, None, table, 1)
    for block, index, scale in zip(blocks, ids[:, 0].tolist(), scales[:, 0], strict=True):
        fits = [(block @ p) / (p @ p) for p in table]
        left = torch.stack([(block - fit * p).norm() for fit, p in zip(fits, table, strict=True)])
        assert left[index] <= left.min() * (1 + 1e-5)
        torch.testing.assert_close(scale, fits[index])


def test_scales_of_many_terms_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(2)
    blocks, table = weights(50, 16), base_patterns(4).flatten(1)
    importance = torch.rand(50, 16, generator=generator) + 0.1
    for weighting in (None, importance):
        ids, scales = match(blocks, weighting, table, 4)
        for row in range(50):
            assert len(set(ids[row].tolist())) == 4
            root = torch.ones(16) if weighting is None else weighting[row].sqrt()
            expected = torch.linalg.lstsq((table[ids[row]] * root).T.double(), (blocks[row] * root).double()).solution
            torch.testing.assert_close(scales[row].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_complete_basis_is_exact() -> None:
    weight = weights(8, 8)
    assert error(weight, Pattern(2, 0, base=4, terms=4, scales=FP32)) < 1e-6
    assert error(weight, Pattern(2, 0, base=None, terms=8, scales=FP32)) < 1e-6


def test_patterns_that_are_one_anothers_multiples_stay_finite() -> None:
    pattern = weights(1, 16)
    table = torch.cat((pattern, pattern, -2 * pattern, pattern * (1 + 1e-6), torch.zeros(1, 16)))
    ids, scales = match(weights(20, 16, seed=1), None, table, 4)
    assert scales.isfinite().all()
    assert scales.abs().max() < 1e3
    assert ids.max() < 5


def test_what_recurs_is_found() -> None:
    patterns = weights(6, 16, seed=5).view(6, 4, 4)
    weight = repeating(96, 80, patterns)
    assert error(weight, Pattern(4, 12, base=0, scales=FP32, seed=1)) < 2e-3
    assert error(weight, Pattern(4, 0, scales=FP32)) > 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (5, 33), (7, 9)])
@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_borders_are_fitted_to_what_is_there(shape: tuple[int, int], size: int) -> None:
    constant = torch.full(shape, 0.7)
    assert error(constant, Pattern(size, 0, base=1, scales=FP32)) < 1e-6
    weight = weights(*shape)
    few = error(weight, Pattern(size, 0, terms=1, scales=FP32))
    more = error(weight, Pattern(size, 0, terms=4, scales=FP32))
    assert more <= few + 1e-6
    assert few < 1


def test_fewer_blocks_than_patterns() -> None:
    """Each block is a pattern of its own; what is left over is not stored."""
    weight = weights(8, 12)
    codec = Pattern(4, 1000, base=0, scales=FP32)
    payload = codec.encode(weight)
    assert payload.tensors["patterns"].shape == (6, 4, 4)
    assert payload.bits == codec.estimate_bits((8, 12))
    assert error(weight, codec) < 2**-10


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-5, 6e4])
def test_nothing_to_cluster(value: float) -> None:
    weight = torch.full((40, 44), value)
    weight[20:, :20] = 0
    for codec in (Pattern(4, 16), Pattern(4, 16, base=0, terms=2), Pattern(4, 200, terms=3)):
        decoded = codec.decode(codec.encode(weight))
        torch.testing.assert_close(decoded, weight, rtol=2**-7, atol=2**-18)


def test_clusters_are_never_left_empty() -> None:
    """Two directions by a thousand blocks and five by one: patterns go where error is left."""
    patterns = weights(2, 16, seed=5)
    generator = torch.Generator().manual_seed(1)
    many = patterns[torch.randint(2, (1000,), generator=generator)] * torch.randn(1000, 1, generator=generator)
    few = weights(5, 16, seed=9)
    blocks = torch.cat((many, few))
    centres = discover(blocks, 7, seed=0)
    assert torch.equal(centres, discover(blocks, 7, seed=0))
    torch.testing.assert_close(centres.square().mean(1), torch.ones(7))
    ids, scales = match(blocks, None, centres, 1)
    assert (blocks - centres[ids[:, 0]] * scales)[:1000].norm() < 1e-3 * many.norm()
    assert len(set(ids[1000:, 0].tolist())) >= 3


def test_seeds_matter_and_are_recorded() -> None:
    weight = weights(64, 64)
    first, second = (Pattern(4, 8, seed=seed).encode(weight) for seed in (0, 1))
    assert not torch.equal(first.tensors["patterns"], second.tensors["patterns"])
    assert second.codec["seed"] == 1


def test_calibrated_errors_are_where_they_cost_least() -> None:
    weight = weights(64, 64)
    power = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    known = Statistics(hessian=torch.diag(power), output_curvature=power.flip(0))

    def cost(codec: Pattern) -> float:
        left = weight - codec.decode(codec.encode(weight, known))
        return float((left.square() * power * power.flip(0)[:, None]).sum())

    assert cost(Pattern(4, 32, terms=2, calibrated=True)) < 0.95 * cost(Pattern(4, 32, terms=2))
    with pytest.raises(MissingStatisticsError):
        Pattern(4, calibrated=True).encode(weight)
    with pytest.raises(CodecError):
        Pattern(4, calibrated=True).encode(weight, Statistics(hessian=torch.eye(63)))


@pytest.mark.parametrize("count", [1, 2, 3, 200, 256, 257, 5000])
def test_indices_take_the_bits_that_they_should(count: int) -> None:
    codec = Pattern(2, count, base=0)
    fields = codec.fields((400, 400))
    assert fields is not None
    sizes = {field.name: field.shape for field in fields}
    assert sizes["codes"] == (200, -(-200 * max(1, math.ceil(math.log2(count))) // 8))
    assert sizes["patterns"] == (count, 2, 2)
    weight = weights(40, 44)
    assert codec.decode(codec.encode(weight)).shape == (40, 44)


def test_scales_may_be_any_codec() -> None:
    weight = weights(33, 50)
    exact = error(weight, Pattern(4, 16, terms=2, scales=FP32))
    for scales in (Uniform(8, None, True), Uniform(6, 16), Trellis(1e-5, calibrated=False)):
        codec = Pattern(4, 16, terms=2, scales=scales)
        assert error(weight, codec) < exact + 0.02
        estimate = codec.estimate_bits((33, 50))
        assert estimate == (None if isinstance(scales, Trellis) else codec.encode(weight).bits)


@pytest.mark.parametrize(
    ("change", "match_"),
    [
        ({"size": 1}, "size must be"),
        ({"size": 33}, "size must be"),
        ({"learned": -1}, "learned must be"),
        ({"base": 33}, "base must be"),
        ({"base": 0, "learned": 0}, "patterns together"),
        ({"learned": 65536}, "patterns together"),
        ({"terms": 0}, "terms must be"),
        ({"terms": 9}, "terms must be"),
        ({"scales": 16}, "scales must be a codec"),
        ({"scales": Uniform(4, 32, rounding=Gptq())}, "cannot use statistics"),
        ({"calibrated": 1}, "calibrated must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], match_: str) -> None:
    with pytest.raises(RecipeError, match=match_):
        Pattern(**{"size": 4, **change})


def test_patterns_that_are_not_there_are_refused() -> None:
    codec = Pattern(4, 0, base=20)
    payload = codec.encode(weights(8, 8))
    broken = dataclasses.replace(payload, tensors={**payload.tensors, "codes": payload.tensors["codes"] | 255})
    with pytest.raises(InvalidPayloadError, match="beyond the 20"):
        codec.decode(broken)
    with pytest.raises(InvalidPayloadError, match="beyond the 20"):
        codec.rows(torch.tensor([0]), codec.prepare(broken))


def test_a_hostile_shape_costs_no_memory() -> None:
    codec = registry.from_json({"id": "pattern/1", "size": 2, "learned": 60_000})
    with pytest.raises(InvalidPayloadError):
        codec.decode(Payload(codec.to_json(), (1 << 40, 1 << 40), torch.float32, {}))


def test_a_worked_example() -> None:
    """As a stranger would decode it from the description of the format: the wave k = 0, m = 1, then one weight."""
    codec = Pattern(2, 0, terms=2, scales=FP32)
    tensors = {
        "scales_values": torch.tensor([[1.0, 2.0, 10.0, 20.0]]),
        "codes": torch.tensor([[1 | 0 << 3 | (4 << 6) & 255, 4 >> 2 | 7 << 1]], dtype=torch.uint8),
    }
    decoded = codec.decode(Payload(codec.to_json(), (2, 4), torch.float32, tensors))
    wave = 45 / 64
    assert decoded.tolist() == [[10 + wave, -wave, 2, 2], [wave, -wave, 2, 22]]


def test_a_dictionary_gives_finds_and_forgets() -> None:
    book = PatternDictionary(4, max_patterns=6, base=3)
    assert (len(book), book.ids, book.nbytes) == (3, (0, 1, 2), 3 * 64)
    first, second, third = (book.add(pattern.view(4, 4)) for pattern in weights(3, 16))
    target = -3 * book.get(second)
    best = book.find_best_matches(target, top_k=2)
    assert best[0].pattern == second
    assert best[0].scale == pytest.approx(-3)
    assert best[0].error < 1e-3 < best[1].error
    assert (book.uses(second), book.uses(first)) == (1, 0)
    assert book.get(third).square().mean() == pytest.approx(1, rel=1e-3)
    fourth = book.add(weights(4, 4, seed=3))
    assert book.ids == (0, 1, 2, second, third, fourth)
    assert first not in book
    with pytest.raises(CodecError, match=f"no pattern {first}"):
        book.get(first)
    assert book.find_best_matches(torch.zeros(4, 4))[0].error == 0


def test_a_dictionary_discovers() -> None:
    patterns = weights(4, 16, seed=5).view(4, 4, 4)
    weight = repeating(64, 64, patterns)
    book = PatternDictionary(4, max_patterns=64)
    assert len(book) == 32
    found = book.discover(weight, 8)
    assert len(book) == 32 + len(found) <= 40
    targets = to_blocks(weight, 4).view(-1, 4, 4)
    ids, scales = book.fit(targets, 2)
    assert (book.synthesize(ids, scales) - targets).norm() < 0.02 * targets.norm()
    assert sum(book.uses(pattern) for pattern in book.ids) == 2 * len(targets)
    assert book.discover(torch.zeros(8, 8), 4) == []


def test_a_dictionary_refuses() -> None:
    for arguments in ((1,), (33,), (4, 0), (4, 8, -1)):
        with pytest.raises(CodecError):
            PatternDictionary(*arguments)
    book = PatternDictionary(4, max_patterns=8)
    with pytest.raises(CodecError, match="full of base patterns"):
        book.add(torch.ones(4, 4))
    for pattern in (torch.ones(3, 4), torch.zeros(4, 4), torch.full((4, 4), math.nan), torch.full((4, 4), math.inf)):
        with pytest.raises(CodecError):
            PatternDictionary(4).add(pattern)
    with pytest.raises(CodecError):
        book.find_best_matches(torch.ones(4, 5))


def test_the_cache_holds_so_many_bytes_and_no_more() -> None:
    cache, made = BlockCache(3 * 64), []

    def make(key: int) -> Tensor:
        made.append(key)
        return torch.full((4, 4), float(key))

    for key in (1, 2, 3, 1, 4, 1, 2):
        assert cache.get(key, lambda key=key: make(key))[0, 0] == key
    assert made == [1, 2, 3, 4, 2]
    assert (len(cache), cache.nbytes, cache.hits, cache.misses) == (3, 192, 2, 5)
    assert cache.get("large", lambda: torch.zeros(1000)).shape == (1000,)
    assert (len(cache), cache.nbytes) == (3, 192)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_patterns_that_are_given() -> None:
    """Those that encoding would find give its payload; too few, or of another size, are refused."""
    weight, codec = weights(33, 50), Pattern(4, 16, terms=2)
    payload = codec.encode(weight)
    patterns = payload.tensors["patterns"]
    again = codec.encode_with(weight, torch.cat((patterns, patterns)))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in payload.tensors.items())
    assert codec.encode_with(weights(4, 8), patterns).tensors["patterns"].equal(patterns[:2])
    places, scales = codec.references(payload)
    table = torch.cat((base_patterns(4), patterns.float()))
    blocks = (table[places] * scales[..., None, None]).sum(1)
    torch.testing.assert_close(to_blocks(codec.decode(payload), 4)[0].view(4, 4), blocks[0])
    for wrong in (patterns[:15], patterns[:, :3], torch.zeros(16, 3, 3)):
        with pytest.raises(CodecError, match="needs 16 patterns"):
            codec.encode_with(weight, wrong)
