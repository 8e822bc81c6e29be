"""GPTQ against a textbook implementation, what it must reach, what it refuses, and that threads leave no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Codec, Payload, Statistics
from tenpak.codecs.dense import Dense
from tenpak.codecs.normalfloat import NORMAL_LEVELS, NormalFloat
from tenpak.codecs.residual import Residual
from tenpak.codecs.rounding import Gptq, Nearest
from tenpak.codecs.rounding.feedback import feedback
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError, MissingStatisticsError, RecipeError, SingularHessianError
from tenpak.kernels import pack, unpack

GPTQ = Gptq()


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def hessian(columns: int, condition: float, seed: int = 1) -> Tensor:
    """A random Hessian of this condition number, FP32 ``[in, in]``."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -float(np.log10(condition)), columns, dtype=torch.float64)
    product = (basis * spectrum) @ basis.T
    return ((product + product.T) / 2).float()


def rows_loss(weight: Tensor, payload: Payload, matrix: Tensor) -> Tensor:
    """The diagonal of E H Eᵀ, FP64 ``[out]``."""
    error = weight.double() - registry.from_json(payload.codec).decode(payload)
    return ((error @ matrix.double()) * error).sum(1)


def loss(weight: Tensor, payload: Payload, matrix: Tensor) -> float:
    """tr(E H Eᵀ)."""
    return float(rows_loss(weight, payload, matrix).sum())


def with_gptq(codec: Uniform | NormalFloat, rounding: Gptq) -> Uniform | NormalFloat:
    return replace(codec, rounding=rounding)


def same_bytes(a: Payload, b: Payload) -> bool:
    return all(
        torch.equal(tensor.view(torch.uint8), b.tensors[name].view(torch.uint8)) for name, tensor in a.tensors.items()
    )


def codes_of(payload: Payload) -> NDArray[np.uint8]:
    return unpack(payload.tensors["codes"], payload.codec["bits"], payload.shape[1]).numpy()


# The reference: GPTQ as in the paper's algorithm, without blocks. Columns one by one, in FP64, with the Cholesky factor
# of the inverse; after each column all the later ones are updated. Only the parameters, which are stored in FP16, come
# from the codec: fitted (to nearest) to the group's updated weights.


def reference(weight: Tensor, matrix: Tensor, codec: Uniform | NormalFloat, damping: float) -> NDArray[np.uint8]:
    rows, columns = weight.shape
    size = codec.group or columns
    damped = matrix.double().numpy() + damping * float(matrix.double().diagonal().mean()) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work = weight.double().numpy().copy()
    codes = np.zeros((rows, columns), np.uint8)
    fit = replace(codec, rounding=Nearest())
    for k in range(columns):
        if k % size == 0:
            group = fit.encode(torch.from_numpy(work[:, k : k + size]).float())
            values = {name: tensor[:, 0].double().numpy() for name, tensor in group.tensors.items() if name != "codes"}
            scale = values["scales"]
            if isinstance(codec, NormalFloat):
                levels = scale[:, None] * np.array(NORMAL_LEVELS[codec.bits])
            else:
                count = np.arange(2**codec.bits)
                shift = -scale * 2 ** (codec.bits - 1) if codec.symmetric else values["offsets"]
                levels = shift[:, None] + scale[:, None] * count
        codes[:, k] = np.abs(levels - work[:, k : k + 1]).argmin(1)
        error = (work[:, k] - np.take_along_axis(levels, codes[:, k : k + 1].astype(int), 1)[:, 0]) / upper[k, k]
        work[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
    return codes


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (Uniform(4, 32), (20, 96)),
        (Uniform(3, 32, symmetric=True), (20, 100)),
        (Uniform(4, 9), (20, 300)),
        (Uniform(2, 256), (12, 300)),
        (Uniform(4, 128), (30, 400)),
        (Uniform(4, None), (30, 200)),
        (Uniform(4, 200), (300, 200)),
        (NormalFloat(4, 64), (20, 200)),
        (NormalFloat(3, None), (20, 150)),
    ],
)
@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_codes_are_the_textbook_s(codec: Uniform | NormalFloat, shape: tuple[int, int], condition: float) -> None:
    weight, matrix = weights(*shape), hessian(shape[1], condition)
    payload = replace(codec, rounding=GPTQ).encode(weight, Statistics(hessian=matrix))
    expected = reference(weight, matrix, codec, 0.01)
    # FP32 moves a target by about 1e-6 of a step, so one code in some 1e5 lies nearer to a tie than that; from there on
    # its row goes another way, equally good. Of these rows one may.
    same = torch.from_numpy((codes_of(payload) == expected).all(1))
    assert (~same).sum() <= 1
    other = replace(payload, tensors={**payload.tensors, "codes": pack(torch.from_numpy(expected), codec.bits)})
    ours, theirs = (rows_loss(weight, p, matrix)[same].sum() for p in (payload, other))
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    assert theirs > 0


