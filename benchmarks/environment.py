"""What a result must say about where it comes from: machine, commit, versions. And how results are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Under these names a result holds its cases by name, which a later run may measure again one by one.
CASES = ("cases", "models")
PARTS = ("singles", "tables", "limits", "sizes")  # of mixtures: what is measured of a case is in several places
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """Processor, cores, commit (with a mark if the tree differs from it) and versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks", "models", ":!benchmarks/results")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tenpak", "torch", "transformers", "numpy")},
        "commit": commit + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write(name: str, result: dict[str, Any], *, part: bool = False, row: str | None = None) -> Path:
    """Write ``results/<name>.json`` with the environment.

    Args:
        name: of the benchmark.
        result: what it found.
        part: put its cases in the place of those that are there, each with the environment that it was measured in
            under ``environments``, and leave the others.
        row: words by which rows were chosen: the other rows of a case stay too.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, now = RESULTS / f"{name}.json", environment()
    content = {"environment": now, **result}
    if part and path.is_file():
        content = json.loads(path.read_text())
        content |= {key: value for key, value in result.items() if key not in (*CASES, *PARTS)}
        known = content.setdefault("environments", {})
        for under in {*CASES, *PARTS} & result.keys():
            for case, rows in result[under].items():
                if under in PARTS:
                    content[under][case] = rows
                    known[f"{case}, {under}"] = now
                elif row is not None:
                    content[under].setdefault(case, {}).update(rows)
                    known.update({f"{case}, {measured}": now for measured in rows})
                else:
                    content[under][case] = rows
                    for key in [key for key in known if key.startswith(f"{case}, ")]:
                        del known[key]
                    known[case] = now
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def environments(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What parts of a result were measured in: its own, under an empty name, and those of cases measured later."""
    yield "", result["environment"]
    yield from result.get("environments", {}).items()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
