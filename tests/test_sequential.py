"""Compressing block by block: what each step is given, and what that is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_tiny_talker
from safetensors.torch import load_file, save_file
from torch import Tensor

import tenpak
from tenpak.artifact.schema import MANIFEST_NAME, load_manifest
from tenpak.calibration.activations import Activations
from tenpak.calibration.collect import batched
from tenpak.calibration.skeleton import Skeleton
from tenpak.codecs.base import Statistics
from tenpak.codecs.rounding.correction import corrected
from tenpak.encoding import stored_reader
from tenpak.errors import SingularHessianError
from tenpak.job import open_job
from tenpak.report.report import Report
from tenpak.sequential import Walk, _Models
from tenpak.task import numbered
from tenpak.work import Work

pytestmark = pytest.mark.filterwarnings("ignore:.*are advised:UserWarning")

TEXT = "the moon and the sun went over the sea and the star sat on the moon. " * 60


def compress(model: Path, out: Path, **options: object) -> Report:
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    return tenpak.compress(model, out, **{"recipe": "gptq-int4:g32", "calibration": text, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compressed_block_by_block(family: str, tmp_path: Path) -> None:
    model = make_tiny_talker(tmp_path / "model", family)
    compress(model, tmp_path / "out")
    compress(model, tmp_path / "plain", recipe="int4:g128")
    (tmp_path / "evaluation.txt").write_text("a star sat over the sun and the sea went on. " * 5)
    calibrated, plain = (
        tenpak.evaluate(tmp_path / kind, against=model, text=tmp_path / "evaluation.txt", window=32).kl
        for kind in ("out", "plain")
    )
    assert calibrated < plain
    assert tenpak.verify(tmp_path / "out").ok


def test_propagation_is_worth_what_it_costs(tinystories: Path, tmp_path: Path) -> None:
    """Bar: a tenth less KL than without; on the whole calibration text it is about a third."""
    text = tmp_path / "evaluation.txt"
    text.write_text((tinystories / "texts" / "evaluation.txt").read_text()[:20_000])
    found = {}
    for propagation in ("none", "original"):
        tenpak.compress(
            tinystories,
            tmp_path / "out",
            recipe="gptq-int3:g32",
            calibration_tokens=16_384,
            propagation=propagation,
            overwrite=True,
        )
        found[propagation] = tenpak.evaluate(tmp_path / "out", against=tinystories, text=text).kl
    assert found["original"] < 0.9 * found["none"]


@pytest.mark.parametrize(
    ("family", "added"),
    [
        ("llama", {"mlp.down_proj"}),
        ("gpt2", {"mlp.c_proj"}),
        ("falcon", {"self_attention.dense", "mlp.dense_4h_to_h"}),  # attention and MLP side by side
        ("gemma2", set()),  # a norm comes after them
        ("mamba", {"mixer.out_proj"}),
    ],
)
def test_weights_that_add_to_the_blocks_output_are_found(family: str, added: set[str], tmp_path: Path) -> None:
    folder = make_tiny_talker(tmp_path / "model", family)
    job = open_job(folder, "gptq-int4:g32", ())
    weights = [entry.weight for entry in job.plan.entries]
    original, compressed = (Skeleton.build(job.checkpoint, weights) for _ in range(2))
    items = numbered(job)
    tokens = torch.randint(3, 90, (64,), generator=torch.Generator().manual_seed(0))
    with Work(tmp_path / "work", {}) as work, Activations() as states:
        walk = Walk(original, compressed, tokens, 32, work, stored_reader(job.checkpoint, job.plan.entries, work))
        models = _Models(walk, batched(tokens, 32), states)
        models.start()
        inside = [item for item in items if compressed.place(item.entry.weight.parameter) == 0]
        with original.holding(original.parameters_of(0)):
            steps = models._steps(0, inside)
    found = {name.split("0.", 1)[1].removesuffix(".weight") for s in steps if s.added for name in s.parameters}
    assert found == added
    assert sum(len(step.items) for step in steps) == len(inside), "every tensor is in one step"


def test_the_target_is_the_least_squares_solution() -> None:
    """Min over V of E|W x - V x̂|², against torch's own solver."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, x = normal(5, 12), normal(4000, 12) @ normal(12, 12)
    seen = x + 0.3 * normal(4000, 12)
    hessian, cross = seen.T @ seen / 4000, x.T @ seen / 4000
    target = corrected(weight, Statistics(hessian=hessian, cross=cross), damping=1e-6)
    solution = torch.linalg.lstsq(seen.double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(target.double(), solution, rtol=1e-3, atol=1e-3)
    shift = (x @ weight.T - seen @ weight.T).T @ seen / 4000
    other = corrected(weight, Statistics(hessian=hessian, shift=shift), damping=1e-6)
    torch.testing.assert_close(other, target, rtol=1e-3, atol=1e-3)


def test_the_target_is_the_weight_where_nothing_has_changed() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))  # singular: damping alone makes it solvable
    hessian = x.T @ x / 3
    assert torch.equal(corrected(weight, Statistics(hessian=hessian, cross=hessian)), weight)
    assert corrected(weight, Statistics(hessian=hessian)) is weight
    dead = torch.zeros(12, 12)
    assert torch.equal(corrected(weight, Statistics(hessian=dead, cross=dead)), weight)