# What it must reach --------------------------------------------------------------------------------------------------

CODECS = [
    Uniform(4, 32),
    Uniform(3, 128),
    Uniform(2, 9, symmetric=True),
    Uniform(4, None),
    Uniform(3, 16, search=True),
    NormalFloat(4, 64),
    NormalFloat(3, 24, "learned"),
]
ROUNDINGS = [Gptq(), Gptq(order="activation"), Gptq(sweeps=2), Gptq(0.1, "activation", 1)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("condition", "shape"), [(3.0, (33, 130)), (1e3, (9, 257)), (1e8, (260, 40))])
def test_loss_is_less_than_that_of_nearest(
    codec: Uniform | NormalFloat, rounding: Gptq, condition: float, shape: tuple[int, int]
) -> None:
    weight, statistics = weights(*shape), Statistics(hessian=hessian(shape[1], condition))
    assert statistics.hessian is not None
    nearest = loss(weight, codec.encode(weight, statistics), statistics.hessian)
    assert loss(weight, with_gptq(codec, rounding).encode(weight, statistics), statistics.hessian) < nearest


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_sweeps_lower_the_loss(order: str) -> None:
    """Coordinate descent on the damped loss falls from sweep to sweep, and to less than where it started."""
    weight, matrix = weights(64, 200), hessian(200, 1e4)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(200)
    payloads = [
        Uniform(3, 32, rounding=Gptq(0.01, order, sweeps)).encode(weight, Statistics(hessian=matrix))
        for sweeps in range(5)
    ]
    losses = torch.stack([rows_loss(weight, payload, damped) for payload in payloads])
    # On every row, up to FP32's rounding of what each code aims at.
    assert (losses[1:] <= losses[:-1] * (1 + 1e-6)).all()
    assert losses[1].sum() < 0.95 * losses[0].sum()
    assert all(torch.equal(payload.tensors["scales"], payloads[0].tensors["scales"]) for payload in payloads)


def test_activation_order_keeps_the_parameters_of_nearest() -> None:
    weight, matrix = weights(40, 200), hessian(200, 100)
    nearest = Uniform(4, 32).encode(weight)
    ordered = Uniform(4, 32, rounding=Gptq(order="activation")).encode(weight, Statistics(hessian=matrix))
    for name in ("scales", "offsets"):
        assert torch.equal(nearest.tensors[name], ordered.tensors[name])
    first = int(matrix.diagonal().argmax())  # it comes before any error is made
    assert np.array_equal(codes_of(nearest)[:, first], codes_of(ordered)[:, first])
    assert not np.array_equal(codes_of(nearest), codes_of(ordered))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("power", [3.7e-12, 0.0])
def test_without_correlation_it_is_nearest(codec: Uniform | NormalFloat, rounding: Gptq, power: float) -> None:
    weight, statistics = weights(260, 75), Statistics(hessian=torch.eye(75) * power)
    assert same_bytes(codec.encode(weight, statistics), with_gptq(codec, rounding).encode(weight, statistics))


def test_residual_stages_share_the_hessian() -> None:
    weight, statistics = weights(40, 96), Statistics(hessian=hessian(96, 1e3))
    assert statistics.hessian is not None
    plain, gptq = Uniform(3, 32), Uniform(3, 32, rounding=GPTQ)
    losses = [
        loss(weight, Residual(base, rest).encode(weight, statistics), statistics.hessian)
        for base in (plain, gptq)
        for rest in (plain, gptq)
    ]
    # The last stage makes up for what is left; that the first did so too widens what it has to code.
    assert losses[1] < 0.7 * losses[0]
    assert losses[3] < 0.7 * losses[2]


# Odd input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("codec", [Uniform(4, 32), NormalFloat(4, 64)])
def test_rank_deficient_hessian(codec: Uniform | NormalFloat, rounding: Gptq) -> None:
    inputs = torch.randn(20, 128, generator=torch.Generator().manual_seed(3))
    weight, matrix = weights(24, 128), inputs.T @ inputs / 20
    nearest = loss(weight, codec.encode(weight), matrix)
    assert loss(weight, with_gptq(codec, rounding).encode(weight, Statistics(hessian=matrix)), matrix) < 0.3 * nearest


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_dead_columns_go_to_nearest_and_disturb_nothing(rounding: Gptq) -> None:
    live = torch.ones(64, dtype=torch.bool)
    live[::5] = False
    weight, matrix = weights(20, 64), hessian(64, 100)
    weight[:, ~live] *= 0.1  # so that the range, which fixes the grid, is that of the others
    matrix[~live], matrix[:, ~live] = 0, 0
    codec = Uniform(4, None, rounding=rounding)
    decoded = codec.decode(codec.encode(weight, Statistics(hessian=matrix)))
    nearest = Uniform(4, None)
    assert torch.equal(decoded[:, ~live], nearest.decode(nearest.encode(weight))[:, ~live])
    assert decoded.isfinite().all()
    # The others are rounded as if the dead ones were not there.
    weight[:, ~live] *= -0.7
    assert torch.equal(codec.decode(codec.encode(weight, Statistics(hessian=matrix)))[:, live], decoded[:, live])


