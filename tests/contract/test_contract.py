"""What every registered codec must do, checked on the configurations of ``cases``."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from cases import CASES, Case, correlated, normal
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Payload, Statistics
from tenpak.errors import CodecError, InvalidPayloadError, MissingStatisticsError, RecipeError

ALL = [pytest.param(case, id=f"{codec_id}-{case.name}") for codec_id, cases in CASES.items() for case in cases]
SHAPES = [(1, 1), (1, 40), (40, 1), (7, 5), (3, 300), (5, 33), (2, 257)]


def same_bytes(a: Payload, b: Payload) -> bool:
    one, other = ([*payload.tensors.items(), *payload.shared.items()] for payload in (a, b))
    return [name for name, _ in one] == [name for name, _ in other] and all(
        x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for (_, x), (_, y) in zip(one, other, strict=True)
    )


def relative_rms(weight: Tensor, decoded: Tensor) -> float:
    return float((weight - decoded).norm() / weight.norm())


def test_every_registered_codec_has_cases() -> None:
    assert set(CASES) == set(registry.ids())
    for codec_id, cases in CASES.items():
        assert cases
        assert {case.config["id"] for case in cases} == {codec_id}
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("case", ALL)
def test_configuration_survives_json(case: Case) -> None:
    codec = case.codec
    assert codec.to_json() == case.config
    again = registry.from_json(json.loads(json.dumps(codec.to_json())))
    assert again == codec
    assert hash(again) == hash(codec)
    with pytest.raises(RecipeError, match="no_such_field"):
        registry.from_json({**case.config, "no_such_field": 1})


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_decodes_from_the_payload_alone(case: Case, shape: tuple[int, int]) -> None:
    payload = case.encode(normal(*shape))
    expected = case.codec.decode(payload)
    config = json.loads(json.dumps(payload.codec))
    own, shared = ({k: t.clone() for k, t in tensors.items()} for tensors in (payload.tensors, payload.shared))
    rebuilt = Payload(config, shape, torch.float32, own, shared)
    decoded = registry.from_json(config).decode(rebuilt)
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_measured_size_is_the_estimated(case: Case, shape: tuple[int, int]) -> None:
    codec = case.codec
    payload = case.encode(normal(*shape))
    fields = codec.fields(shape)
    if fields is None:
        assert codec.estimate_bits(shape) is None
        return
    found = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in payload.tensors.items()]
    assert found == [(f.name, f.dtype, f.shape) for f in fields]
    assert codec.estimate_bits(shape) == payload.bits == 8 * sum(f.nbytes for f in fields)
    shared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in payload.shared.items()]
    assert shared == [(f.name, f.dtype, f.shape) for f in codec.shared_fields]
    sizes = [f.dtype.itemsize for f in fields]
    assert sizes == sorted(sizes, reverse=True), "wider dtypes first, for alignment"


@pytest.mark.parametrize("case", ALL)
def test_what_needs_statistics_says_so(case: Case) -> None:
    assert case.codec.needs_statistics == case.calibrated
    if case.calibrated:
        with pytest.raises(MissingStatisticsError):
            case.codec.encode(normal(3, 40))


@pytest.mark.parametrize("case", ALL)
def test_tensors_are_contiguous_and_own_no_more_than_they_show(case: Case) -> None:
    payload = case.encode(normal(5, 33))
    for tensor in (*payload.tensors.values(), *payload.shared.values()):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("case", ALL)
def test_encoding_is_deterministic_and_leaves_the_weight_alone(case: Case) -> None:
    weight = normal(9, 70)
    before = weight.clone()
    assert same_bytes(case.encode(weight), case.encode(weight))
    assert torch.equal(weight, before)
    transposed = normal(70, 9).t()
    assert same_bytes(case.encode(transposed), case.encode(transposed.contiguous()))


@pytest.mark.parametrize("case", ALL)
# Above 2^15 elements torch splits the work; more than one tile; one row, where a sum itself might be split.
@pytest.mark.parametrize("shape", [(300, 1100), (1, 70001)])
@pytest.mark.usefixtures("threads")
def test_same_bytes_for_any_number_of_threads(case: Case, shape: tuple[int, int]) -> None:
    if case.calibrated and shape[1] > 10_000:
        pytest.skip("the Hessian of such a row takes gigabytes")
    weight = normal(*shape)
    payloads, decoded = [], []
    for count in (1, 2):
        torch.set_num_threads(count)
        payloads.append(case.encode(weight))
        decoded.append(case.codec.decode(payloads[-1]))
    assert same_bytes(*payloads)
    assert torch.equal(*decoded)


@pytest.mark.parametrize("case", ALL)
def test_rows_do_not_depend_on_the_other_rows(case: Case) -> None:
    """Tiles leave no trace: two halves encode like the whole."""
    if not case.apart:
        pytest.skip("rows are encoded together, or by what is learned from all of them")
    if case.calibrated:
        pytest.skip("products of matrices of other sizes differ in the last bit, which a tie makes visible")
    weight = normal(300, 1100)
    decoded = case.codec.decode(case.encode(weight))
    parts = [case.codec.decode(case.encode(part)) for part in (weight[:123], weight[123:])]
    assert torch.equal(decoded, torch.cat(parts))


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("shape", [(64, 256), (33, 200)])
def test_error_is_bounded(case: Case, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    assert relative_rms(weight, case.codec.decode(case.encode(weight))) <= case.rms


@pytest.mark.parametrize("case", ALL)
def test_zeros_stay_zero(case: Case) -> None:
    assert not case.codec.decode(case.encode(torch.zeros(3, 50))).any()


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("value", [0.25, -1.0, 0.1, 3e-5, 1e-7, 6e4])
def test_constants_are_kept(case: Case, value: float) -> None:
    if not case.constants:
        pytest.skip("what reaches the grid is not constant")
    decoded = case.codec.decode(case.encode(torch.full((3, 50), value)))
    # FP16 parameters: half a unit of 2^-10 relative, or of the smallest subnormal times the largest code multiplier.
    torch.testing.assert_close(decoded, torch.full((3, 50), value), rtol=2**-7, atol=2**-24 * 128)


@pytest.mark.parametrize("case", ALL)
def test_huge_outliers_and_denormals_stay_finite(case: Case) -> None:
    weight = normal(4, 64)
    weight[0, 3], weight[1, 60], weight[2] = 6e4, -6e4, weight[2] * 1e-40
    assert (weight[2] != 0).any()
    decoded = case.codec.decode(case.encode(weight))
    assert decoded.isfinite().all()
    # The outlier is an end of the grid, kept to its step; at 2 bits and with a coarse table that is a half.
    assert decoded[0, 3] == pytest.approx(6e4, rel=0.5)
    assert decoded[1, 60] == pytest.approx(-6e4, rel=0.5)
    if case.height == 1:
        assert decoded[2].abs().max() <= 2**-14


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_encode_like_their_fp32_values(case: Case, dtype: torch.dtype) -> None:
    weight = normal(5, 70).to(dtype)
    payload = case.encode(weight)
    assert payload.dtype == dtype
    if dtype != torch.float64:
        assert same_bytes(payload, case.encode(weight.float()))
    assert case.codec.decode(payload).dtype == torch.float32


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("shape", [(7, 5), (40, 33), (1, 300)])
def test_rows_are_rows_of_the_decoded_weight(case: Case, shape: tuple[int, int]) -> None:
    codec = case.codec
    prepared = codec.prepare(case.encode(normal(*shape)))
    decoded = codec.decode(case.encode(normal(*shape)))
    last = shape[0] - 1
    for indices in (torch.tensor([last, 0, last]), torch.tensor([[0, last], [last, 0]]), torch.tensor(0)):
        assert torch.equal(codec.rows(indices, prepared), decoded[indices])
    assert codec.rows(torch.zeros(0, dtype=torch.int64), prepared).shape == (0, shape[1])
    with pytest.raises(IndexError):
        codec.rows(torch.tensor([shape[0]]), prepared)


@pytest.mark.parametrize("case", ALL)
def test_matmul_is_decode_then_matmul(case: Case) -> None:
    codec = case.codec
    payload = case.encode(normal(7, 40))
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    product = codec.matmul(x, codec.prepare(payload))
    assert product.shape == (2, 3, 7)
    torch.testing.assert_close(product, x @ codec.decode(payload).t())
    assert codec.matmul(x.bfloat16(), codec.prepare(payload)).dtype == torch.bfloat16


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused(case: Case, bad: float) -> None:
    weight = normal(4, 40)
    weight[2, 17] = bad
    with pytest.raises(CodecError, match="NaN or infinite"):
        case.encode(weight)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(0, 4), torch.zeros(4, 0), torch.ones(4, 4, dtype=torch.int32)],
)
def test_only_matrices_are_accepted(case: Case, weight: Tensor) -> None:
    with pytest.raises(CodecError):
        case.codec.encode(weight)


@pytest.mark.parametrize("case", ALL)
def test_damaged_payloads_are_refused(case: Case) -> None:
    codec = case.codec
    payload = case.encode(normal(6, 40))
    for name, tensor in payload.tensors.items():
        without = {k: t for k, t in payload.tensors.items() if k != name}
        other = torch.int32 if tensor.dtype != torch.int32 else torch.int64
        damaged = [
            without,
            {**without, f"{name}_": tensor},
            {**payload.tensors, "surplus": tensor},
            {**payload.tensors, name: tensor.to(other)},
            {**payload.tensors, name: tensor[..., :-1]},
            {**payload.tensors, name: tensor[None]},
        ]
        for tensors in damaged:
            broken = dataclasses.replace(payload, tensors=tensors)
            with pytest.raises(InvalidPayloadError):
                codec.decode(broken)
            with pytest.raises(InvalidPayloadError):
                codec.rows(torch.tensor([0]), codec.prepare(broken))
    for shared in [{}, {**payload.shared, "surplus": torch.zeros(1)}] if payload.shared else []:
        with pytest.raises(InvalidPayloadError):
            codec.decode(dataclasses.replace(payload, shared=shared))
        with pytest.raises(InvalidPayloadError):
            codec.decode(dataclasses.replace(payload, tensors={**payload.tensors, **payload.shared}, shared={}))
    for shape in ((6 + case.height, 40), (6, 400), (-6, -40), (0, 0), (6 << 40, 40 << 40)):
        with pytest.raises(InvalidPayloadError):
            codec.decode(dataclasses.replace(payload, shape=shape))


@pytest.mark.parametrize("case", ALL)
def test_statistics_are_accepted(case: Case) -> None:
    weight = normal(6, 40)
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 3, 40)
    statistics = Statistics(hessian=x.t() @ x / 100, output_curvature=torch.linspace(0, 1, 6))
    payload = case.codec.encode(weight, statistics)
    assert same_bytes(payload, case.codec.encode(weight, statistics))
    # Rows and inputs that do not matter may lose everything where the error is set in units of the loss.
    assert relative_rms(weight, case.codec.decode(payload)) <= max(1.0 if case.absolute else 2 * case.rms, 1e-9)


@pytest.mark.parametrize("case", ALL)
def test_alone_it_learns_what_it_would_share(case: Case) -> None:
    weight = normal(9, 70)
    codec, statistics = case.codec, correlated(70) if case.calibrated else None
    shared = codec.learn([weight])
    assert shared.keys() == {f.name for f in codec.shared_fields}
    assert same_bytes(codec.encode_sharing(weight, shared, statistics), case.encode(weight))


@pytest.mark.parametrize("case", ALL)
def test_what_is_tunable_is_what_is_stored(case: Case) -> None:
    """Products, look-ups and gradients are those of the weight, and the payload holds what the parameters say."""
    payload = case.encode(normal(24, 33))
    tunable = case.codec.tunable(payload)
    if tunable is None:
        pytest.skip("nothing of it is continuous")
    decoded = case.codec.decode(payload)
    torch.testing.assert_close(tunable.matrix(), decoded, rtol=1e-6, atol=1e-9)
    assert same_bytes(tunable.payload(), payload)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, rounded in tunable.knobs():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(rounded(parameter + 0.05 * noise))
            assert torch.equal(rounded(parameter), parameter)
    changed = tunable.payload()
    stored = case.codec.decode(changed)
    assert relative_rms(stored, decoded) > 0.01
    torch.testing.assert_close(tunable.matrix(), stored, rtol=1e-6, atol=1e-9)
    x = torch.randn(2, 5, 33, generator=generator)
    torch.testing.assert_close(tunable.matmul(x), x @ stored.T, rtol=1e-5, atol=1e-6)
    indices = torch.tensor([[3, 3], [0, 23]])
    torch.testing.assert_close(tunable.rows(indices), stored[indices], rtol=1e-6, atol=1e-9)
    again = case.codec.tunable(changed)
    assert again is not None
    assert same_bytes(again.payload(), changed)
    # Gradients of the products that are made without the weight are those of the weight's.
    wanted = torch.autograd.grad((x @ tunable.matrix().T).square().sum(), list(tunable.parameters()))
    found = torch.autograd.grad(tunable.matmul(x).square().sum(), list(tunable.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
