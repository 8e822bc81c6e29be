"""The compiled core equals the plain reference to the bit, finds the best path, and codes as few bytes as it could."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tenpak.kernels import core

ISAS = core.instruction_sets()
SHAPES = [(48, 22, 64, 8), (64, 64, 64, 16), (0, 0, 0, 0), (255, 255, 255, 255), (1, 255, 0, 128), (200, 3, 99, 255)]
isa_and_reference = pytest.mark.parametrize("isa", ISAS)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shape_of(*parts: int) -> Tensor:
    return torch.tensor(parts, dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_there_is_always_the_reference() -> None:
    assert ISAS[0] == "reference"
    with pytest.raises(ValueError, match=r"'mmx' is not among reference"), core.using("mmx"):
        pass


# Quantization --------------------------------------------------------------------------------------------------------

# Rows, columns, rows of a segment.
SIZES = [(1, 1, 1024), (1, 9, 1024), (50, 1, 1024), (33, 5, 7), (70, 3, 64), (64, 4, 16)]


@dataclass(frozen=True)
class Result:
    """What ``quantize`` writes: target, error and levels, ``[columns, rows]``."""

    target: Tensor
    error: Tensor
    levels: Tensor


def weights(kind: str, rows: int, columns: int) -> Tensor:
    """Weights in steps of about one, FP32 ``[columns, rows]``."""
    weight = 3 * torch.randn(columns, rows, generator=random(rows * columns))
    if kind == "outliers":
        weight[:, ::5] *= 1e4
        weight[:, ::7] *= 1e9  # beyond the range of levels
    if kind == "ties":
        weight = (2 * weight).round() / 2
    if kind == "small":
        weight[:, ::2] *= 1e-40
        weight[:, ::3] = 0
    return weight


@cache
def quantized(
    isa: str, states: int, size: tuple[int, int, int], *, kind: str = "normal", rated: bool = True, exact: bool = False
) -> Result:
    """A block by one instruction set; ``exact`` steps are one, so that ties stay ties."""
    rows, columns, segment = size
    generator = random(1)
    weight = weights(kind, rows, columns)
    target, error = weight.clone(), torch.empty_like(weight)
    levels = torch.empty(weight.shape, dtype=torch.int32)
    feedback = torch.randn(columns, columns, generator=generator).tril(-1) / 4 + torch.eye(columns)
    row_step, column_step = torch.ones(rows), torch.ones(columns)
    if exact:
        feedback = torch.eye(columns)
    else:
        row_step += torch.rand(rows, generator=generator)
        column_step += torch.rand(columns, generator=generator)
    # Of 5 classes, of which the sums below leave the range on both sides; the last symbol stands for larger ones.
    rates = torch.rand(5, 2, 4, generator=generator).cumsum(2) if rated else torch.zeros(0, 2, 1)
    row_class = torch.randint(-2, 4, (rows,), generator=generator, dtype=torch.int32)
    column_class = torch.randint(-2, 4, (columns,), generator=generator, dtype=torch.int32)
    with core.using(isa):
        core.quantize(
            weight, target, error, levels, feedback, row_step, column_step, rates, row_class, column_class, states,
            segment,
        )  # fmt: skip
    assert torch.equal(error, weight - levels * (row_step * column_step[:, None]))
    return Result(target, error, levels)


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("states", core.STATES)
def test_quantize_equals_the_reference(isa: str, states: int) -> None:
    for size, kind, rated in itertools.product(SIZES, ("normal", "outliers", "small"), (False, True)):
        found = quantized(isa, states, size, kind=kind, rated=rated)
        expected = quantized("reference", states, size, kind=kind, rated=rated)
        for name in ("target", "error", "levels"):
            assert same_bits(getattr(found, name), getattr(expected, name)), (name, size, kind, rated)


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("states", core.STATES)
def test_ties_are_broken_like_the_reference(isa: str, states: int) -> None:
    found = quantized(isa, states, (70, 3, 64), kind="ties", rated=False, exact=True)
    assert same_bits(
        found.levels, quantized("reference", states, (70, 3, 64), kind="ties", rated=False, exact=True).levels
    )


@isa_and_reference
def test_one_state_rounds_to_nearest(isa: str) -> None:
    found = quantized(isa, 1, (33, 5, 7), rated=False, exact=True)
    assert torch.equal(found.levels, weights("normal", 33, 5).round().int())


@isa_and_reference
@pytest.mark.parametrize("states", core.STATES)
def test_levels_are_those_of_a_path(isa: str, states: int) -> None:
    """The index is coded from a level and leads to the next state: what it stands for must be that level again."""
    levels = quantized(isa, states, (33, 5, 7), kind="outliers").levels.T.contiguous()
    assert torch.equal(levels_of(indices_of(levels, states, 7), states, 7), levels)


@pytest.mark.parametrize("states", core.STATES[1:])
@pytest.mark.parametrize("rated", [False, True])
def test_no_path_is_better(states: int, rated: bool) -> None:
    """Against all paths of five rows with indices from -3 to 3."""
    rows, generator = 5, random(states)
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=rows)), dtype=torch.int32).T.contiguous()
    levels = levels_of(every, states, rows)
    rates = torch.tensor([[0.0, 0.3, 0.9, 1.4], [0.0, 0.5, 0.8, 1.6]]) * rated
    # Where a level is 2k it is of Q0, or zero, which costs nothing in either.
    rate = rates[(levels != 2 * every).int(), every.abs()]
    used = rates[None].contiguous() if rated else torch.zeros(0, 2, 1)
    zeros, ones = torch.zeros(rows, dtype=torch.int32), torch.ones(rows)
    for _ in range(5):
        target = (2 * torch.randn(1, rows, generator=generator)).clamp(-5, 5)
        found = torch.empty(1, rows, dtype=torch.int32)
        core.quantize(
            target, target.clone(), torch.empty(1, rows), found, ones[:1, None], ones, ones[:1], used, zeros, zeros[:1],
            states, rows,
        )  # fmt: skip
        costs = ((target.T - levels) ** 2 + rate).sum(0)
        chosen = costs[(levels == found.T).all(0)]
        assert float(chosen) == pytest.approx(float(costs.min()), abs=1e-5)


@pytest.mark.parametrize("states", core.STATES[1:])
def test_the_machine_permutes(states: int) -> None:
    """Every state is entered from two states, by one parity from each, and quantizers alternate in pairs."""
    h0, h1 = core.machine(states)
    following = {(s, b): (s >> 1) ^ (s & 1) * h0 ^ b * h1 for s in range(states) for b in (0, 1)}
    entered = sorted(following.values())
    assert entered == sorted([*range(states), *range(states)])
    for b in (0, 1):
        assert sorted(following[s, b] for s in range(states)) == list(range(states))


# Indices and levels ------------------------------------------------------------------------------------------------


def levels_of(indices: Tensor, states: int, segment: int) -> Tensor:
    """What indices k stand for along the paths that they take, int32 ``[rows, columns]``."""
    if states == 1:
        return indices
    h0, h1 = core.machine(states)
    levels = torch.empty_like(indices)
    state = torch.zeros(indices.shape[1], dtype=torch.int32)
    for i, k in enumerate(indices):
        if i % segment == 0:
            state = torch.zeros_like(state)
        q = state & 1
        levels[i] = 2 * k - q * k.sign()
        state = (state >> 1) ^ (q * h0) ^ ((k & 1) * h1)
    return levels


def indices_of(levels: Tensor, states: int, segment: int) -> Tensor:
    """The inverse of ``levels_of``."""
    if states == 1:
        return levels
    h0, h1 = core.machine(states)
    indices = torch.empty_like(levels)
    state = torch.zeros(levels.shape[1], dtype=torch.int32)
    for i, level in enumerate(levels):
        if i % segment == 0:
            state = torch.zeros_like(state)
        q = state & 1
        indices[i] = level.sign() * ((level.abs() + q) // 2)
        state = (state >> 1) ^ (q * h0) ^ ((indices[i] & 1) * h1)
    return indices


# Entropy coding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """Levels and how they are to be coded."""

    levels: Tensor
    row_class: Tensor
    column_class: Tensor
    shape: Tensor
    states: int
    lanes: int
    segment: int

    def encode(self, isa: str) -> Tensor:
        with core.using(isa):
            return core.rans_encode(self.levels, *self.layout)

    def decode(self, isa: str, data: Tensor) -> Tensor | None:
        with core.using(isa):
            return core.rans_decode(data, *self.layout)

    @property
    def layout(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        return self.row_class, self.column_class, self.shape, self.states, self.lanes, self.segment


def message(
    rows: int, columns: int, lanes: int = 4, states: int = 8, *, seed: int = 0, shape: tuple[int, ...] = SHAPES[0],
    segment: int = 13, low: int = 0, high: int = 63, surprises: float = 0.05,
) -> Message:  # fmt: skip
    """Levels as classes from ``low`` to ``high`` expect them, and some of any size up to the largest."""
    generator = random(seed)
    row_class = torch.randint(low - 5, high + 6, (rows,), generator=generator, dtype=torch.int32)
    column_class = torch.randint(-3, 4, (columns,), generator=generator, dtype=torch.int32)
    classes = (row_class[:, None] + column_class).clamp(low, high).double()
    k = torch.randn(rows, columns, generator=generator).double() * 2 ** ((classes - 12) / 4 - 1)
    exponent = torch.rand(rows, columns, generator=generator).double() * 20
    surprise = torch.rand(rows, columns, generator=generator) < surprises
    k = torch.where(surprise, k.sign() * exponent.exp2(), k).round().clamp(-(2**20), 2**20).int()
    if surprises and k.numel() > 1:
        k[0, 0], k[-1, -1] = 2**20, -(2**20)
    levels = levels_of(k, states, segment)
    return Message(levels, row_class, column_class, shape_of(*shape), states, lanes, segment)


def round_trip(message: Message) -> Tensor:
    """The bytes, which must be the reference's and decode to the levels, by every instruction set."""
    expected = message.encode("reference")
    for isa in ISAS:
        assert torch.equal(message.encode(isa), expected), isa
        decoded = message.decode(isa, expected)
        assert decoded is not None, isa
        assert torch.equal(decoded, message.levels), isa
    return expected


