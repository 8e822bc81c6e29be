"""Unstructured sparsity against plain loops, what places cost, and what a payload may not say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from matrices import refuses_unfit_statistics
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Codec, Payload, Statistics
from tenpak.codecs.dense import Dense
from tenpak.codecs.grouping import TILE
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.residual import Residual
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.sparse import Sparse
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.vector import Vector
from tenpak.errors import InvalidPayloadError, RecipeError

FP32, FP16, INT8 = Dense("float32"), Dense("float16"), Uniform(8, None, True)
WIDTHS = (1, 2, 3, 7, 8, 9, 33, 64, 100, 257, 1000)
SHARES = (1e-6, 0.01, 0.05, 0.25, 0.3, 0.5)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def plain(weight: Tensor, share: float, importance: Tensor | None = None) -> Tensor:
    """The weight with all but the largest of each row zero, by sorting."""
    columns = weight.shape[1]
    kept = max(1, round(share * columns))
    power = torch.ones(columns) if importance is None else importance.sqrt()
    expected = torch.zeros(weight.shape)
    for row, values in enumerate(weight):
        order = sorted(range(columns), key=lambda column: -abs(float(values[column] * power[column])))
        for column in order[:kept]:
            expected[row, column] = values[column]
    return expected


def stored(payload: Payload, share: float) -> list[list[int]]:
    """The places that the bytes of a payload say, bit by bit, as the documentation of the codec has them."""
    columns = payload.shape[1]
    kept = max(1, round(share * columns))
    low = min((kept * bits + kept + (columns - kept) // 2**bits, bits) for bits in range(17))[1]
    found = []
    for row in range(payload.shape[0]):
        high = int.from_bytes(bytes(payload.tensors["high"][row].tolist()), "little")
        rest = int.from_bytes(bytes(payload.tensors["low"][row].tolist()), "little") if low else 0
        ones = [bit for bit in range(high.bit_length()) if high >> bit & 1]
        zeros = [(one - i) * 2**low + (rest >> i * low) % 2**low for i, one in enumerate(ones)]
        found.append([z + i for i, z in enumerate(zeros)])
    return found


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("share", SHARES)
def test_the_largest_of_each_row_are_kept_exactly(share: float, columns: int) -> None:
    weight = weights(6, columns)
    weight[1], weight[2], weight[3, columns // 2] = 0, 0.25, 3.0
    codec = Sparse(share, FP32)
    payload = codec.encode(weight)
    expected = plain(weight, share)
    assert torch.equal(codec.decode(payload), expected)
    for row, places in enumerate(stored(payload, share)):
        assert len(places) == max(1, round(share * columns))
        assert set(expected[row].nonzero().flatten().tolist()) <= set(places)


def test_of_equal_weights_the_first_are_kept() -> None:
    weight = torch.tensor([[1.0, -1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, -1, 1, 1], [0, 0, 0, 0, 0, 0, 0, -5]])
    codec = Sparse(0.25, FP32)
    payload = codec.encode(weight)
    expected = [[1, -1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, -5]]
    assert codec.decode(payload).tolist() == expected
    assert stored(payload, 0.25) == [[0, 1], [0, 4], [0, 7]]


def test_one_column_is_kept_whole() -> None:
    weight = weights(5, 1)
    for share in SHARES:
        codec = Sparse(share, FP32)
        assert torch.equal(codec.decode(codec.encode(weight)), weight)


@pytest.mark.parametrize(("columns", "kept"), [(6, 3), (7, 2), (8, 3), (9, 4)])
def test_any_places_survive(columns: int, kept: int) -> None:
    """Every set of so many columns, in a row of its own."""
    choices = list(itertools.combinations(range(columns), kept))
    weight = torch.zeros(len(choices), columns)
    for row, places in enumerate(choices):
        weight[row, list(places)] = torch.arange(1.0, kept + 1)
    codec = Sparse(kept / columns, FP32)
    payload = codec.encode(weight)
    assert stored(payload, kept / columns) == [list(places) for places in choices]
    assert torch.equal(codec.decode(payload), weight)


def test_ends_of_a_wide_row_survive() -> None:
    """Low bits of more than a byte."""
    for columns in (1 << 17, 1_000_003):
        weight = torch.zeros(3, columns)
        weight[0, 0], weight[1, -1], weight[2, columns // 3] = 1, 2, 3
        codec = Sparse(1e-6, FP32)
        assert torch.equal(codec.decode(codec.encode(weight)), weight)


def test_tiles_leave_no_trace() -> None:
    weight = weights(5, TILE // 2)
    codec = Sparse(0.01, FP32)
    payload = codec.encode(weight)
    decoded = codec.decode(payload)
    assert torch.equal(decoded, torch.cat([codec.decode(codec.encode(row[None])) for row in weight]))
    assert torch.equal(codec.rows(torch.tensor([4, 0]), codec.prepare(payload)), decoded[[4, 0]])


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("share", SHARES)
def test_predicted_bits_are_measured_bits(share: float, columns: int) -> None:
    for values in (FP16, INT8, Uniform(4, 32)):
        codec = Sparse(share, values)
        assert codec.encode(weights(3, columns)).bits == codec.estimate_bits((3, columns))


@pytest.mark.parametrize("share", [0.5, 0.4, 0.3, 0.25, 0.2, 0.1, 0.05, 0.01, 0.001])
def test_places_are_near_the_bits_that_the_choice_takes(share: float) -> None:
    columns = 1 << 16
    kept = round(share * columns)
    bits = Sparse(share, FP16).estimate_bits((1, columns))
    assert bits is not None
    choices = (math.lgamma(columns + 1) - math.lgamma(kept + 1) - math.lgamma(columns - kept + 1)) / math.log(2)
    assert 1 <= (bits - 16 * kept) / choices < 1.11


@pytest.mark.parametrize(("share", "bits"), [(0.5, 1.0), (0.25, 0.875), (0.05, 0.3094), (0.01, 0.0854)])
def test_rates_that_the_documentation_has(share: float, bits: float) -> None:
    columns = 1 << 16
    found = Sparse(share, FP16).estimate_bits((1, columns))
    assert found is not None
    assert found / columns - 16 * share == pytest.approx(bits, abs=2e-4)


def test_half_of_a_row_is_a_plain_map() -> None:
    weight = torch.tensor([[0.0, 3, 0, 2, 1, 0, 0, 4]])
    codec = Sparse(0.5, FP32)
    payload = codec.encode(weight)
    assert list(payload.tensors) == ["values_values", "high"]
    assert payload.tensors["high"].tolist() == [[0b10011010]]


def test_wanda_weighs_by_the_power_of_inputs() -> None:
    weight = weights(20, 60)
    power = torch.linspace(0.1, 9, 60).square()
    known = Statistics(hessian=torch.diag(power))
    codec = Sparse(0.1, FP32, "wanda")
    importance = (power / power.mean() + 0.01) / 1.01  # as the diagonal weighs columns everywhere
    decoded = codec.decode(codec.encode(weight, known))
    assert torch.equal(decoded, plain(weight, 0.1, importance))
    error, other = ((weight - matrix).square() @ power for matrix in (decoded, plain(weight, 0.1)))
    assert bool((error <= other * 1.01).all())


def test_of_inputs_that_are_never_active_the_largest_weights_are_kept() -> None:
    codec, weight = Sparse(0.1, FP32, "wanda"), weights(4, 40)
    decoded = codec.decode(codec.encode(weight, Statistics(hessian=torch.zeros(40, 40))))
    assert torch.equal(decoded, plain(weight, 0.1))


def test_rows_read_no_others() -> None:
    """Damage in one row is nothing to the others."""
    codec, weight = Sparse(0.25, INT8), weights(4, 64)
    payload = codec.encode(weight)
    high = payload.tensors["high"].clone()
    high[2] = 255
    broken = codec.prepare(dataclasses.replace(payload, tensors={**payload.tensors, "high": high}))
    chosen = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(codec.rows(chosen, broken), codec.decode(payload)[chosen])
    with pytest.raises(InvalidPayloadError, match="rising columns"):
        codec.rows(torch.tensor([0, 2]), broken)


def test_values_may_be_any_codec() -> None:
    weight = weights(9, 70)
    for values in (Residual(Uniform(4, 16), Uniform(2, 16)), Sparse(0.5, FP16), Vector(2, 16), Trellis(0.01, 1, False)):
        codec = Sparse(0.3, values)
        payload = codec.encode(weight)
        assert codec.decode(payload).shape == (9, 70)
        assert codec.estimate_bits((9, 70)) == (None if isinstance(values, Trellis) else payload.bits)
        assert (codec.decode(payload) != 0).sum(1).max() <= 21
    assert Sparse(0.3, NormalFloat(4, 64, "learned")).uses_curvature == NormalFloat(4, 64, "learned").uses_curvature


def test_learned_levels_are_weighed_by_the_rows() -> None:
    codec, weight = Sparse(0.25, NormalFloat(2, 16, "learned")), weights(20, 64)
    weight[:10] = weight[:10].sign() * weight[:10].square()
    curvature = Statistics(output_curvature=torch.linspace(0, 1, 20).square())
    plain_levels, weighed = (codec.encode(weight, known).tensors["values_levels"] for known in (None, curvature))
    assert not torch.equal(plain_levels, weighed)


@pytest.mark.parametrize("share", [0.05, 0.25])
def test_a_sum_leaves_less_with_it(share: float) -> None:
    weight = weights(64, 256)
    first = Vector(4, 64, weighting="magnitude")
    codec = Residual(first, Sparse(share, INT8))
    left = weight - first.decode(first.encode(weight))
    total = weight - codec.decode(codec.encode(weight))
    assert total.norm() < (left - plain(left, share)).norm() * 1.001
    x = weights(3, 256, seed=1)
    product = codec.matmul(x, codec.prepare(codec.encode(weight)))
    torch.testing.assert_close(product, x @ (weight - total).T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"share": 0.0}, "share must be"),
        ({"share": 0.51}, "share must be"),
        ({"share": math.nan}, "share must be"),
        ({"share": True}, "share must be"),
        ({"share": "5%"}, "share must be"),
        ({"values": 3}, "values must be a codec"),
        ({"values": Uniform(4, 32, rounding=Gptq())}, "cannot use the Hessian"),
        ({"values": Trellis(0.004)}, "cannot use the Hessian"),
        ({"importance": "sparsegpt"}, "importance must be one of"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        Sparse(**{"share": 0.1, "values": FP16, **change})
    assert caught.value.hint


def test_nesting_without_end_is_refused() -> None:
    config: dict[str, Any] = {"id": "dense/1", "dtype": "float16"}
    for _ in range(40):
        config = {"id": "sparse/1", "share": 0.5, "values": config}
    with pytest.raises(RecipeError, match="inside one another"):
        registry.from_json(config)


def test_statistics_that_do_not_serve() -> None:
    refuses_unfit_statistics(Sparse(0.1, FP16, "wanda"), weights(4, 40))


def refused(codec: Codec, payload: Payload, **changes: list[list[int]]) -> None:
    """Neither decoded nor looked up."""
    tensors = {**payload.tensors, **{name: torch.tensor(rows, dtype=torch.uint8) for name, rows in changes.items()}}
    broken = dataclasses.replace(payload, tensors=tensors)
    with pytest.raises(InvalidPayloadError, match="rising columns") as caught:
        codec.decode(broken)
    assert "damaged" in str(caught.value.hint)
    with pytest.raises(InvalidPayloadError, match="rising columns"):
        codec.rows(torch.tensor([len(payload.tensors["high"]) - 1]), codec.prepare(broken))


def test_places_that_are_none_are_refused() -> None:
    codec = Sparse(0.15, FP32)  # of 20 columns 3: a map of 3 + 17/4 bits, two low bits each
    payload = codec.encode(torch.ones(2, 20))
    whole = {name: payload.tensors[name].tolist() for name in ("high", "low")}
    assert whole == {"high": [[0b111], [0b111]], "low": [[0], [0]]}
    for high in (0, 0b11, 0b1111, 0b1111111, 0b10000011):  # fewer and more; the last bit is a spare one
        refused(codec, payload, high=[[0b111], [high]])
    for low in (0b000001, 0b001011, 0b011111):  # falling
        refused(codec, payload, low=[[0], [low]])
    refused(codec, payload, high=[[0b111], [0b1110000]], low=[[0], [0b10_00_00]])  # beyond the row
    last = torch.tensor([[0b111], [0b1110000]], dtype=torch.uint8), torch.tensor([[0], [0b01_01_01]], dtype=torch.uint8)
    changed = dataclasses.replace(payload, tensors={**payload.tensors, "high": last[0], "low": last[1]})
    assert codec.decode(changed).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 17], [1, 18], [1, 19]]


def test_any_bytes_decode_or_are_refused() -> None:
    generator, found = torch.Generator().manual_seed(0), [0, 0]
    for columns, share in itertools.product((1, 9, 40, 129), SHARES):
        codec = Sparse(share, INT8)
        payload = codec.encode(weights(1, columns))
        for _ in range(20):
            tensors = {
                name: torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=generator)
                if name in ("high", "low")
                else tensor
                for name, tensor in payload.tensors.items()
            }
            changed = dataclasses.replace(payload, tensors=tensors)
            try:
                decoded = codec.decode(changed)
            except InvalidPayloadError:
                found[1] += 1
                continue
            found[0] += 1
            assert int((decoded != 0).sum()) == max(1, round(share * columns))
    assert min(found) > 20


def test_a_worked_example() -> None:
    """As a stranger would decode it from the description of the format."""
    codec = Sparse(0.15, FP32)
    tensors = {
        "values_values": torch.tensor([[1.0, 2.0, 3.0]]),
        "high": torch.tensor([[0b10011]], dtype=torch.uint8),
        "low": torch.tensor([[0b01_11_10]], dtype=torch.uint8),
    }
    payload = Payload(codec.to_json(), (1, 20), torch.float32, tensors)
    # Zeros before each: 2, 3 and 2·4 + 1.
    assert codec.decode(payload).tolist() == [[0, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0]]