def test_an_indefinite_hessian_is_refused() -> None:
    hessian = torch.eye(3)
    hessian[0, 1] = hessian[1, 0] = 50
    with pytest.raises(SingularHessianError):
        corrected(torch.ones(2, 3), Statistics(hessian=hessian, cross=torch.eye(3)))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_experts_without_tokens_take_part(family: str, tmp_path: Path) -> None:
    """A router that sends everything to two experts: the others share statistics, and no scale is NaN."""
    folder = make_tiny_talker(tmp_path / "model", family)
    tensors = load_file(folder / "model.safetensors")
    routers = [n for n in tensors if n.endswith((".gate.weight", ".router.weight")) and "layers.1" in n]
    assert len(routers) == 1
    tensors[routers[0]].zero_()  # ties go to the first experts
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = compress(folder, tmp_path / "out", recipe="gptq-int3:g32")
    manifest = load_manifest(tmp_path / "out" / MANIFEST_NAME)
    assert manifest.calibration is not None
    experts = manifest.calibration["experts"]
    starved = [count for name, counts in experts.items() if "layers.1." in name for count in counts if count == 0]
    assert starved, "some experts of that layer saw nothing"
    assert report.to_json()["calibration"]["experts"] == experts
    artifact = tenpak.open_artifact(tmp_path / "out")
    for name in manifest.weights:
        assert bool(torch.isfinite(artifact.decode(name)).all()), name


def test_biases_take_up_the_mean_error(tmp_path: Path) -> None:
    """With the corrected bias the mean output of a layer is the original's, whatever its weight lost."""
    folder = make_tiny_talker(tmp_path / "model", "gpt2")
    compress(folder, tmp_path / "out", recipe="gptq-int2:g32", propagation="none")
    source = load_file(folder / "model.safetensors")
    name = next(n for n in source if n.endswith("h.0.attn.c_attn.bias"))
    artifact = tenpak.open_artifact(tmp_path / "out")
    statistics = tenpak.calibrate(folder, tmp_path / "statistics", calibration=tmp_path / "text.txt", fast=True)
    job = open_job(folder, "dense", ())
    weight = next(e.weight for e in job.plan.entries if e.weight.name == name.replace("bias", "weight"))
    (known,) = statistics.of(weight)
    assert known is not None
    error = source[weight.name] - artifact.decode(weight.name)  # [in, out]
    torch.testing.assert_close(artifact.read_dense(name), source[name] + known.mean @ error, rtol=1e-4, atol=1e-6)
    assert "mean error" in artifact.manifest.dense[name].reason


def test_saved_statistics_give_what_collecting_gives(tmp_path: Path) -> None:
    folder = make_tiny_talker(tmp_path / "model")
    compress(folder, tmp_path / "a", propagation="none")
    tenpak.calibrate(folder, tmp_path / "statistics", calibration=tmp_path / "text.txt")
    tenpak.compress(folder, tmp_path / "b", recipe="gptq-int4:g32", statistics=tmp_path / "statistics")
    names = tenpak.open_artifact(tmp_path / "a").manifest.weights
    for name in names:
        a, b = (tenpak.open_artifact(tmp_path / kind).decode(name) for kind in "ab")
        # Forward only and forward with a graph need not round alike; a few codes at most may differ.
        assert float((a != b).float().mean()) < 0.01, name