@pytest.mark.parametrize("lanes", range(1, 33))
def test_lanes(lanes: int) -> None:
    data = round_trip(message(6, 37, lanes, seed=lanes))
    assert len(data) >= 4 * lanes


@pytest.mark.parametrize("states", core.STATES)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (27, 9)])
def test_states_and_sizes(states: int, size: tuple[int, int]) -> None:
    round_trip(message(*size, lanes=4, states=states, seed=states))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", [1, 4])
def test_shapes(shape: tuple[int, ...], states: int) -> None:
    round_trip(message(20, 9, shape=shape, states=states, surprises=0.2))


@pytest.mark.parametrize("cls", range(64))
def test_classes(cls: int) -> None:
    """Each alone, with and without low bits that are coded uniformly; classes beyond the range are its ends."""
    one = message(9, 6, states=4, low=cls, high=cls)
    one.row_class.fill_(cls - 200 if cls == 0 else cls + 200 if cls == 63 else cls)
    one.column_class.zero_()
    round_trip(one)


def test_nothing_and_zeros() -> None:
    for size in ((0, 0), (0, 5), (5, 0)):
        assert len(round_trip(message(*size, lanes=3, surprises=0))) == 4 * 3
    zeros = message(512, 8, lanes=1, low=0, high=0)
    zeros.levels.zero_()
    assert 4096 / (1 << 15) < len(zeros.encode(ISAS[-1])) < 20  # a symbol takes more than 2^-12 bits


