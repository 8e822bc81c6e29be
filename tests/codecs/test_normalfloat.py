"""NormalFloat tables derived again, and learned levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from tenpak.codecs.base import Statistics
from tenpak.codecs.normalfloat import NORMAL_LEVELS, NormalFloat
from tenpak.errors import CodecError, RecipeError
from tenpak.kernels import unpack


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_normal_quantiles(bits: int) -> None:
    k = 2**bits
    delta = 1 - (1 / (2 * k) + 1 / (2 * k - 2)) / 2
    above = norm.ppf(np.linspace(delta, 0.5, k // 2 + 1)[:-1])
    below = -norm.ppf(np.linspace(delta, 0.5, k // 2)[:-1])
    expected = np.sort(np.concatenate((below, [0.0], above))) / norm.ppf(delta)
    # The constants are the shortest decimals of FP32 values.
    assert np.array_equal(np.float32(NORMAL_LEVELS[bits]), np.float32(expected))
    assert len(NORMAL_LEVELS[bits]) == k


def test_nf4_is_the_published_table() -> None:
    """Appendix E of the QLoRA paper, to the digits printed there."""
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert NORMAL_LEVELS[4] == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("levels", ["normal", "learned"])
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 33), (4, None)])
def test_decode_is_the_formula_and_codes_are_nearest(bits: int, group: int | None, levels: str) -> None:
    weight = weights(5, 100)
    codec = NormalFloat(bits, group, levels)
    payload = codec.encode(weight)
    codes = unpack(payload.tensors["codes"], bits, 100).long()
    table = payload.tensors["levels"].float() if levels == "learned" else torch.tensor(NORMAL_LEVELS[bits])
    index = torch.arange(100) // (group or 100)
    scale = payload.tensors["scales"][:, index].float()
    decoded = codec.decode(payload)
    assert torch.equal(decoded, scale * table[codes])
    best = (weight[..., None] - scale[..., None] * table).abs().amin(-1)
    assert ((decoded - weight).abs() <= best * (1 + 1e-4) + 1e-8).all()
    assert (weight.abs() <= scale).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, None])
def test_learned_levels_lower_the_error(bits: int, group: int | None) -> None:
    weight = weights(64, 256) + 0.01

    def error(levels: str) -> float:
        codec = NormalFloat(bits, group, levels)
        return float((codec.decode(codec.encode(weight)) - weight).square().sum())

    assert error("learned") < 0.97 * error("normal")


def test_learned_levels_are_those_of_lloyd_and_max() -> None:
    """A large row of uniform weights: the optimal 4 levels are -0.75, -0.25, 0.25, 0.75."""
    weight = torch.linspace(-1, 1, 100_001).view(1, -1)
    levels = NormalFloat(2, None, "learned").encode(weight).tensors["levels"].float()
    assert levels.tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75], abs=2e-3)


def test_learned_levels_keep_weights_that_take_few_values() -> None:
    values = torch.tensor([-1.0, -0.5, 0.125, 0.75])
    weight = values[torch.randint(0, 4, (20, 64), generator=torch.Generator().manual_seed(0))]
    weight[:, 0] = -1.0
    codec = NormalFloat(2, None, "learned")
    assert torch.equal(codec.decode(codec.encode(weight)), weight)


def test_learned_levels_heed_statistics() -> None:
    weight = weights(64, 256)
    weight[:, ::2] = weight[:, ::2] * 0.2
    codec = NormalFloat(2, None, "learned")
    diagonal = torch.ones(256)
    diagonal[::2] = 100.0
    aware = codec.decode(codec.encode(weight, Statistics(hessian=torch.diag(diagonal)))) - weight
    blind = codec.decode(codec.encode(weight)) - weight
    assert aware[:, ::2].square().sum() < 0.7 * blind[:, ::2].square().sum()
    curvature = torch.zeros(64)
    curvature[5] = 1.0
    by_row = codec.decode(codec.encode(weight, Statistics(output_curvature=curvature))) - weight
    assert by_row[5].square().sum() < blind[5].square().sum()
    with pytest.raises(CodecError, match="output curvature"):
        codec.encode(weight, Statistics(output_curvature=torch.ones(63)))


def test_beyond_fp16_is_refused() -> None:
    with pytest.raises(CodecError, match="FP16"):
        NormalFloat(4).encode(torch.full((2, 8), 7e4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits must be an integer from 2 to 4, got 5"),
        ({"bits": 4, "group": 4}, "group must be an integer from 8 to 256, or null, got 4"),
        ({"bits": 4, "levels": "learnt"}, "levels must be one of normal, learned, got 'learnt'"),
        ({"bits": 4, "levels": ["normal"]}, "levels must"),
    ],
)
def test_configuration_is_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NormalFloat(**fields)  # type: ignore[arg-type]
