"""What runs here and what does not: packages, kernels, threads, memory, disk, and a small trial of the flagship codec.

The trial encodes and decodes one matrix with every instruction set that this machine has and with the plain reference.
All must give the same bytes and the same weights, products must agree within rounding; the times say what the compiled
core is worth here. Nothing is imported before it is needed: what is broken must not keep the rest from being told.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

__all__ = ["Health", "Trial", "examine", "health_rows"]

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:>=(?P<least>[\w.]+))?[^;]*(?:;.*extra == \"(?P<extra>[\w-]+)\")?")
_DEVELOPMENT = "dev"  # an extra that no user misses
# What is not possible without an extra.
_COSTS = {"datasets": "texts cannot be given as dataset ids (org/name:split:column); files and folders can"}
_SMALL, _LARGE = (64, 64), (1024, 512)  # the reference would take minutes for the large one
_STEP = 0.01
_LITTLE_DISK = 1 << 30
_ROUNDING = 1e-5  # relative: products add 64 terms in FP32, in an order of their own


@dataclass(frozen=True)
class Trial:
    """The flagship codec on a small matrix with one kind of kernels.

    Attributes:
        instruction_set: ``reference``, ``generic``, ``avx2`` or ``avx512``.
        encode: seconds per million weights, of a matrix of 1024 x 512; of 64 x 64 for the reference.
        decode: the same for decoding.
        same: whether bytes, weights and product are those of the reference.
    """

    instruction_set: str
    encode: float
    decode: float
    same: bool


@dataclass(frozen=True)
class Health:
    """What there is on this machine, in this environment.

    Attributes:
        system: ``python``, ``platform`` and ``machine``.
        packages: distribution → version, of tenpak and all that it needs; None where it is missing.
        optional: extra → distribution → version or None.
        compiled: whether the compiled core is there and loads.
        instruction_sets: that kernels can run with here, slowest first; the last one is what they run with.
        trials: one per instruction set.
        cpus: processors that this process may use.
        threads: of torch; 0 where torch cannot be imported, as for the next one.
        workers: tensors that are encoded at a time.
        memory: bytes: ``total`` and ``available``; empty where psutil is missing.
        disk: free bytes by folder: where work and artifacts go by default, and where models from the hub are kept.
        cuda: name of the CUDA device, None where there is none that torch can use.
        notes: what is missing or short, and what that costs.
        problems: what is broken.
    """

    system: Mapping[str, str]
    packages: Mapping[str, str | None]
    optional: Mapping[str, Mapping[str, str | None]]
    compiled: bool = False
    instruction_sets: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    cpus: int = 1
    threads: int = 0
    workers: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    cuda: str | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """``ok`` and the fields by name."""
        return {"ok": self.ok, **asdict(self)}


def examine(folder: Path | None = None) -> Health:
    """Look at everything; takes a few seconds, most of them for importing torch.

    Args:
        folder: where work would go, by default the current folder.
    """
    notes: list[str] = []
    problems: list[str] = []
    packages, optional = _packages(notes, problems)
    looks: dict[str, Callable[[], dict[str, Any]]] = {
        "disk": lambda: _disk(folder or Path.cwd(), notes),
        "torch": lambda: _torch(notes),
        "memory": _memory,
        "kernels": lambda: _kernels(notes, problems),
    }
    found: dict[str, Any] = {}
    for what, look in looks.items():
        try:
            found |= look()
        except Exception as error:  # an import or a kernel that fails is what is looked for here
            problems.append(f"{what}: {type(error).__name__}: {error}")
    return Health(
        system={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "machine": platform.machine(),
        },
        packages=packages,
        optional=optional,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        notes=tuple(notes),
        problems=tuple(problems),
        **found,
    )


def health_rows(health: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for people of a health's JSON."""
    needed = ", ".join(f"{name} {version or '(missing)'}" for name, version in health["packages"].items())
    rows = [
        ("system", f"Python {health['system']['python']}, {health['system']['platform']}"),
        ("packages", needed),
        *(
            (f"extra {extra}", ", ".join(f"{name} {version or '(not installed)'}" for name, version in parts.items()))
            for extra, parts in health["optional"].items()
        ),
        (
            "threads",
            f"{health['threads']} of torch, {health['workers']} tensors at a time, {health['cpus']} processors",
        ),
    ]
    if health["memory"]:
        memory = health["memory"]
        rows.append(("memory", f"{memory['available'] / 1e9:,.1f} of {memory['total'] / 1e9:,.1f} GB available"))
    rows += [("disk", f"{free / 1e9:,.1f} GB free at {path}") for path, free in health["disk"].items()]
    rows.append(("CUDA", health["cuda"] or "none"))
    if health["instruction_sets"]:
        *others, used = health["instruction_sets"]
        rows.append(
            ("kernels", f"{used}{', numpy' if used == 'reference' else ''}; also {', '.join(others) or 'none'}")
        )
    for trial in health["trials"]:
        speeds = f"encodes {1 / trial['encode']:,.3g}, decodes {1 / trial['decode']:,.3g} million weights/s"
        right = "agrees with the reference" if trial["same"] else "DIFFERS from the reference"
        if trial["instruction_set"] == "reference":
            right = "near the weight" if trial["same"] else "NOT near the weight"
        rows.append((f"trial, {trial['instruction_set']}", f"{speeds}; {right}"))
    return rows