def test_inconsistent_dead_columns_are_cleared() -> None:
    matrix = hessian(32, 10)
    matrix[5, 5] = 0
    shared = feedback(Statistics(hessian=matrix), 32, 0.01, by_activation=False, sweeps=True)
    assert shared.others is not None
    for part in (shared.earlier - torch.eye(32), shared.others):
        assert not part[5].any()
        assert not part[:, 5].any()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_huge_dynamic_range(rounding: Gptq) -> None:
    power = torch.logspace(-9, 9, 96)
    matrix = hessian(96, 10) * power * power[:, None]
    weight = weights(16, 96)
    for scale in (1.0, 1e-18, 1e18):
        payload = Uniform(4, 32, rounding=rounding).encode(weight, Statistics(hessian=matrix * scale))
        assert registry.from_json(payload.codec).decode(payload).isfinite().all()
        assert loss(weight, payload, matrix) <= loss(weight, Uniform(4, 32).encode(weight), matrix)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (1, 300), (5, 33), (257, 31)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_small_shapes_and_other_dtypes(shape: tuple[int, int], rounding: Gptq, dtype: torch.dtype) -> None:
    weight, statistics = weights(*shape).to(dtype), Statistics(hessian=hessian(shape[1], 10).to(dtype).double())
    for codec in (Uniform(4, 32, rounding=rounding), NormalFloat(4, 8, "learned", rounding)):
        payload = codec.encode(weight, statistics)
        assert payload.dtype == dtype
        assert codec.decode(payload).shape == shape
        assert same_bytes(payload, codec.encode(weight.float(), statistics))
        assert (codec.decode(payload) - weight).norm() <= 0.5 * weight.norm()


def test_transposed_weights_and_hessians() -> None:
    weight, statistics = weights(40, 60), Statistics(hessian=hessian(60, 100))
    assert statistics.hessian is not None
    codec = Uniform(4, 16, rounding=GPTQ)
    other = codec.encode(weight.T.contiguous().T, Statistics(hessian=statistics.hessian.T.contiguous()))
    assert same_bytes(codec.encode(weight, statistics), other)


def test_escalation_of_the_damping() -> None:
    """An eigenvalue of -0.12 of the mean: 0.01 does not suffice, nor ten times as much, but a hundred times does."""
    matrix = torch.eye(50) + 0.14 * (torch.eye(50).roll(1, 0) + torch.eye(50).roll(-1, 0)) * 4
    assert torch.linalg.eigvalsh(matrix)[0] == pytest.approx(-0.12, abs=0.01)
    before = matrix.clone()
    shared = feedback(Statistics(hessian=matrix), 50, 0.01, by_activation=False, sweeps=False)
    assert shared.damping == pytest.approx(1.0)
    assert torch.equal(matrix, before)
    assert feedback(Statistics(hessian=torch.eye(50)), 50, 0.01, by_activation=False, sweeps=False).damping == 0.01
    with pytest.raises(SingularHessianError, match="not positive definite") as caught:
        Uniform(4, rounding=GPTQ).encode(
            weights(3, 50), Statistics(hessian=torch.eye(50) * 3 - 2.9 * torch.ones(50, 50))
        )
    assert "calibrate again" in str(caught.value.hint)


