"""2:4 sparsity against a plain search over all masks, what compensation promises, and what a payload may not say."""

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
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.residual import Residual
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.rounding.pruning import PAIRS
from tenpak.codecs.sparse24 import Sparse24
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import InvalidPayloadError, RecipeError, SingularHessianError

FP32, FP16, INT4 = Dense("float32"), Dense("float16"), Uniform(4, 32)
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 67, 68, 69, 71, 72, 73, 76, 136, 137, 300)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def statistics(columns: int, **more: Tensor) -> Statistics:
    """Correlated inputs, of which half are mixtures of a few."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(2000, columns // 4 + 1, generator=generator)
    x = mixed @ torch.randn(columns // 4 + 1, columns, generator=generator)
    x = (x + torch.randn(2000, columns, generator=generator)).double()
    return Statistics(hessian=(x.T @ x / len(x)).float(), **more)


def loss(weight: Tensor, codec: Codec, known: Statistics) -> float:
    error = (weight - codec.decode(codec.encode(weight, known))).double()
    assert known.hessian is not None
    return float(((error @ known.hessian.double()) * error).sum())


def kept(decoded: Tensor) -> Tensor:
    """How many weights of each block of four are not zero."""
    columns = decoded.shape[1]
    blocks = torch.nn.functional.pad(decoded, (0, -columns % 4)).view(len(decoded), -1, 4)
    return (blocks != 0).sum(-1)


def test_pairs_are_numbered_as_documented() -> None:
    assert {j * (j - 1) // 2 + i: (i, j) for i, j in itertools.combinations(range(4), 2)} == dict(enumerate(PAIRS))


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_two_largest_of_four_are_kept_exactly(columns: int) -> None:
    weight = weights(5, columns)
    decoded = Sparse24(FP32).decode(Sparse24(FP32).encode(weight))
    for row, block in itertools.product(range(5), range(-(-columns // 4))):
        four = weight[row, 4 * block : 4 * block + 4]
        largest = sorted(range(len(four)), key=lambda i: -abs(float(four[i])))[:2]
        expected = torch.tensor([float(four[i]) if i in largest else 0.0 for i in range(len(four))])
        assert torch.equal(decoded[row, 4 * block : 4 * block + 4], expected)


def test_of_equal_weights_the_first_are_kept() -> None:
    decoded = Sparse24(FP32).decode(Sparse24(FP32).encode(torch.ones(1, 7)))
    assert decoded.tolist() == [[1, 1, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("columns", WIDTHS)
def test_pairs_take_the_bits_that_they_should(columns: int) -> None:
    fields = Sparse24(FP32).fields((3, columns))
    assert fields is not None
    size = {field.name: field.shape for field in fields}["pairs"][1]
    blocks = -(-columns // 4)
    assert math.log2(6) * blocks <= 8 * size <= math.log2(6) * blocks * 1.002 + 12


def test_rate_of_a_wide_row() -> None:
    bits = Sparse24(FP16).estimate_bits((1, 1 << 16))
    assert bits is not None
    assert bits / (1 << 16) == pytest.approx(8 + math.log2(6) / 4, rel=2e-4)


@pytest.mark.parametrize("columns", WIDTHS)
def test_any_pairs_survive(columns: int) -> None:
    """Weights made so that every pair is the one asked for."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.rand(40, columns, generator=generator) + 0.1
    weight *= torch.rand(40, columns, generator=generator) < 0.5
    decoded = Sparse24(FP32).decode(Sparse24(FP32).encode(weight))
    fits = kept(weight) <= 2
    whole = torch.repeat_interleave(fits, 4, 1)[:, :columns]
    assert torch.equal(decoded[whole], weight[whole])


def test_wanda_weighs_by_the_power_of_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    known = Statistics(hessian=torch.diag(torch.tensor([100.0, 100.0, 1.0, 1.0])))
    codec = Sparse24(FP32, "wanda")
    assert codec.decode(codec.encode(weight, known)).tolist() == [[1, 2, 0, 0]]


