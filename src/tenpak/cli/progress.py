"""Progress of long steps: what is being done, how fast, and how long it will still take; a bar, lines or JSON.

A run has phases (sampling, calibrating, encoding, tuning, evaluating and so on), each with a unit of its own; a rate is
that of the phase, over its last minute. Whoever works calls ``update(what, done, total)``: ``what`` is the name of a
phase, or of the tensor that has just been encoded. A phase ends when all of it is done, or when another one begins.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

__all__ = ["FORMAT", "Meter", "Update", "bar", "json_lines", "lines"]

# What a process is told by its environment to write progress as; see ``json_lines``.
FORMAT = "TENPAK_PROGRESS"

Update = Callable[[str, int, int], None]

_UNITS = {
    "sampling": "tokens", "calibrating": "tokens × blocks", "evaluating": "tokens", "generating": "tokens",
    "tuning": "steps", "searching": "weights", "profiling": "weights", "measuring": "tensors", "weighing": "weights",
    "merging": "blocks", "encoding": "weights", "learning": "weights", "writing": "weights", "checking": "bytes",
    "measuring memory": "models", "expected costs": "tensors", "activations": "tokens", "weights": "tensors",
    "costs": "tokens", "generation": "prompts",
}  # fmt: skip
_WINDOW = 60.0  # seconds that a rate looks back
_BETWEEN_LINES = 10.0
_BETWEEN_JSON = 0.2


@dataclass
class Meter:
    """The present phase.

    Attributes:
        unit: of phases whose unit is not known by their name.
        phase: its name, empty before the first update.
        item: the tensor that was done last, or empty.
        done: how much of the phase is done.
        total: how much there is.
    """

    unit: str
    phase: str = ""
    item: str = ""
    done: int = 0
    total: int = 0
    _started: float = field(init=False)
    _samples: deque[tuple[float, int]] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        self._started = _now()

    def begins(self, what: str, done: int) -> bool:
        """Whether such an update would begin another phase."""
        return _phase(what)[0] != self.phase or done < self.done or self.finished

    def update(self, what: str, done: int, total: int) -> None:
        """Take in how far it is."""
        now = _now()
        if self.begins(what, done):
            if self._samples:
                self._started = self._samples[-1][0]  # what lies between two phases prepares the second one
            self._samples.clear()
        self.phase, self.item = _phase(what)
        self.done, self.total = done, total
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > _WINDOW:
            self._samples.popleft()

    @property
    def finished(self) -> bool:
        """Whether all of the phase is done."""
        return bool(self.phase) and self.done >= self.total

    @property
    def rate(self) -> float:
        """Units per second; 0 where nothing is known yet."""
        if not self._samples:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        if len(self._samples) == 1:
            first = self._started, 0
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    @property
    def speed(self) -> str:
        """The rate for people."""
        return f"{_figure(self.rate)} {self._unit}/s" if self.rate else ""

    @property
    def left(self) -> str:
        """The time left for people."""
        return f"{_duration((self.total - self.done) / self.rate)} left" if self.rate else ""

    def line(self) -> str:
        """How far it is, in a line."""
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{self.phase}: {self.done:,} of {self.total:,} {self._unit}{share}", self.speed, self.left, self.item]
        return ", ".join(part for part in parts if part)

    def summary(self) -> str:
        """What a phase took, in a line."""
        seconds = self._samples[-1][0] - self._started if self._samples else 0.0
        much = f"{self.done:,}" if self.finished else f"{self.done:,} of {self.total:,}"
        speed = f", {_figure(self.done / seconds)} {self._unit}/s" if seconds > 0 else ""
        return f"{self.phase}: {much} {self._unit} in {_duration(seconds)}{speed}"

    @property
    def _unit(self) -> str:
        return _UNITS.get(self.phase, self.unit)


@contextmanager
def lines(console: Console, unit: str, *, verbose: bool = False) -> Iterator[Update]:
    """Plain lines: one every ten seconds and one at the end of each phase; with ``verbose`` one a tensor, too."""
    meter, told, closed = Meter(unit), _now(), True

    def tell(line: str) -> None:
        nonlocal told
        told = _now()
        console.print(line, soft_wrap=True, markup=False)

    def update(what: str, done: int, total: int) -> None:
        nonlocal closed
        if not closed and meter.begins(what, done):
            tell(meter.summary())
        meter.update(what, done, total)
        closed = meter.finished
        if (verbose and meter.item) or (not closed and _now() - told >= _BETWEEN_LINES):
            tell(meter.line())
        if closed:
            tell(meter.summary())

    yield update
    if not closed:
        tell(meter.summary())


@contextmanager
def bar(console: Console, unit: str, *, verbose: bool = False) -> Iterator[Update]:
    """A bar that vanishes when all is done; with ``verbose`` the lines of ``lines`` above it, which stay."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
    )
    meter = Meter(unit)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, speed="", left="")

        def update(what: str, done: int, total: int) -> None:
            meter.update(what, done, total)
            name = meter.item[-48:] or meter.phase
            progress.update(task, description=name, completed=done, total=total, speed=meter.speed, left=meter.left)

        if not verbose:
            yield update
            return
        with lines(progress.console, unit, verbose=True) as tell:

            def both(what: str, done: int, total: int) -> None:
                update(what, done, total)
                tell(what, done, total)

            yield both


@contextmanager
def json_lines(console: Console) -> Iterator[Update]:
    r"""``{"progress": [what, done, total]}`` a line, at most five a second and always at the end of a phase."""
    told = float("-inf")

    def update(what: str, done: int, total: int) -> None:
        nonlocal told
        now = _now()
        if done >= total or now - told >= _BETWEEN_JSON:
            told = now
            print(json.dumps({"progress": [what, done, total]}), file=console.file, flush=True)

    yield update


def _now() -> float:
    return time.monotonic()


def _phase(what: str) -> tuple[str, str]:
    """The phase that an update is of, and the tensor that it names in its last word: only their names have dots."""
    phase, _, tensor = what.rpartition(" ")
    return (phase or "encoding", tensor) if "." in tensor else (what, "")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"