@pytest.mark.parametrize("codec", [Uniform(4, 32, rounding=GPTQ), NormalFloat(4, rounding=GPTQ)])
@pytest.mark.parametrize("statistics", [None, Statistics(), Statistics(output_curvature=torch.ones(3))])
def test_missing_hessian(codec: Codec, statistics: Statistics | None) -> None:
    with pytest.raises(MissingStatisticsError, match="Hessian") as caught:
        codec.encode(weights(3, 40), statistics)
    assert "--calibration TEXT" in str(caught.value.hint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_broken_hessians_are_refused(value: float) -> None:
    matrix = hessian(40, 10)
    matrix[7, 7] = value
    with pytest.raises(CodecError, match="Hessian holds NaN or infinite values or a negative diagonal"):
        Uniform(4, 32, rounding=GPTQ).encode(weights(3, 40), Statistics(hessian=matrix))
    with pytest.raises(CodecError, match="has 41 input columns"):
        Uniform(4, 32, rounding=GPTQ).encode(weights(3, 41), Statistics(hessian=matrix))


def test_beyond_fp16_is_refused() -> None:
    weight = weights(3, 40)
    weight[1, 5] = 1e6
    for codec in (Uniform(4, 32, rounding=GPTQ), NormalFloat(4, rounding=GPTQ)):
        with pytest.raises(CodecError, match="FP16"):
            codec.encode(weight, Statistics(hessian=hessian(40, 10)))


# Configuration -------------------------------------------------------------------------------------------------------


def test_the_format_does_not_depend_on_the_rounding() -> None:
    for codec in CODECS:
        weight = weights(9, 70)
        payload = with_gptq(codec, Gptq(sweeps=1)).encode(weight, Statistics(hessian=hessian(70, 10)))
        assert with_gptq(codec, GPTQ).fields((9, 70)) == codec.fields((9, 70))
        assert torch.equal(
            codec.decode(replace(payload, codec=codec.to_json())), registry.from_json(payload.codec).decode(payload)
        )


def test_json() -> None:
    plain = {"id": "uniform/1", "bits": 4, "group": 32, "symmetric": False, "search": False}
    assert Uniform(4).to_json() == plain  # as before there were roundings
    codec = Uniform(4, rounding=Gptq(0.05, "activation", 3))
    assert codec.to_json() == {
        **plain,
        "rounding": {"name": "gptq", "damping": 0.05, "order": "activation", "sweeps": 3},
    }
    for rounding, expected in (
        ({"name": "nearest"}, Uniform(4)),
        ("nearest", Uniform(4)),
        ("gptq", Uniform(4, rounding=GPTQ)),
        ({"name": "gptq", "damping": 1}, Uniform(4, rounding=Gptq(1.0))),
    ):
        assert registry.from_json({**plain, "rounding": rounding}) == expected
    nested = Residual(NormalFloat(4, rounding=GPTQ), Residual(Uniform(4, rounding=Gptq(sweeps=1)), Dense("float16")))
    assert registry.from_json(nested.to_json()) == nested


@pytest.mark.parametrize(
    ("rounding", "message"),
    [
        ("gptw", "no rounding 'gptw'"),
        (None, "a rounding is a name or an object"),
        ({}, "a rounding is a name or an object"),
        ({"name": []}, "a rounding is a name or an object"),
        ({"name": "gptq", "damp": 1}, "rounding gptq has no field 'damp'"),
        ({"name": "nearest", "damping": 1}, "rounding nearest has no field 'damping'"),
        ({"name": "gptq", "damping": 0}, "damping must be a number from 1e-06 to 1, got 0"),
        ({"name": "gptq", "damping": float("nan")}, "damping must be"),
        ({"name": "gptq", "damping": 10**400}, "damping must be"),
        ({"name": "gptq", "damping": True}, "damping must be"),
        ({"name": "gptq", "damping": "0.1"}, "damping must be"),
        ({"name": "gptq", "order": "reverse"}, "order must be one of natural, activation"),
        ({"name": "gptq", "sweeps": -1}, "sweeps must be an integer"),
        ({"name": "gptq", "sweeps": 101}, "sweeps must be an integer"),
    ],
)
@pytest.mark.parametrize("codec", ["uniform/1", "normalfloat/1"])
def test_mistakes_are_named(rounding: object, message: str, codec: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        registry.from_json({"id": codec, "bits": 4, "rounding": rounding})
    assert caught.value.hint


def test_a_codec_takes_roundings_only() -> None:
    with pytest.raises(RecipeError, match="rounding must be one of nearest, gptq"):
        Uniform(4, rounding="gptq")  # type: ignore[arg-type]


# Threads -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import hashlib, threading, torch
from tenpak.codecs.base import Statistics
from tenpak.recipes import parse
index = torch.arange(301.0)
hessian = 0.95 ** (index[:, None] - index).abs() * (1 + index / 100) * (1 + index[:, None] / 100)
weight = torch.randn(520, 301, generator=torch.Generator().manual_seed(0)) * 0.02
def work():
    digest = hashlib.sha256()
    for recipe in ("gptq-int4:g128:sweeps=1", "gptq-int3:g32:actorder", "gptq-nf4:row:learned"):
        for tensor in parse(recipe).encode(weight, Statistics(hessian=hessian)).tensors.values():
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
def worker():
    torch.set_num_threads(1)
    work()
before = torch.get_num_threads()
work()
thread = threading.Thread(target=worker)
thread.start()
thread.join()
assert torch.get_num_threads() == before
"""


def test_same_bytes_in_processes_of_one_and_two_threads() -> None:
    """As a library, and on the thread of a worker, in a process of one thread and in one of two."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        for threads in ("1", "2")
    ]
    digests = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(digests) == 4
    assert len(set(digests)) == 1