@pytest.mark.parametrize("states", core.STATES)
def test_histogram(states: int) -> None:
    """Of the sizes of indices, larger ones together, by class and quantizer."""
    sent = message(30, 11, states=states)
    k = indices_of(sent.levels, states, sent.segment)
    classes = (sent.row_class[:, None] + sent.column_class).clamp(0, 63)
    # Along a path a level of Q1 is 2k - sgn k; which quantizer a zero is of, only the path tells.
    quantizer = torch.where(k == 0, -1, (sent.levels != (k if states == 1 else 2 * k)).int())
    for isa in ISAS:
        with core.using(isa):
            counts = core.histogram(sent.levels, sent.row_class, sent.column_class, states, sent.segment, 20)
        assert counts.sum() == k.numel()
        for cls, size in itertools.product(range(64), range(20)):
            here = (classes == cls) & (k.abs() == size if size < 19 else k.abs() >= 19)
            assert counts[cls, :, size].sum() == here.sum()
            if size:
                assert counts[cls, 1, size] == (here & (quantizer == 1)).sum()


# Tables --------------------------------------------------------------------------------------------------------------


def shapes() -> list[tuple[int, ...]]:
    drawn = torch.randint(0, 256, (10, 4), generator=random(7)).tolist()
    return [*SHAPES, *itertools.product((0, 255), repeat=4), *map(tuple, drawn)]


def test_frequencies_equal_the_reference() -> None:
    for shape, cls, q in itertools.product((shape_of(*s) for s in shapes()), range(64), (0, 1)):
        found = core.frequencies(cls, q, shape)
        assert sum(found) == 4096
        assert min(found) >= 1
        assert len(found) % 2 == 0  # -reach … reach and the escape
        with core.using("reference"):
            assert core.frequencies(cls, q, shape) == found, (shape, cls, q)