def _packages(notes: list[str], problems: list[str]) -> tuple[dict[str, str | None], dict[str, dict[str, str | None]]]:
    """Versions of what tenpak needs, and of what its extras need."""
    needed: dict[str, str | None] = {"tenpak": _version("tenpak")}
    optional: dict[str, dict[str, str | None]] = {}
    for line in requires("tenpak") or ():
        requirement = _REQUIREMENT.match(line)
        if requirement is None or requirement["extra"] == _DEVELOPMENT:
            continue
        name, least, extra = requirement["name"], requirement["least"], requirement["extra"]
        found = _version(name)
        if extra is not None:
            optional.setdefault(extra, {})[name] = found
            continue
        needed[name] = found
        if found is None:
            problems.append(f"{name} is not installed: pip install '{name}{'>=' + least if least else ''}'")
        elif least is not None and _release(found) < _release(least):
            problems.append(f"{name} {found} is too old: pip install '{name}>={least}'")
    for extra, distributions in optional.items():
        if None in distributions.values():
            cost = _COSTS.get(extra, f"what needs {', '.join(distributions)} is not available")
            notes.append(f"without the extra {extra!r} {cost}: pip install 'tenpak[{extra}]'")
    return needed, optional


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """``2.11.0+cpu`` as numbers that compare, trailing zeros dropped."""
    numbers = [int(part) for part in re.split(r"[^\d.]", text)[0].split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _disk(folder: Path, notes: list[str]) -> dict[str, Any]:
    folders = [folder]
    if importlib.util.find_spec("huggingface_hub") is not None:
        cache = Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
        folders.append(next(path for path in (cache, *cache.parents) if path.exists()))
    found = {str(path.resolve()): shutil.disk_usage(path).free for path in folders}
    for path, free in found.items():
        if free < _LITTLE_DISK:
            notes.append(
                f"only {free / 1e6:,.0f} MB are free at {path}; `tenpak compress --dry-run` says what is needed"
            )
    if not os.access(folder, os.W_OK):
        notes.append(f"{folder} cannot be written to: give -o and --work elsewhere")
    return {"disk": found}


def _torch(notes: list[str]) -> dict[str, Any]:
    import torch

    from tenpak.kernels.parallel import worker_count

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if cuda is None:
        notes.append("torch sees no CUDA device: models run on the processor (compression always does)")
    return {"threads": torch.get_num_threads(), "workers": worker_count(), "cuda": cuda}


def _memory() -> dict[str, Any]:
    import psutil

    found = psutil.virtual_memory()
    return {"memory": {"total": found.total, "available": found.available}}


def _kernels(notes: list[str], problems: list[str]) -> dict[str, Any]:
    """Which kernels there are, and what the trial says of them."""
    from tenpak.kernels import core

    broken = _broken_core()
    if broken is not None:
        problems.append(f"the compiled core is there and does not load: {broken}; reinstall tenpak")
    names = core.instruction_sets()
    trials = _trials(names)
    problems += [f"kernels for {t.instruction_set} do not agree with the reference" for t in trials if not t.same]
    slow, fast = trials[0], trials[-1]
    if len(trials) == 1:
        notes.append(
            "the compiled core is not there, so numpy does its work, which is far slower (the trial shows how slow): "
            "install a C++20 compiler and reinstall tenpak"
        )
    else:
        notes.append(
            f"the compiled core encodes trellises {slow.encode / fast.encode:,.0f} times as fast as numpy here, "
            f"and decodes them {slow.decode / fast.decode:,.0f} times as fast (one matrix)"
        )
    return {"compiled": len(names) > 1, "instruction_sets": names, "trials": trials}


def _broken_core() -> str | None:
    """Why the compiled module does not load although it is there; None where it loads or was never built."""
    name = "tenpak._native"
    if name in sys.modules or importlib.util.find_spec(name) is None:
        return None
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken build may raise
        return str(error).splitlines()[0]
    return None


def _trials(names: tuple[str, ...]) -> tuple[Trial, ...]:
    """The same matrices by every instruction set, the reference first, which gets the small one only."""
    import torch

    from tenpak.codecs.trellis import Trellis
    from tenpak.kernels import core

    generator = torch.Generator().manual_seed(0)
    large = 0.02 * torch.randn(_LARGE, generator=generator)
    small = large[: _SMALL[0], : _SMALL[1]].contiguous()
    x = torch.randn(4, small.shape[1], generator=generator)
    codec = Trellis(step=_STEP, calibrated=False)
    found: list[Trial] = []
    expected: tuple[torch.Tensor, torch.Tensor] | None = None
    for name in names:
        with core.using(name):
            payload = codec.encode(small)
            stream, decoded = payload.tensors["stream"], codec.decode(payload)
            product = codec.matmul(x, codec.prepare(payload))
            times = _times(codec, large if found else small)
        if expected is None:  # levels are two steps wide: the reference must at least be near the weight
            same = bool((decoded - small).abs().max() < 4 * _STEP)
            expected = stream, decoded
        else:
            same = torch.equal(stream, expected[0]) and torch.equal(decoded, expected[1])
        exact = x @ expected[1].T
        close = torch.allclose(product, exact, rtol=_ROUNDING, atol=_ROUNDING * float(exact.abs().max()))
        found.append(Trial(name, *times, same and close))
    return tuple(found)


def _times(codec: Any, weight: Any) -> tuple[float, float]:
    """Seconds per million weights to encode and to decode one matrix."""
    started = time.perf_counter()
    payload = codec.encode(weight)
    encoded = time.perf_counter()
    codec.decode(payload)
    million = weight.numel() / 1e6
    return (encoded - started) / million, (time.perf_counter() - encoded) / million
