"""Sums of codecs, and weights kept in a floating-point dtype."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tenpak.codecs import registry
from tenpak.codecs.dense import Dense
from tenpak.codecs.residual import Residual
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError, InvalidPayloadError, RecipeError

WEIGHT = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)) * 0.02


def test_residual_is_the_sum_of_its_stages() -> None:
    codec = Residual(Uniform(4, 16), Uniform(2, 16))
    payload = codec.encode(WEIGHT)
    base = codec.base.decode(codec.base.encode(WEIGHT))
    rest = codec.rest.decode(codec.rest.encode(WEIGHT - base))
    assert torch.equal(codec.decode(payload), base + rest)
    assert (codec.decode(payload) - WEIGHT).norm() < 0.5 * (base - WEIGHT).norm()


def test_stages_keep_their_names_and_wide_tensors_come_first() -> None:
    codec = Residual(Uniform(4, 16), Residual(Uniform(3, None, True), Dense("bfloat16")))
    assert list(codec.encode(WEIGHT).tensors) == [
        "base_scales",
        "base_offsets",
        "rest_base_scales",
        "rest_rest_values",
        "base_codes",
        "rest_base_codes",
    ]
    assert codec.stages == 3


def test_dense_rest_leaves_its_rounding_only() -> None:
    codec = Residual(Uniform(4, 32), Dense("float32"))
    assert torch.allclose(codec.decode(codec.encode(WEIGHT)), WEIGHT, rtol=0, atol=2**-28)


def test_a_tensor_of_no_stage_is_refused() -> None:
    codec = Residual(Uniform(4, 16), Uniform(2, 16))
    payload = codec.encode(WEIGHT)
    for name in ("codes", "middle_codes", "base_", "base_rest_codes"):
        tensors = {**payload.tensors, name: torch.zeros(1)}
        with pytest.raises(InvalidPayloadError):
            codec.decode(dataclasses.replace(payload, tensors=tensors))


def test_stages_must_be_codecs() -> None:
    with pytest.raises(RecipeError, match="rest must be a codec, got 4"):
        Residual(Uniform(4), 4)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="base must be a codec"):
        registry.from_json({"id": "residual/1", "base": "uniform/1", "rest": Uniform(4).to_json()})


def test_endless_nesting_is_refused() -> None:
    config = Uniform(2).to_json()
    for _ in range(16):
        config = {"id": "residual/1", "base": Uniform(2).to_json(), "rest": config}
    with pytest.raises(RecipeError, match="at most 16 stages"):
        registry.from_json(config)
    for _ in range(3000):
        config = {"id": "residual/1", "base": Uniform(2).to_json(), "rest": config}
    with pytest.raises(RecipeError, match="nests too deeply"):
        registry.from_json(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_is_conversion(dtype: str) -> None:
    codec = Dense(dtype)
    payload = codec.encode(WEIGHT)
    assert torch.equal(codec.decode(payload), WEIGHT.to(getattr(torch, dtype)).float())


def test_dense_refuses_what_its_dtype_cannot_hold() -> None:
    with pytest.raises(CodecError, match="float16"):
        Dense("float16").encode(torch.tensor([[7e4]]))
    with pytest.raises(CodecError, match="bfloat16"):
        Dense("bfloat16").encode(torch.tensor([[3.4e38]]))
    with pytest.raises(RecipeError, match="one of float32, bfloat16, float16, got 'source'"):
        Dense("source")


def test_encoding_leaves_the_weight_alone() -> None:
    """A dense first stage shares the weight's memory."""
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    codec = Residual(Dense("float32"), Uniform(2, 8))
    codec.encode(weight)
    assert torch.equal(weight, before)