def test_frequencies_are_frozen() -> None:
    """Artifacts decode with these tables: where they change, none that was written before does."""
    digest = hashlib.sha256()
    for shape, cls, q in itertools.product(SHAPES, range(64), (0, 1)):
        digest.update(np.array(core.frequencies(cls, q, shape_of(*shape)), "<u2").tobytes())
    assert digest.hexdigest() == "561f300f2fe4013581e5e536d0aca5063d271ce9610bd044e27acaa1e08eb68f"


def test_a_class_is_a_standard_deviation() -> None:
    """Of 2^((class - 12) / 4) steps: where that is many, the tables' own is close to it."""
    for cls in (16, 20, 24, 28):
        frequencies = torch.tensor(core.frequencies(cls, 0, shape_of(64, 64, 64, 0)), dtype=torch.float64)[:-1]
        reach = len(frequencies) // 2
        levels = 2 * torch.arange(-reach, reach + 1)
        variance = float((frequencies * levels**2).sum() / frequencies.sum())
        assert variance == pytest.approx(2 ** ((cls - 12) / 2), rel=0.03)


# Size ----------------------------------------------------------------------------------------------------------------


def test_size_is_that_of_another_coder() -> None:
    """Constriction's range asymmetric numeral system, of 32-bit words, with the same frequencies."""
    constriction = pytest.importorskip("constriction", reason="constriction cannot be imported")
    sent = message(300, 40, lanes=8, states=1, low=8, high=20, surprises=0)
    symbols: dict[int, list[int]] = {}
    for i, j in itertools.product(range(300), range(40)):
        cls = min(max(int(sent.row_class[i] + sent.column_class[j]), 0), 63)
        symbols.setdefault(cls, []).append(int(sent.levels[i, j]))
    coder, raw = constriction.stream.stack.AnsCoder(), 0.0
    for cls, levels in symbols.items():
        frequencies = np.array(core.frequencies(cls, 0, sent.shape))
        reach = len(frequencies) // 2 - 1
        k = np.array(levels)
        beyond = np.abs(k) - reach
        places = np.where(beyond > 0, len(frequencies) - 1, k + reach).astype(np.int32)
        raw += sum(6 + np.floor(np.log2(beyond[beyond > 0])))
        model = constriction.stream.model.Categorical((frequencies / 4096).astype(np.float32), perfect=False)
        coder.encode_reverse(places, model)
    expected = 4 * len(coder.get_compressed()) + raw / 8
    found = len(sent.encode(ISAS[-1]))
    assert expected * 0.998 - 64 <= found <= expected * 1.002 + 64
    assert raw < 0.02 * 8 * expected  # few escapes: it is the tables that are compared


# Bytes ---------------------------------------------------------------------------------------------------------------


