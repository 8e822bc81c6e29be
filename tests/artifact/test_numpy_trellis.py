"""What docs/format.md says of trellis/1 is enough: plain integers give, bit for bit, what tenpak decodes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import numpy_trellis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenpak.codecs import Payload, trellis_stream
from tenpak.codecs.trellis import Trellis
from tenpak.errors import InvalidPayloadError
from tenpak.kernels import core


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(step: float, states: int, weight: Tensor) -> Payload:
    return Trellis(step, states, calibrated=False).encode(weight)


def coded(payload: Payload) -> trellis_stream.Coded:
    config = payload.codec
    return trellis_stream.read(payload.tensors["stream"], payload.shape, config["step"], config["states"])


def ours(payload: Payload) -> Tensor:
    return Trellis(payload.codec["step"], payload.codec["states"], calibrated=False).decode(payload)


def theirs(payload: Payload) -> np.ndarray:
    return numpy_trellis.decode(dict(payload.codec), payload.tensors["stream"].numpy().tobytes(), *payload.shape)


def compare(payload: Payload) -> None:
    expected, found = ours(payload), theirs(payload)
    assert found.dtype == np.float32
    assert found.shape == payload.shape
    assert found.tobytes() == expected.contiguous().numpy().tobytes()


def shifts(payload: Payload) -> Tensor:
    """How many low bits of each k are uniform."""
    found = coded(payload)
    return (((found.row_class[:, None] + found.column_class).clamp(0, 63) - 12) // 4 - 4).clamp(0)


def escapes(payload: Payload) -> int:
    """How many levels are beyond all tables; there may be more escapes."""
    return int((coded(payload).levels.abs() / 2 > 64 * 2 ** shifts(payload)).sum())


@pytest.mark.parametrize("shape", [(48, 22, 64, 8), *product((0, 255), repeat=4)], ids=str)
def test_tables(shape: tuple[int, int, int, int]) -> None:
    for g in range(64):
        for q in (0, 1):
            expected = core.frequencies(g, q, torch.tensor(shape, dtype=torch.uint8))
            assert numpy_trellis.table(g, q, shape).frequencies == list(expected)


@pytest.mark.parametrize("states", core.STATES)
def test_every_number_of_states(states: int) -> None:
    compare(encode(0.3, states, normal(40, 33)))
    fine = encode(1e-3, states, normal(20, 9))
    assert (shifts(fine) > 0).all()
    compare(fine)


@pytest.mark.parametrize("states", [1, 8, 256])
def test_outliers(states: int) -> None:
    weight = normal(30, 40)
    weight[3, 7], weight[3, 8], weight[9, 0], weight[20:24, 30] = 100, -3000, 5e4, -700
    for step, matrix in ((0.3, weight), (1.0, weight.where(weight.abs() > 50, 0)), (0.01, 0.01 * weight)):
        payload = encode(step, states, matrix)
        assert escapes(payload) > 0
        compare(payload)
    fine = encode(2e-3, states, weight.clamp(-100, 100))
    assert escapes(fine) > 0
    assert (shifts(fine) > 1).any()
    compare(fine)


@pytest.mark.parametrize("magnitude", [0, 1e-30, 1e-9, 1e9, 1e28])
def test_any_magnitude(magnitude: float) -> None:
    for step in (1e-12, 0.1, 1e6):
        compare(encode(step, 8, magnitude * normal(5, 6)))


def test_the_trellis_starts_anew() -> None:
    compare(encode(0.3, 64, normal(2100, 3)))


def test_several_stripes() -> None:
    """Of 32 columns and one; the second one has 32 lanes too."""
    assert trellis_stream._stripes(16645, 33) == [(0, 32), (32, 33)]
    compare(encode(1.0, 8, normal(16645, 33)))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 40),
    states=st.sampled_from(core.STATES),
    shape=st.tuples(*4 * [st.sampled_from((0, 1, 2, 20, 64, 255)) | st.integers(0, 255)]),
    deltas=st.booleans(),
    lanes=st.integers(1, 32),
    spread=st.sampled_from((0, 3, 20)),
    seed=st.integers(0, 2**32),
)
def test_any_stream_decodes_alike(
    rows: int,
    columns: int,
    states: int,
    shape: tuple[int, int, int, int],
    deltas: bool,
    lanes: int,
    spread: int,
    seed: int,
) -> None:
    """Not only what the encoder writes: any scales, classes, tables and number of lanes."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator, dtype=torch.int32)

    weight = torch.randn(rows, columns, generator=generator) * 2.0 ** integers(-3, 8, rows)[:, None]
    payload = encode(0.1, states, weight)
    changed = replace(
        coded(payload),
        shape=shape,
        row_power=integers(-2 * spread, spread, rows),
        column_power=integers(-spread, 2 * spread, columns),
        row_class=integers(20 - spread, 20 + 2 * spread, rows),
        column_class=integers(-spread, spread, columns),
        row_delta=integers(-127, 300, rows * deltas),
        column_delta=integers(-3, 3, columns * deltas),
        places=7 + 9 * (seed % 2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis_stream, "lane_count", lambda rows, columns: lanes)
        compare(replace(payload, tensors={"stream": trellis_stream.write(changed)}))


@cache
def small() -> Payload:
    return encode(0.3, 8, normal(6, 9) * normal(6, 1).exp())


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 150), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_found_alike(place: int, bit: int, cut: bool) -> None:
    """Whatever is refused by one is refused by the other; the rest decodes to the same."""
    stream = small().tensors["stream"]
    if cut:
        stream = torch.cat([stream, stream])[:place]
    else:
        stream = stream.clone()
        stream[place % len(stream)] ^= 1 << bit
    damaged = replace(small(), tensors={"stream": stream})
    try:
        compare(damaged)
    except InvalidPayloadError:
        with pytest.raises(ValueError, match="not a sound stream"):
            theirs(damaged)
