"""Rotations against dense orthogonal matrices, what they are good for, and that they are the same everywhere."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Payload, Statistics
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated, rotate, rotate_back
from tenpak.codecs.rounding import Gptq
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError, InvalidPayloadError, RecipeError

INT4 = Uniform(4, 32)
SIZES = [1, 2, 3, 7, 33, 64, 96, 127, 128, 129, 211, 352, 768, 10007]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.02


def signs(seed: int, count: int) -> Tensor:
    """splitmix64 in Python's integers."""
    found, mask, state = [], (1 << 64) - 1, seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        found.append(-1.0 if (z ^ z >> 31) >> 63 else 1.0)
    return torch.tensor(found, dtype=torch.float64)


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def dense(n: int, seed: int) -> Tensor:
    """Q as the module's formula has it, FP64 ``[n, n]``."""
    size = 1 << (n.bit_length() - 1)
    s, eye = signs(seed, 2 * n), torch.eye(n, dtype=torch.float64)
    first, second = eye.clone(), eye.clone()
    first[:size, :size] = hadamard(size)
    second[n - size :, n - size :] = hadamard(size)
    q = first @ torch.diag(s[:n])
    return q if size == n else second @ torch.diag(s[n:]) @ q


@pytest.mark.parametrize("n", [n for n in SIZES if n < 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_formula(n: int, seed: int) -> None:
    q = dense(n, seed)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(5, n, generator=generator(1))
    torch.testing.assert_close(rotate(x, seed).double(), x.double() @ q.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate_back(x, seed).double(), x.double() @ q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_rotating_back_leaves_rounding_only(n: int) -> None:
    x = weights(300, n)
    for back in (rotate_back(rotate(x, 3), 3), rotate(rotate_back(x, 3), 3)):
        assert ((back - x).norm(dim=1) <= 1e-6 * x.norm(dim=1)).all()
    assert ((rotate(x, 3).norm(dim=1) / x.norm(dim=1) - 1).abs() < 1e-6).all()


def test_seeds_differ() -> None:
    x = weights(1, 96)
    assert not torch.equal(rotate(x, 0), rotate(x, 1))
    assert 400 < int((signs(0, 1000) == signs(1, 1000)).sum()) < 600
    assert 400 < int((signs(0, 1000) > 0).sum()) < 600


def test_the_same_bits_everywhere() -> None:
    """Integers of a scramble, rotated: sums and differences of FP32 in a fixed order."""
    index = torch.arange(3 * 211)
    x = (((index * 7919 + index * index * 31) % 1001) - 500).float().view(3, 211) / 8192
    digests = [hashlib.sha256(turn(x, 5).numpy().tobytes()).hexdigest()[:16] for turn in (rotate, rotate_back)]
    assert digests == ["8c3fc50f876c377a", "5b3b68adbf3a1b50"]
    alone = torch.cat([rotate(row[None], 5) for row in x])
    assert torch.equal(rotate(x, 5), alone)


@pytest.mark.parametrize("n", [7, 33, 96, 211, 768])
def test_codec_is_the_inner_codec_of_the_rotated_weight(n: int) -> None:
    weight, codec = weights(12, n), Rotated(INT4, 4)
    payload = codec.encode(weight)
    inner = INT4.encode(rotate(weight, 4))
    assert list(payload.tensors) == list(inner.tensors)
    assert all(torch.equal(payload.tensors[name], tensor) for name, tensor in inner.tensors.items())
    torch.testing.assert_close(
        codec.decode(payload).double(), INT4.decode(inner).double() @ dense(n, 4), rtol=0, atol=1e-6
    )
    assert codec.fields((12, n)) == INT4.fields((12, n))
    assert not codec.needs_statistics
    assert Rotated(Uniform(4, 32, rounding=Gptq())).needs_statistics


@pytest.mark.parametrize("n", [48, 33])
def test_the_inner_codec_sees_the_statistics_of_the_rotated_inputs(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(500, n, generator=generator(1)) * torch.linspace(0, 5, n) + 1
    other = x + torch.randn(x.shape, generator=generator(2))

    def gram(a: Tensor, b: Tensor) -> Tensor:
        return a.double().T @ b.double() / len(a)

    curvature = torch.rand(10, generator=generator(3))
    known = Statistics(
        count=500, hessian=gram(x, x).float(), mean=x.double().mean(0).float(), mean_abs=x.abs().mean(0),
        cross=gram(x, other).float(), output_curvature=curvature,
    )  # fmt: skip
    seen: list[Statistics] = []
    encode = Uniform.encode

    def spy(self: Uniform, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        assert statistics is not None
        seen.append(statistics)
        return encode(self, weight, statistics)

    monkeypatch.setattr(Uniform, "encode", spy)
    Rotated(INT4, 6).encode(weights(10, n), known)
    turned, other_turned = x.double() @ dense(n, 6).T, other.double() @ dense(n, 6).T
    found = seen[0]
    scale = float(gram(x, x).norm()) / n
    for matrix, expected in ((found.hessian, gram(turned, turned)), (found.cross, gram(turned, other_turned))):
        assert matrix is not None
        torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-5 * scale)
    assert found.mean is not None
    torch.testing.assert_close(found.mean.double(), turned.mean(0), rtol=1e-5, atol=1e-5)
    assert found.hessian is not None
    assert torch.equal(found.hessian, found.hessian.T)
    assert found.mean_abs is None
    assert found.count == 500
    assert found.output_curvature is curvature


def test_the_cost_of_a_looked_up_row_is_part_of_the_rotated_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Statistics(
        hessian=torch.diag(torch.rand(24, generator=generator(1))), output_curvature=torch.linspace(1, 2, 10),
        token_frequency=torch.linspace(0, 1, 10), input_curvature=torch.linspace(2, 1, 24),
    )  # fmt: skip
    seen: list[Statistics | None] = []
    encode = Uniform.encode
    monkeypatch.setattr(
        Uniform, "encode", lambda self, weight, statistics=None: seen.append(statistics) or encode(self, weight)
    )
    Rotated(INT4).encode(weights(10, 24), known)
    found, q = seen[0], dense(24, 0)
    assert found is not None
    assert found.metric is not None
    assert found.row_weight is not None
    assert known.metric is not None
    assert known.row_weight is not None
    torch.testing.assert_close(found.metric.double(), q @ known.metric.double() @ q.T, rtol=0, atol=1e-5)
    assert torch.equal(found.row_weight, known.row_weight)


@pytest.mark.parametrize("n", [96, 352, 211])
@pytest.mark.parametrize("inner", [Uniform(4, 128), Uniform(3, 32), NormalFloat(4, 64)], ids=["int4", "int3", "nf4"])
def test_a_rotation_helps_a_weight_with_outlier_columns(n: int, inner: Uniform | NormalFloat) -> None:
    weight = weights(32, n)
    weight[:, ::37] *= 12

    def error(codec: Uniform | NormalFloat | Rotated) -> float:
        return float((codec.decode(codec.encode(weight)) - weight).norm())

    assert error(Rotated(inner)) < 0.8 * error(inner)


def test_gptq_in_rotated_coordinates_lowers_the_loss_in_the_original_ones() -> None:
    weight = weights(32, 96)
    x = torch.randn(1000, 16, generator=generator(1)) @ torch.randn(16, 96, generator=generator(2))
    x += torch.randn(1000, 96, generator=generator(3))
    known = Statistics(hessian=x.T @ x / 1000)

    def loss(codec: Rotated) -> float:
        error = weight - codec.decode(codec.encode(weight, known))
        return float(((error @ known.hessian) * error).sum())

    assert loss(Rotated(Uniform(4, 32, rounding=Gptq()))) < 0.7 * loss(Rotated(Uniform(4, 32)))


def test_products_take_gradients_and_every_dtype() -> None:
    codec = Rotated(Uniform(8, 32))
    payload = codec.encode(weights(6, 33))
    prepared = codec.prepare(payload)
    x = torch.randn(2, 3, 33, generator=generator(1), requires_grad=True)
    codec.matmul(x, prepared).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, codec.decode(payload).sum(0).expand(2, 3, 33), rtol=1e-4, atol=1e-5)
    assert codec.matmul(x.half(), prepared).dtype == torch.float16
    assert codec.matmul(x[:0], prepared).shape == (0, 3, 6)


def test_nesting_keeps_names_apart() -> None:
    codec = Rotated(ChannelScaled(Rotated(ChannelScaled(INT4, 0.5), 1), 0.5), 2)
    known = Statistics(mean_abs=torch.linspace(0, 1, 33), hessian=torch.eye(33))
    sum_of = Residual(codec, Rotated(Uniform(2, 16)))
    payload = sum_of.encode(weights(6, 33), known)
    assert len(set(payload.tensors)) == 8
    assert sum_of.estimate_bits((6, 33)) == payload.bits
    again = registry.from_json(sum_of.to_json())
    assert torch.equal(again.decode(payload), sum_of.decode(payload))
    assert float((sum_of.decode(payload) - weights(6, 33)).norm() / weights(6, 33).norm()) < 0.1


def test_decoding_leaves_the_payload_alone() -> None:
    codec = Rotated(Dense("float32"))
    payload = codec.encode(weights(4, 32))
    before = payload.tensors["values"].clone()
    codec.decode(payload)
    codec.rows(torch.tensor(0), codec.prepare(payload))
    codec.matmul(torch.ones(32), codec.prepare(payload))
    assert torch.equal(payload.tensors["values"], before)


def test_what_is_refused() -> None:
    with pytest.raises(CodecError, match="the Hessian is"):
        Rotated(INT4).encode(weights(6, 40), Statistics(hessian=torch.eye(41)))
    for bad in (-1, 2**32, 1.5, True, None):
        with pytest.raises(RecipeError, match="seed must be an integer"):
            Rotated(INT4, bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="inner must be a codec"):
        registry.from_json({"id": "rotated/1", "inner": None})
    config = INT4.to_json()
    for _ in range(16):
        config = {"id": "rotated/1", "inner": config, "seed": 0}
    with pytest.raises(RecipeError, match="at most 16 codecs"):
        registry.from_json(config)
    payload = Rotated(INT4).encode(weights(6, 40))
    # Refused by the inner codec's check, before anything of the claimed size is made.
    with pytest.raises(InvalidPayloadError):
        Rotated(INT4).decode(dataclasses.replace(payload, shape=(6, 1 << 50)))
