"""Plans over mixed candidates beside the best single recipe and the tables of older systems; budgets met; the solver.

    python benchmarks/run.py mixtures

One recipe everywhere, embeddings and head included, at every size it has; then a plan over all of these recipes at the
same bytes. The tables (``mixed``, ``buckets``) are compared with plans over the grids that they choose among. Nothing
is tuned. Then whether budgets from 2 to 8 bits per weight are met to half a per cent by the written files, and budgets
of quality from below. Needs the shared models and texts.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from quality import TOKENS, WINDOW, selected, shared, tenpak, wanted

from tenpak.allocation.solver import solve

MODELS = ("babyllama-tok105-0.94m", "tinystories-3.7m")
SINGLES = (
    "gptq-vq8x256", "gptq-vq4x256", "gptq-int2:g128", "gptq-int2:g64", "gptq-int2:g32", "gptq-int3:g128",
    "gptq-int3:g64", "gptq-int3:g32", "gptq-int4:g64", "gptq-int4:g32", "gptq-int5:g32", "gptq-int6:g32",
)  # fmt: skip
RANGE = 2.0, 3.6  # bits per weight of the singles that plans are compared with
GRIDS = (
    "gptq-int2:g32", "gptq-int3:g64", "gptq-int3:g32", "gptq-int4:g64", "gptq-int4:g32", "gptq-int4:g16",
    "gptq-int4:g8", "gptq-int5:g32", "gptq-int6:g32", "gptq-int8:g64",
)  # fmt: skip
TABLES = {
    "mixed, as published": ("--policy", "mixed"),
    "mixed, gptq": ("--policy", "mixed", "--recipe", "gptq-int4:g32"),
    "buckets, as published": ("--policy", "buckets"),
    "buckets, gptq": ("--policy", "buckets", "--recipe", "gptq-int4:g32"),
}
BITS = (2, 2.5, 3, 3.5, 4, 5, 6, 8)
SIZED = ("stories260k", *MODELS)
LIMITS = (("--max-kl", "0.05"), ("--max-kl", "0.01"), ("--max-ppl-increase", "1%"))


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each part."""
    result: dict[str, Any] = {"window": WINDOW, "calibration_tokens": TOKENS}
    if wanted("solver"):
        result["solver"] = solver()
    with tempfile.TemporaryDirectory(prefix="tenpak-mixtures-") as folder:
        for name in filter(selected, SIZED):
            case = Case(name, Path(folder) / name)
            parts = (case.singles, case.tables, case.limits, case.sizes) if name in MODELS else (case.sizes,)
            for part in parts:
                if wanted(part.__name__):
                    result.setdefault(part.__name__, {})[name] = part()
                    yield result


