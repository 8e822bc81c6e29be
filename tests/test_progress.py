"""Progress: rates and times that belong to a phase, lines that come seldom, JSON that another process reads."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from tenpak.cli import progress
from tenpak.cli.progress import Meter, bar, json_lines, lines


class Clock:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "_now", clock)
    return clock


def told(clock: Clock, steps: list[tuple[float, str, int, int]], **options: bool) -> list[str]:
    """The lines that steps lead to, each after so many seconds."""
    console = Console(file=io.StringIO(), width=40)
    with lines(console, "things", **options) as update:
        for seconds, *step in steps:
            clock.now += seconds
            update(*step)
    return console.file.getvalue().splitlines()


def test_a_phase_has_its_own_rate_and_unit(clock: Clock) -> None:
    meter = Meter("things")
    for done in (0, 1000, 2000):
        meter.update("evaluating", done, 10_000)
        clock.now += 1
    assert (meter.rate, meter.speed, meter.left) == (1000, "1,000 tokens/s", "8 s left")
    meter.update("model.layers.0.mlp.up_proj.weight", 10, 20)
    clock.now += 5
    meter.update("model.layers.0.mlp.down_proj.weight", 20, 20)
    assert meter.phase == "encoding"
    assert meter.item == "model.layers.0.mlp.down_proj.weight"
    assert meter.rate == 2
    assert meter.finished
    assert meter.begins("model.layers.0.mlp.up_proj.weight", 20)  # all was done: this is another pass
    meter.update("counting", 1, 3)
    assert meter.line().startswith("counting: 1 of 3 things (33%)")
    meter.update("profiling model.norm.weight", 1, 3)
    assert (meter.phase, meter.item) == ("profiling", "model.norm.weight")


def test_a_rate_is_that_of_the_last_minute(clock: Clock) -> None:
    meter = Meter("things")
    for done in range(0, 1000, 10):
        meter.update("tuning", done, 10_000)
        clock.now += 1
    for done in range(1000, 1100):
        meter.update("tuning", done, 10_000)
        clock.now += 1
    assert meter.rate == pytest.approx(1, rel=0.01)


def test_lines_come_seldom_and_at_the_end_of_a_phase(clock: Clock) -> None:
    found = told(
        clock,
        [(1, "evaluating", done, 100) for done in range(1, 101)]
        + [(2, "a.weight", 10, 30), (2, "b.weight", 30, 30)]
        + [(2, "a.weight", 10, 30), (2, "b.weight", 20, 30)],
    )
    assert found[:2] == [
        "evaluating: 10 of 100 tokens (10%), 1 tokens/s, 1 min 30 s left",
        "evaluating: 20 of 100 tokens (20%), 1 tokens/s, 1 min 20 s left",
    ]
    assert found[-3:] == [
        "evaluating: 100 tokens in 1 min 40 s, 1 tokens/s",
        "encoding: 30 weights in 4 s, 7.5 weights/s",
        "encoding: 20 of 30 weights in 4 s, 5 weights/s",
    ]
    assert len(found) == 9 + 3


def test_verbose_lines_name_every_tensor(clock: Clock) -> None:
    found = told(clock, [(1, "a.weight", 1, 2), (1, "b.weight", 2, 2), (1, "writing", 1, 2)], verbose=True)
    assert [line.split(", ")[-1] for line in found[:2]] == ["a.weight", "b.weight"]
    assert [line.partition(":")[0] for line in found[2:]] == ["encoding", "writing"]


def test_a_phase_that_was_broken_off_is_not_summed_up(clock: Clock) -> None:
    console = Console(file=io.StringIO())

    def fails() -> None:
        with lines(console, "things") as update:
            update("tuning", 1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert console.file.getvalue() == ""


def test_a_bar_is_redrawn_for_each_phase_and_goes_away(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with bar(console, "things") as update:
        clock.now += 1
        update("calibrating", 50, 100)
        clock.now += 1
        update("model.layers.0[x].weight", 1, 4)  # brackets are no markup
    shown = console.file.getvalue()
    assert "model.layers.0[x].weight" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")


def test_json_for_another_process(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with json_lines(console) as update:
        for done in range(101):
            clock.now += 0.01
            update("evaluating", done, 100)
    found = [json.loads(line)["progress"] for line in console.file.getvalue().splitlines()]
    assert found[0] == ["evaluating", 0, 100]
    assert found[-1] == ["evaluating", 100, 100]
    assert 5 <= len(found) <= 8
