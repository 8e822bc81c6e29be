"""What the wrapper promises: nothing lost, close to the entropy, hardly ever larger, and that it bears any bytes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from tenpak.codecs import planes, registry
from tenpak.codecs.additive import Additive
from tenpak.codecs.base import Codec, Payload, Statistics
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.entropycoded import EntropyCoded
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.sparse24 import Sparse24
from tenpak.codecs.streams import ByteReader
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.vector import Vector
from tenpak.errors import InvalidPayloadError, RecipeError
from tenpak.kernels import core, unpack

INNER = (
    *(Uniform(bits, 32) for bits in range(2, 9)),
    *(Uniform(3, 9, True), Uniform(8, None, True), Uniform(5, 256, search=True)),
    *(NormalFloat(4, 64), NormalFloat(3, 8, "learned"), Dense("float32"), Dense("bfloat16")),
    *(Residual(Uniform(4, 16), Uniform(2, 16)), Rotated(Uniform(4, 32), 3), Residual(NormalFloat(2), Dense("float16"))),
    *(LowRank(3, kind="plain"), LowRank(bpw=9.0, kind="plain", factor=Uniform(4, 32)), Sparse24(Uniform(4, 32))),
    *(Pattern(4, 9, terms=2), Pattern(3, 0, 5, scales=Uniform(8, None, True)), Vector(8, 16), Vector(4, 16, True)),
    Additive(2, 8, 16, False),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.02


def name(codec: Codec) -> str:
    return "-".join(str(value).replace("/", "") for value in codec.to_json().values())[:60]


def same(a: Payload, b: Payload) -> bool:
    return list(a.tensors) == list(b.tensors) and all(
        a.tensors[k].dtype == b.tensors[k].dtype and torch.equal(raw(a.tensors[k]), raw(b.tensors[k]))
        for k in a.tensors
    )


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def entropy(symbols: Tensor) -> float:
    """Bits of all symbols."""
    share = torch.bincount(symbols.flatten().int()).double() / symbols.numel()
    return -float((share[share > 0] * share[share > 0].log2()).sum()) * symbols.numel()


# Nothing is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER, ids=name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 70), (128, 96)])
def test_the_payload_is_that_of_inner(inner: Codec, shape: tuple[int, int]) -> None:
    weight, codec = weights(*shape), EntropyCoded(inner)
    expected, payload = inner.encode(weight), codec.encode(weight)
    prepared = codec.prepare(payload)
    if isinstance(prepared, Payload):
        assert same(prepared, dataclasses.replace(expected, codec=inner.to_json()))
    assert torch.equal(codec.decode(payload), inner.decode(expected))
    indices, x = torch.tensor([0, shape[0] - 1]), weights(5, shape[1], 1)
    runtime = inner.prepare(expected)
    assert torch.equal(codec.rows(indices, prepared), inner.rows(indices, runtime))
    assert torch.equal(codec.matmul(x, prepared), inner.matmul(x, runtime))


def test_statistics_reach_inner() -> None:
    x = torch.randn(200, 40, generator=generator(1)) * torch.linspace(0.1, 3, 40)
    statistics = Statistics(hessian=x.T @ x / 200, mean_abs=x.abs().mean(0))
    weight = weights(20, 40)
    for inner in (Uniform(4, 32, rounding=Gptq()), ChannelScaled(NormalFloat(3, 8))):
        codec = EntropyCoded(inner)
        assert codec.needs_statistics
        assert torch.equal(
            codec.decode(codec.encode(weight, statistics)), inner.decode(inner.encode(weight, statistics))
        )
    assert EntropyCoded(NormalFloat(4, levels="learned", rounding=Gptq())).uses_curvature
    assert not EntropyCoded(Uniform(4)).needs_statistics


@pytest.mark.parametrize("seed", range(8))
def test_any_plane_survives(seed: int) -> None:
    """Of any size and any symbols: runs of bytes that do not occur, single values, noise."""
    random = generator(seed)
    rows, columns = (int(torch.randint(1, high, (1,), generator=random)) for high in (90, 120))
    kinds = (
        torch.randint(0, 256, (rows, columns), generator=random),
        torch.randint(0, 256, (rows, columns), generator=random) & 0xE1,
        torch.full((rows, columns), seed),
        (torch.randn(rows, columns, generator=random) * torch.rand(rows, 1, generator=random) * 40).round().long(),
        torch.where(torch.rand(rows, columns, generator=random) < 0.02, 255 - seed, torch.arange(rows)[:, None] % 3),
    )
    for kind in kinds:
        plane = (kind % 256).to(torch.uint8)
        section = planes.write(plane)
        assert len(section) <= plane.numel() + 1
        data = ByteReader("entropycoded/1", section)
        assert torch.equal(planes.read(data, rows, columns), plane)
        assert data.at == len(section)


@pytest.mark.parametrize("width", range(1, 9))
def test_the_width_of_packed_codes_is_found(width: int) -> None:
    """Or a multiple of it, which is as good."""
    from tenpak.kernels import pack

    codes = (torch.randn(64, 240, generator=generator(width)) * 0.15 * 2**width + 2 ** (width - 1)).round()
    plane = pack(codes.clamp(0, 2**width - 1).to(torch.uint8), width)
    section = planes.write(plane)
    if len(section) < plane.numel():
        assert int(section[0]) % 16 % width == 0
    assert torch.equal(planes.read(ByteReader("entropycoded/1", section), *plane.shape), plane)


def test_stripes_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codec = weights(120, 96), EntropyCoded(Residual(Uniform(4, 16), Uniform(3, 32)))
    monkeypatch.setattr(planes, "_STRIPE", 1000)
    monkeypatch.setattr(planes, "_MOST_ROWS", 7)
    payload = codec.encode(weight)
    threads, streams = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        streams.append(codec.encode(weight).tensors["stream"])
    torch.set_num_threads(threads)
    assert torch.equal(*streams)
    assert torch.equal(codec.decode(payload), codec.inner.decode(codec.inner.encode(weight)))


@pytest.mark.parametrize("isa", core.instruction_sets())
def test_every_instruction_set_gives_the_same(isa: str) -> None:
    weight, codec = weights(40, 64), EntropyCoded(Uniform(5, 32))
    expected = codec.encode(weight)
    with core.using(isa):
        assert torch.equal(codec.encode(weight).tensors["stream"], expected.tensors["stream"])
        decoded = codec.decode(expected)
    assert torch.equal(decoded, codec.inner.decode(codec.inner.encode(weight)))


# Size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "least"),
    [(Uniform(4, 32), 0.09), (Uniform(3, 32), 0.12), (Uniform(2, 32), 0.18), (NormalFloat(4, 64), 0.03)],
    ids=["int4", "int3", "int2", "nf4"],
)
def test_it_saves(inner: Codec, least: float) -> None:
    """Of normal weights, whose groups cost nothing to tell apart."""
    weight = weights(512, 512)
    plain, coded = inner.encode(weight).bits, EntropyCoded(inner).encode(weight).bits
    assert coded <= (1 - least) * plain


@pytest.mark.parametrize(
    "inner", [*(Uniform(bits, 32) for bits in (2, 3, 4, 5, 8)), Uniform(8, None, True), NormalFloat(4, 64)], ids=name
)
def test_codes_are_close_to_their_entropy(inner: Uniform | NormalFloat) -> None:
    codes = inner.encode(weights(512, 512)).tensors["codes"]
    bits = entropy(unpack(codes, inner.bits, 512))
    # Class by class a little less is possible; frequencies of 12 bits are coarse for tails of 256 symbols.
    most = 1.008 if inner.bits == 8 else 1.002
    assert 0.98 * bits <= 8 * len(planes.write(codes)) <= most * bits


def test_rows_that_differ_have_classes() -> None:
    """Rows of one scale each that an outlier makes wide use less of their range."""
    weight = weights(512, 256)
    weight[::2, 7] = 0.3
    inner = Uniform(8, None, True)
    codes = inner.encode(weight).tensors["codes"]
    apart = entropy(codes[::2]) + entropy(codes[1::2])
    assert apart < 0.95 * entropy(codes)
    assert 8 * len(planes.write(codes)) < 1.01 * apart + 8 * 600


@pytest.mark.parametrize("inner", INNER, ids=name)
def test_it_is_hardly_ever_larger(inner: Codec) -> None:
    """A byte for each byte of an entry, where nothing can be saved."""
    fields = inner.fields((9, 64))
    assert fields is not None
    random = generator(5)
    noise = {
        f.name: torch.randint(0, 256, (f.nbytes,), dtype=torch.uint8, generator=random).view(f.dtype).view(f.shape)
        for f in fields
    }

    class Noise(Uniform):
        """A codec whose payload is noise."""

        def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
            return self.payload(weight, noise)

    for shape in ((1, 1), (9, 64)):
        spare = 8 * sum(field.dtype.itemsize for field in fields)
        assert EntropyCoded(inner).encode(weights(*shape)).bits <= (inner.estimate_bits(shape) or 0) + spare
    coded = EntropyCoded(Noise(4)).encode(weights(9, 64)).bits
    assert coded <= 8 * (sum(field.nbytes for field in fields) + sum(field.dtype.itemsize for field in fields))


def test_zeros_take_next_to_nothing() -> None:
    payload = EntropyCoded(Uniform(4, 32)).encode(torch.zeros(1024, 1024))
    assert payload.bits / 8 < 400
    assert not EntropyCoded(Uniform(4, 32)).decode(payload).any()


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Uniform(4, 32), NormalFloat(3, 8, "learned"), Residual(Uniform(2), Uniform(5, 16))])
def test_damaged_streams_do_no_harm(inner: Codec) -> None:
    """They are refused, or decode to some weight of that shape."""
    codec, random = EntropyCoded(inner), generator(2)
    payload = codec.encode(weights(24, 64))
    stream = payload.tensors["stream"]
    damaged = [stream[:length] for length in range(0, len(stream), 31)] + [torch.cat([stream, stream[:1]])]
    for place in range(0, len(stream), 3):
        other = stream.clone()
        other[place] ^= int(torch.randint(1, 256, (1,), generator=random))
        damaged.append(other)
    damaged += [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=random) for n in (0, 1, 5, 40, 400)]
    refused = 0
    for other in damaged:
        try:
            decoded = codec.decode(dataclasses.replace(payload, tensors={"stream": other}))
        except InvalidPayloadError:
            refused += 1
        else:
            assert decoded.shape == (24, 64)
            assert len(other) == len(stream)
    assert refused > len(damaged) // 8  # most bytes of small payloads are stored as they are


@pytest.mark.parametrize("shape", [(1, 1 << 40), (1 << 40, 1), (1 << 20, 1 << 20), (0, 4), (-1, -4)])
def test_a_few_bytes_cost_no_memory(shape: tuple[int, int]) -> None:
    codec = EntropyCoded(Uniform(4, 32))
    payload = codec.encode(torch.zeros(64, 64))
    with pytest.raises(InvalidPayloadError, match="cannot hold a weight"):
        codec.decode(dataclasses.replace(payload, shape=shape))


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ([], "ends too early"),
        ([0, 1, 2], "ends too early"),
        ([9, 1], "header"),
        ([16 * 5 + 4, 1], "header"),
        ([4, 0], "header"),
        ([4, 33], "header"),
        ([4, 1, 0xFF, 0xFF], "a table"),  # a gap beyond the symbols
        ([4, 1, 0xFF, 0x00, 0x00], "a table"),  # 16 symbols, of which none occurs
        ([4, 1, 0xFE, 0xFF, 0, 0], "a table"),  # a weight that there is not
        ([4, 1, *[0x00] * 8], "a table"),  # steps below the first weight
        ([4, 1, 0x56], "a table"),  # it ends
        ([4, 1, 0xF6, 0x0E], "ends too early"),  # one symbol, and no length
        ([4, 1, 0xF6, 0x0E, 0x80, 0x80, 0x80, 0x80, 0x80], "a length"),
        ([4, 1, 0xF6, 0x0E, 2, 1, 0, 1, 0], "symbols"),
        ([4, 1, 0xF6, 0x1E, 2, 1, 0, 0, 0], "a table"),  # half a byte too many
    ],
)
def test_each_part_of_a_section_is_checked(section: list[int], what: str) -> None:
    data = ByteReader("entropycoded/1", torch.tensor(section, dtype=torch.uint8))
    with pytest.raises(InvalidPayloadError, match=what):
        planes.read(data, 8, 8)


def test_symbols_are_bounded_by_the_stream() -> None:
    """A byte of a plane may be eight symbols, each of four bytes while they are decoded."""
    data = ByteReader("entropycoded/1", torch.tensor([1, 1, *[0] * 10], dtype=torch.uint8))
    with pytest.raises(InvalidPayloadError, match="as many symbols"):
        planes.read(data, 12 << 10, 1 << 4)


# Configuration -------------------------------------------------------------------------------------------------------


def test_inner_has_a_fixed_rate() -> None:
    for inner in (Trellis(1.0), EntropyCoded(Uniform(4)), Residual(Uniform(4), EntropyCoded(Uniform(2)))):
        with pytest.raises(RecipeError, match="must have a fixed rate"):
            EntropyCoded(inner)
    with pytest.raises(RecipeError, match="inner must be a codec"):
        registry.from_json({"id": "entropycoded/1", "inner": 4})


def test_others_may_hold_it() -> None:
    """Their rate is not fixed then."""
    weight = weights(16, 64)
    for codec, plain in (
        (Rotated(EntropyCoded(Uniform(4, 32)), 1), Rotated(Uniform(4, 32), 1)),
        (Residual(EntropyCoded(Uniform(4, 32)), Uniform(2, 32)), Residual(Uniform(4, 32), Uniform(2, 32))),
    ):
        assert codec.estimate_bits((16, 64)) is None
        assert torch.equal(codec.decode(codec.encode(weight)), plain.decode(plain.encode(weight)))


def test_tables_are_frequencies() -> None:
    """Of any weights: below 4096 each, adding up to it, one at least for each symbol that occurs."""
    random = generator(9)
    for size, _ in itertools.product((2, 16, 256), range(50)):
        table = torch.randint(-30, 112, (3, size), generator=random).clamp(min=-1)
        table[:, int(torch.randint(0, size, (1,), generator=random))] = 5
        table[2, 1:] = -1
        table[2, 0] = 111
        found = planes._frequencies(table).long()
        assert found.sum(1).tolist() == [4096] * 3
        assert int(found.max()) < 4096
        assert bool((found[:, :size] > 0)[table >= 0].all())
        assert bool((found[:2, :size] == 0)[table[:2] < 0].all()) or math.log2(size) < 2
        for row in table:
            data = ByteReader(
                "entropycoded/1", torch.frombuffer(bytearray(planes._table_bytes(row)), dtype=torch.uint8)
            )
            assert torch.equal(planes._read_table(data, size), row)