class Case:
    """A model with its statistics, collected once."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir()
        self.name, self.folder, self.model = name, folder, shared() / "models" / name
        texts = shared() / "data"
        self.text = texts / "tinystories_eval.txt"
        self.read = ("--calibration", texts / "tinystories_train.txt", "--calibration-tokens", str(TOKENS))
        self.read += ("--calibration-window", str(WINDOW))
        tenpak("calibrate", self.model, "-o", folder / "statistics", *self.read)
        self.read += ("--statistics", folder / "statistics")

    def singles(self) -> dict[str, Any]:
        """One recipe everywhere, and plans over all of them at the bytes of each."""
        found = dict(zip(SINGLES, each(self.single, SINGLES), strict=True))
        profile = self.profile("singles", SINGLES)
        within = [r for r in SINGLES if RANGE[0] <= found[r]["bpw"] <= RANGE[1]]
        plans = each(lambda recipe: self.planned(profile, recipe, found[recipe]["bytes"]), within)
        rows = {}
        for recipe, plan in zip(within, plans, strict=True):
            best = min(
                (r for r in SINGLES if found[r]["bytes"] <= found[recipe]["bytes"]), key=lambda r: found[r]["kl"]
            )
            rows[recipe] = {"best": best, "best_kl": found[best]["kl"], "plan": plan}
        return {"singles": found, "plans": rows}

    def single(self, recipe: str) -> dict[str, Any]:
        return self.measured(f"single {recipe}", "compress", "--recipe", recipe, "--set", f"*={recipe}")

    def tables(self) -> dict[str, Any]:
        """The tables of older systems, and a plan at the bytes of each."""
        found = dict(zip(TABLES, each(lambda n: self.measured(n, "compress", *TABLES[n]), TABLES), strict=True))
        profile = self.profile("grids", GRIDS)
        plans = each(lambda name: self.planned(profile, name, found[name]["bytes"]), TABLES)
        return {name: {"table": found[name], "plan": plan} for name, plan in zip(TABLES, plans, strict=True)}

    def profile(self, name: str, recipes: Sequence[str]) -> Path:
        path = self.folder / f"{name}.json"
        tenpak("profile", self.model, "-o", path, *self.read, "--candidates", ",".join(recipes))
        return path

    def planned(self, profile: Path, name: str, limit: int) -> dict[str, Any]:
        """The plan of a profile within a limit, encoded and measured."""
        path = self.folder / f"plan {name}.json"
        plan = tenpak("allocate", profile, "-o", path, "--max-bytes", f"{limit}B")
        found = self.measured(f"plan at {name}", "encode", "--plan", path)
        return {**found, "limit": limit, "predicted": plan["loss"], "bound": plan["bound"]}

    def measured(self, name: str, verb: str, *options: str | Path) -> dict[str, Any]:
        """An artifact, measured in a fresh process."""
        out = self.folder / f"out {name}"
        tenpak(verb, self.model, "-o", out, *options, *self.read, "--evaluation", "none")
        found = tenpak("evaluate", out, "--against", self.model, "--text", self.text, "--window", str(WINDOW))
        print(f"{self.name}: {name}: {found['bpw']:.3f} bpw, KL {found['kl']:.5f}", file=sys.stderr)
        return {key: found[key] for key in ("bytes", "bpw", "kl", "kl_se", "ppl_increase", "ppl_increase_se")}

    def sizes(self) -> dict[str, Any]:
        """Written bytes of mixtures by what was allowed; None where the model's headers alone are too much."""

        def written(bits: float) -> dict[str, Any] | None:
            try:
                report = tenpak(
                    "compress", self.model, "-o", self.folder / f"bpw {bits}", "--bpw", str(bits), "--tune", "0",
                    "--candidates", "default,trellis", *self.read, "--evaluation", "none",
                )  # fmt: skip
            except Exception:  # which budget cannot be met is told on stderr
                return None
            promise = report["search"]["promise"]
            print(f"{self.name}: {bits} bpw: {promise['reached'] / promise['limit'] - 1:+.3%}", file=sys.stderr)
            return {"limit": promise["limit"], "bytes": report["bytes"]}

        return dict(zip(map(str, BITS), each(written, BITS), strict=True))

    def limits(self) -> list[dict[str, Any]]:
        """Budgets of quality, of the flagship and over mixtures."""
        kinds: list[tuple[str, tuple[str, ...]]] = [("flagship", ()), ("mixture", ("--candidates", "default"))]
        jobs = [(kind, more, limit) for limit in LIMITS for kind, more in kinds]

        def met(job: tuple[str, tuple[str, ...], tuple[str, str]]) -> dict[str, Any]:
            kind, more, limit = job
            out = self.folder / f"limit {kind} {' '.join(limit)}"
            report = tenpak(
                "compress", self.model, "-o", out, *limit, *more, "--tune", "0", *self.read, "--evaluation", self.text
            )  # fmt: skip
            search = report["search"]
            print(f"{self.name}: {kind} {limit}: {search['promise']}", file=sys.stderr)
            keys = ("error", "tokens", "tokens_for_5_percent")
            return {
                "kind": kind, "budget": search["budget"], "trials": len(search["trials"]), "bpw": report["bpw"],
                **search["promise"], **{key: search.get(key) for key in keys},
            }  # fmt: skip

        return each(met, jobs)


def each(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """One at a time per core: commands are single-threaded, and most of one is starting."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))


def solver() -> dict[str, Any]:
    """A thousand tensors with forty candidates: seconds of processor time and gap."""
    random = np.random.default_rng(0)
    groups = []
    for _ in range(1000):
        size, importance = float(random.integers(1, 200)) * 65536, math.exp(2 * random.normal())
        bits, noise = np.sort(random.uniform(1, 8, 40)), random.uniform(0.7, 1.4, 40)
        losses = 1e-9 * importance * size * 4.0**-bits * noise
        groups.append(list(zip((size * bits // 8).tolist(), losses.tolist(), strict=True)))
    rows = {}
    for share in (2.0, 3.0, 4.5):
        limit = sum(group[-1][0] for group in groups) * share / 8
        started = time.process_time()
        found = solve(groups, limit)
        rows[f"{share:g} bits"] = {"seconds": time.process_time() - started, "gap": found.gap}
    return rows
