"""Distillation: the gradient is the loss's own, progress is kept, and what a file cannot hold is not learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make_tiny
from torch import Tensor

from tenpak.calibration.skeleton import Skeleton
from tenpak.checkpoint.source import open_checkpoint
from tenpak.checkpoint.structure import bind, build_meta_model
from tenpak.tuning.distil import Knob, _gradients, distil, divergence, split_windows


def whole(folder: Path) -> Skeleton:
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton.build(checkpoint, bind(build_meta_model(folder), checkpoint.tensors))
    skeleton.load(skeleton.parameters)
    return skeleton


def text(count: int) -> Tensor:
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("distil") / "model")


def knobs(student: Skeleton, unit: float = 1e-4) -> list[Knob]:
    """The norms, doubled and more: the way back is known."""
    found = []
    for path in student.parameters:
        parameter = student.model.get_parameter(path)
        if parameter.ndim == 1:
            parameter.data.mul_(2.5)
            found.append(Knob(parameter.requires_grad_(), lambda v: (v / unit).round() * unit, 0.05))
    return found


def test_the_gradient_is_that_of_the_divergence(folder: Path) -> None:
    teacher, student = whole(folder), whole(folder)
    turned = knobs(student)
    windows = text(6 * 32).view(6, 32)
    with torch.enable_grad():
        log_p = teacher.run(windows, None, None).log_softmax(-1)
        log_q = student.run(windows, None, None).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = torch.autograd.grad(loss, [knob.parameter for knob in turned])
    assert divergence(student, teacher, windows) == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(tuple(_gradients(student, teacher, turned, windows)), expected, rtol=1e-3, atol=1e-7)


def test_it_finds_the_way_back_in_units_that_can_be_stored(folder: Path) -> None:
    teacher, student = whole(folder), whole(folder)
    turned = knobs(student, unit=1 / 64)
    learning, held_out = split_windows(text(64 * 33), 32)
    seen: list[tuple[int, int]] = []
    trace = distil(student, teacher, turned, learning, held_out, steps=120, progress=lambda *at: seen.append(at))
    start, end = trace.held_out[0][1], dict(trace.held_out)[trace.best]
    assert end < 0.05 * start
    assert divergence(student, teacher, held_out) == pytest.approx(end, rel=1e-6)
    assert seen[-1] == (120, 120)
    for knob in turned:
        assert torch.equal(knob.parameter, (knob.parameter * 64).round() / 64)


def test_what_makes_it_worse_is_taken_back(folder: Path) -> None:
    """Steps far too large: the values of the beginning are the best ones, and it ends before its time."""
    teacher, student = whole(folder), whole(folder)
    parameter = student.model.get_parameter("model.norm.weight").requires_grad_()
    before = parameter.detach().clone()
    learning, held_out = split_windows(text(2000), 32)
    trace = distil(student, teacher, [Knob(parameter, lambda v: v, 100.0)], learning, held_out, steps=400)
    assert trace.best == 0
    assert trace.held_out[-1][0] < 400
    assert torch.equal(parameter, before)


def test_the_result_does_not_depend_on_threads(folder: Path, threads: None) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        teacher, student = whole(folder), whole(folder)
        turned = knobs(student)
        learning, held_out = split_windows(text(64 * 40), 32)
        distil(student, teacher, turned, learning, held_out, steps=5)
        found.append(torch.cat([knob.parameter.detach() for knob in turned]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("tokens", "learning", "held_out"), [(63, 0, 0), (64, 1, 1), (3200, 93, 7), (32 * 4096, 3840, 256)]
)
def test_the_last_windows_are_held_out(tokens: int, learning: int, held_out: int) -> None:
    first, last = split_windows(text(tokens), 32)
    assert (len(first), len(last)) == (learning, held_out)
    if len(last):
        assert torch.equal(last[-1], text(tokens)[: tokens // 32 * 32][-32:])