def coding(rows: int, columns: int, classes: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols around a middle that differs by class, their classes, and frequencies of what occurs, off by a little."""
    generator = random(seed)
    row_class = torch.randint(0, classes, (rows,), generator=generator, dtype=torch.int32)
    middle = torch.randint(0, 256, (classes,), generator=generator)[row_class.long(), None]
    symbols = ((spread * torch.randn(rows, columns, generator=generator)).round() + middle) % 256
    frequencies = torch.zeros(classes, 256, dtype=torch.int64)
    for cls in range(classes):
        counts = torch.bincount(symbols[row_class == cls].flatten().int(), minlength=256) + torch.eye(256)[cls].long()
        frequencies[cls] = (counts > 0) + counts * (4000 - (counts > 0).sum()) // counts.sum()
        frequencies[cls, cls + 1] += 4096 - frequencies[cls].sum()
    return symbols.to(torch.uint8), row_class, frequencies.to(torch.uint16)


@pytest.mark.parametrize("lanes", [1, 3, 8, 16, 32])
@pytest.mark.parametrize(("classes", "spread"), [(1, 3.0), (3, 0.0), (16, 60.0)])
def test_bytes_there_and_back(lanes: int, classes: int, spread: float) -> None:
    """By every instruction set, to the same bytes; all 256 symbols, -128 of the inner loop among them."""
    for rows, columns in ((1, 1), (7, 5), (5, 33), (20, 64), (0, 4), (4, 0)):
        symbols, row_class, frequencies = coding(rows, columns, classes, spread)
        data = [None] * len(ISAS)
        for i, isa in enumerate(ISAS):
            with core.using(isa):
                data[i] = core.symbols_encode(symbols, row_class, frequencies, lanes)
                found = core.symbols_decode(data[i], columns, row_class, frequencies, lanes)
            assert found is not None
            assert torch.equal(found, symbols)
            assert torch.equal(data[i], data[0])


def test_bytes_take_what_their_frequencies_say() -> None:
    symbols, row_class, frequencies = coding(400, 96, 4, 20.0)
    share = frequencies.long()[row_class.long()[:, None], symbols.long()] / 4096
    expected = float(-share.double().log2().sum()) / 8
    data = core.symbols_encode(symbols, row_class, frequencies, 16)
    assert expected <= len(data) <= 1.0005 * expected + 4 * 16


def test_damaged_bytes_are_refused_or_decode_to_something_else() -> None:
    symbols, row_class, frequencies = coding(6, 40, 3, 50.0)
    for lanes in (1, 5, 32):
        data, generator = core.symbols_encode(symbols, row_class, frequencies, lanes), random(6)
        damaged = [data[:length] for length in range(len(data))] + [torch.cat([data, data[:2]])]
        for place in range(len(data)):
            other = data.clone()
            other[place] ^= int(torch.randint(1, 256, (1,), generator=generator))
            damaged.append(other)
        for other in damaged:
            found = []
            for isa in ISAS:
                with core.using(isa):
                    found.append(core.symbols_decode(other, 40, row_class, frequencies, lanes))
            assert all((one is None) == (found[0] is None) for one in found)
            assert found[0] is None or all(torch.equal(one, found[0]) for one in found)  # type: ignore[arg-type]
            assert found[0] is None or not torch.equal(found[0], symbols)


def test_misuse_of_frequencies_is_refused() -> None:
    symbols, row_class, frequencies = coding(6, 40, 2, 5.0)
    wrong = frequencies.long()
    wrong[0, 0] += 1
    alone = torch.zeros(2, 256, dtype=torch.int64)
    alone[:, 0] = 4096
    if len(ISAS) > 1:
        for bad in (wrong, alone, frequencies.long()[:1], frequencies.long()[:, :255], frequencies.long().roll(99, 1)):
            with pytest.raises(ValueError, match=r"frequenc"):
                core.symbols_encode(symbols, row_class, bad.to(torch.uint16).contiguous(), 4)
        with pytest.raises(ValueError, match="one class per row"):
            core.symbols_encode(symbols, row_class[1:], frequencies, 4)
        with pytest.raises(ValueError, match="at least one"):
            core.symbols_encode(symbols, row_class, frequencies, 0)


# Damage --------------------------------------------------------------------------------------------------------------


def agree(message: Message, data: Tensor) -> Tensor | None:
    """What all instruction sets make of ``data``: the same."""
    first, *others = (message.decode(isa, data) for isa in ISAS)
    for other in others:
        assert (first is None) == (other is None)
        assert first is None or torch.equal(first, other)
    return first


@pytest.mark.parametrize(("states", "lanes", "shape"), [(1, 1, SHAPES[0]), (8, 3, SHAPES[0]), (256, 32, SHAPES[3])])
def test_damaged_words_are_refused_or_decode_to_something_else(states: int, lanes: int, shape: tuple[int, ...]) -> None:
    sent = message(5, 7, lanes, states, shape=shape, surprises=0.3)
    data, generator = sent.encode(ISAS[-1]), random(5)
    damaged = [data[:length] for length in range(len(data))] + [torch.cat([data, data[:2]])]
    for place in range(len(data)):
        other = data.clone()
        other[place] ^= int(torch.randint(1, 256, (1,), generator=generator))
        damaged.append(other)
    for _ in range(60):
        length = int(torch.randint(0, len(data) + 9, (1,), generator=generator))
        damaged.append(torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator))
    for other in damaged:
        decoded = agree(sent, other)
        assert decoded is None or not torch.equal(decoded, sent.levels)
        assert decoded is None or len(other) == len(data)


def test_states_below_the_range_are_refused() -> None:
    """An encoder's lanes begin where a decoder's end: in [2^16, 2^32)."""
    sent = message(0, 0, lanes=2, surprises=0)
    words = sent.encode(ISAS[-1]).view(torch.uint16)
    assert words.tolist() == [1, 0, 1, 0]
    for bad in ([0, 0, 1, 0], [1, 0, 0, 65535], [1, 1, 1, 0], [2, 0, 1, 0], [1, 0, 1, 0, 0]):
        assert agree(sent, torch.tensor(bad, dtype=torch.uint16).view(torch.uint8)) is None


def test_misuse_is_refused() -> None:
    sent = message(5, 7)
    for change in (
        {"states": 3}, {"lanes": 0}, {"segment": 0}, {"shape": shape_of(1, 2, 3)}, {"row_class": sent.row_class[1:]}
    ):  # fmt: skip
        other = Message(**{**vars(sent), **change})
        if len(ISAS) > 1:
            with pytest.raises(ValueError, match=r"states is|at least one|four bytes|one class per"):
                other.encode(ISAS[-1])