def best(weight: Tensor, hessian: Tensor) -> float:
    """The least loss of one row over all masks, each with its best values, in FP64."""
    columns, found = len(weight), math.inf
    for pairs in itertools.product(PAIRS, repeat=columns // 4):
        keep = [4 * block + place for block, pair in enumerate(pairs) for place in pair]
        drop = [column for column in range(columns) if column not in keep]
        cross = hessian[keep][:, drop]
        left = hessian[drop][:, drop] - cross.T @ torch.linalg.solve(hessian[keep][:, keep], cross)
        found = min(found, float(weight[drop] @ left @ weight[drop]))
    return found


def test_one_block_is_settled_exactly() -> None:
    known, weight = statistics(4), weights(30, 4)
    assert known.hessian is not None
    damped = known.hessian.double() + 1e-6 * known.hessian.double().diagonal().mean() * torch.eye(4)
    least = sum(best(row, damped) for row in weight.double())
    assert loss(weight, Sparse24(FP32, "sparsegpt", 1e-6, 0), known) == pytest.approx(least, rel=1e-3)


def test_sweeps_come_near_the_best_of_all_masks() -> None:
    known, weight = statistics(12), weights(20, 12)
    assert known.hessian is not None
    damped = known.hessian.double() + 1e-6 * known.hessian.double().diagonal().mean() * torch.eye(12)
    least = sum(best(row, damped) for row in weight.double())
    found = [loss(weight, Sparse24(FP32, "sparsegpt", 1e-6, sweeps), known) for sweeps in (0, 30)]
    assert least * 0.999 < found[1] < 1.25 * least
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("values", [FP16, INT4, Uniform(8, None, True), Uniform(3, 9), NormalFloat(4, 64, "learned")])
def test_compensation_saves_most_of_the_loss(values: Codec) -> None:
    known, weight = statistics(96), weights(64, 96)
    by = {
        importance: loss(weight, Sparse24(values, importance), known)
        for importance in ("magnitude", "wanda", "sparsegpt")
    }
    assert by["sparsegpt"] < 0.25 * by["wanda"]
    assert by["wanda"] < by["magnitude"]


@pytest.mark.parametrize("values", [FP32, INT4, Uniform(4, 9), Uniform(4, None)])
@pytest.mark.parametrize("columns", [96, 97, 98, 99])
def test_no_sweep_increases_the_loss(values: Codec, columns: int) -> None:
    known, weight = statistics(columns), weights(20, columns)
    damping = 1e-4
    assert known.hessian is not None
    damped = known.hessian + damping * known.hessian.diagonal().mean() * torch.eye(columns)
    known, before = Statistics(hessian=known.hessian), math.inf
    for sweeps in (0, 1, 2, 4, 8):
        codec = Sparse24(values, "sparsegpt", damping, sweeps)
        error = (weight - codec.decode(codec.encode(weight, known))).double()
        now = float(((error @ damped.double()) * error).sum())
        assert now <= before * (1 + 1e-5)
        before = now


def test_rounding_takes_part_in_the_feedback() -> None:
    """Values rounded one by one as they are chosen lose less than those of the exact optimum rounded to nearest."""
    known, weight = statistics(96), weights(64, 96)
    exact = Sparse24(FP32, "sparsegpt", 0.01, 8)
    after = Sparse24(Uniform(2, 16))
    chosen = exact.decode(exact.encode(weight, known))
    error = (weight - after.decode(after.encode(chosen))).double()
    assert known.hessian is not None
    nearest = float(((error @ known.hessian.double()) * error).sum())
    assert loss(weight, Sparse24(Uniform(2, 16), "sparsegpt", 0.01, 8), known) < 0.6 * nearest


def test_without_correlations_nothing_is_compensated() -> None:
    weight = weights(9, 70)
    plain = Sparse24(FP32, "magnitude")
    codec = Sparse24(FP32, "sparsegpt", sweeps=2)
    decoded = codec.decode(codec.encode(weight, Statistics(hessian=torch.eye(70))))
    torch.testing.assert_close(decoded, plain.decode(plain.encode(weight)))


def test_inputs_that_were_never_active() -> None:
    known, weight = statistics(40), weights(9, 40)
    assert known.hessian is not None
    hessian = known.hessian.clone()
    hessian[8:13], hessian[:, 8:13] = 0, 0
    for values in (FP16, INT4):
        codec = Sparse24(values, "sparsegpt")
        decoded = codec.decode(codec.encode(weight, Statistics(hessian=hessian)))
        assert decoded.isfinite().all()
        zero = codec.decode(codec.encode(weight, Statistics(hessian=torch.zeros(40, 40))))
        assert (zero - weight).norm() < 0.45 * weight.norm()


def test_learned_levels_are_weighed_by_the_rows() -> None:
    values = NormalFloat(2, 16, "learned")
    curvature = torch.linspace(0, 1, 20).square()
    weight = weights(20, 64)
    weight[:10] = weight[:10].sign() * weight[:10].square()
    plain, weighed = statistics(64), statistics(64, output_curvature=curvature)
    codec = Sparse24(values, "sparsegpt")
    first, second = codec.encode(weight, plain), codec.encode(weight, weighed)
    assert not torch.equal(first.tensors["values_levels"], second.tensors["values_levels"])


def test_values_may_be_any_codec() -> None:
    weight = weights(9, 70)
    for values in (Residual(INT4, Uniform(2, 16)), Sparse24(FP16), Trellis(0.004, calibrated=False)):
        codec = Sparse24(values)
        payload = codec.encode(weight)
        assert codec.decode(payload).shape == (9, 70)
        estimate = codec.estimate_bits((9, 70))
        assert estimate == (None if isinstance(values, Trellis) else payload.bits)
        assert kept(codec.decode(payload)).max() <= 2
    assert Sparse24(NormalFloat(4, 64, "learned")).uses_curvature == NormalFloat(4, 64, "learned").uses_curvature


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"values": 3}, "values must be a codec"),
        ({"values": Uniform(4, 32, rounding=Gptq())}, "cannot use the Hessian"),
        ({"values": Trellis(0.004)}, "cannot use the Hessian"),
        ({"importance": "size"}, "importance must be one of"),
        ({"damping": 0.0}, "damping must be"),
        ({"damping": True}, "damping must be"),
        ({"sweeps": -1}, "sweeps must be"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Sparse24(**{"values": FP16, **change})


def test_nesting_without_end_is_refused() -> None:
    config: dict[str, Any] = {"id": "dense/1", "dtype": "float16"}
    for _ in range(40):
        config = {"id": "sparse24/1", "values": config}
    with pytest.raises(RecipeError, match="inside one another"):
        registry.from_json(config)


@pytest.mark.parametrize("importance", ["wanda", "sparsegpt"])
def test_statistics_that_do_not_serve(importance: str) -> None:
    codec, weight = Sparse24(FP16, importance), weights(4, 40)
    refuses_unfit_statistics(codec, weight)
    if importance == "sparsegpt":
        with pytest.raises(SingularHessianError):
            codec.encode(weight, Statistics(hessian=torch.ones(40, 40) - 10 * torch.eye(40).flip(0)))


def test_pairs_beyond_the_row_are_refused() -> None:
    for columns, allowed in ((1, 1), (2, 1), (3, 3), (4, 6), (5, 1), (7, 3)):
        codec = Sparse24(FP16)
        payload = codec.encode(torch.zeros(2, columns))
        place = 6 ** (-(-columns // 4) - 1)
        for pair in range(8):
            number = pair * place
            stored = list(number.to_bytes(payload.tensors["pairs"].shape[1], "little"))
            changed = torch.tensor([[0] * len(stored), stored], dtype=torch.uint8)
            broken = dataclasses.replace(payload, tensors={**payload.tensors, "pairs": changed})
            if pair < allowed:
                codec.decode(broken)
                continue
            with pytest.raises(InvalidPayloadError, match="places that a row"):
                codec.decode(broken)
            with pytest.raises(InvalidPayloadError, match="places that a row"):
                codec.rows(torch.tensor([1]), codec.prepare(broken))


def test_words_that_are_no_digits_are_refused() -> None:
    codec = Sparse24(FP16)
    payload = codec.encode(torch.zeros(1, 4 * 17))
    broken = torch.full_like(payload.tensors["pairs"], 255)
    with pytest.raises(InvalidPayloadError):
        codec.decode(dataclasses.replace(payload, tensors={**payload.tensors, "pairs": broken}))


def test_a_worked_example() -> None:
    """As a stranger would decode it from the description of the format."""
    codec = Sparse24(FP32)
    pairs = torch.tensor([[5 + 6 * 2 + 36 * 0]], dtype=torch.uint8)
    tensors = {"values_values": torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), "pairs": pairs}
    payload = Payload(codec.to_json(), (1, 9), torch.float32, tensors)
    assert codec.decode(payload).tolist() == [[0, 0, 1, 2, 0, 3, 4, 0, 5]]
