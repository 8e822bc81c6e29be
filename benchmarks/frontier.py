"""The flagship codec beside others at every size, and each of its ingredients left out in turn.

    python benchmarks/run.py frontier        KL by file bytes: trellis, GPTQ, nearest, normalfloat, nncodec
    python benchmarks/run.py ingredients     at twelve times smaller than FP32

Everything on one model of real text, windows of 256 tokens, embeddings treated like the rest, nothing tuned unless a
row says so. Sizes are those of the weight files; of nncodec (the ISO standard's dependent quantization and DeepCABAC,
which knows no data) those of its bitstream. It runs in an environment of its own, made once in the user's cache, with
only the modules that coding needs; its other imports (image data sets and the like) are replaced by empty ones.

An ingredient's row is measured at two steps, the second one near the bytes of the base, and read off at these bytes on
a line through the logarithms.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ablation import keep_diagonal
from quality import TOKENS, WINDOW, compressed, shared, tenpak

MODEL = "babyllama-tok105-0.94m"
NNCODEC = "2.1.3"
STEPS_OF_NNCODEC = (-22, -28, -34, -40, -46)  # its quantization parameter
BITS = (2, 3, 4, 6, 8)
FEW_TOKENS = 16_384  # of calibration, where ingredients are compared
STEP = 0.000628  # of the base, about twelve times smaller
TUNING = (60, 240)

# Row → words behind the step, options.
INGREDIENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "all (the base)": ("", ()),
    "32 states": (":states=32", ()),
    "8 states": (":states=8", ()),
    "4 states": (":states=4", ()),
    "1 state: a uniform quantizer": (":states=1", ()),
    "no rate in the choice of levels": (":rate=0", ()),
    "blocks see their own inputs, targets uncorrected": ("", ("--propagation", "own")),
    "no propagation": ("", ("--propagation", "none")),
    "no propagation, diagonal of the Hessian: no feedback": ("", ("--statistics", "diagonal")),
    "no data": (":datafree", ()),
    **{f"tuned, at most {steps} steps": ("", ("--tune", str(steps))) for steps in TUNING},
}
DATA_FREE_STEP = 0.30  # in units of weights, not of the loss


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each method."""
    model, texts = shared() / "models" / MODEL, shared() / "data"
    methods: dict[str, list[dict[str, Any]]] = {}
    for name, points in frontier().items():
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            methods[name] = list(pool.map(partial(tenpak_run, model, texts), points))
        yield {"model": MODEL, "window": WINDOW, "calibration_tokens": TOKENS, "methods": methods}
    methods["nncodec"] = nncodec(model, texts / "tinystories_eval.txt")
    yield {"model": MODEL, "window": WINDOW, "calibration_tokens": TOKENS, "methods": methods}


def frontier() -> dict[str, list[tuple[str, ...]]]:
    """Method → options of `tenpak compress` for each of its points."""

    def everywhere(recipe: str) -> tuple[str, ...]:
        return "--recipe", recipe, "--set", f"*={recipe}"

    return {
        "trellis": [("--bpw", f"{bits:g}", "--tune", "0") for bits in (2, 3, 4, 6, 8)],
        "gptq": [everywhere(f"gptq-int{bits}:g32") for bits in BITS],
        "nearest": [everywhere(f"int{bits}:g32") for bits in BITS],
        "normalfloat": [everywhere(f"nf{bits}:g64") for bits in (2, 3, 4)],
    }


def run_ingredients() -> dict[str, Any]:
    """The base and all that differ from it in one thing."""
    model, texts = shared() / "models" / MODEL, shared() / "data"
    with tempfile.TemporaryDirectory(prefix="tenpak-ingredients-") as folder:
        read = ("--calibration-tokens", str(FEW_TOKENS), "--calibration-window", str(WINDOW))
        text = texts / "tinystories_train.txt"
        tenpak("calibrate", model, "-o", Path(folder) / "full", "--calibration", text, *read)
        keep_diagonal(Path(folder))
        base = tenpak_run(model, texts, recipe(STEP, ""), FEW_TOKENS)
        measure = partial(ingredient, model, texts, Path(folder), base)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            rows = dict(zip(INGREDIENTS, pool.map(measure, INGREDIENTS), strict=True))
    return {"model": MODEL, "window": WINDOW, "calibration_tokens": FEW_TOKENS, "bytes": base["bytes"], "rows": rows}


def ingredient(model: Path, texts: Path, statistics: Path, base: dict[str, Any], name: str) -> dict[str, Any]:
    """A row: at a step that is a little too fine, then where the bytes should be those of the base."""
    words, options = INGREDIENTS[name]
    given = tuple(str(statistics / word) if word == "diagonal" else word for word in options)
    step = 0.93 * (DATA_FREE_STEP * weight_scale(model) if "datafree" in words else STEP)
    points = [tenpak_run(model, texts, (*recipe(step, words), *given), FEW_TOKENS)]
    step *= 2 ** (points[0]["bpw"] - base["bpw"])  # an octave is about a bit
    points.append(tenpak_run(model, texts, (*recipe(step, words), *given), FEW_TOKENS))
    return {"points": points, "kl": read_off(points, base["bytes"])}


def recipe(step: float, words: str) -> tuple[str, ...]:
    return "--recipe", f"trellis:{step:.6g}{words}", "--set", f"*=trellis:{step:.6g}{words}"


def weight_scale(model: Path) -> float:
    """Root mean square of a model's matrices."""
    from safetensors.torch import load_file

    matrices = [tensor.float() for tensor in load_file(model / "model.safetensors").values() if tensor.ndim == 2]
    return math.sqrt(sum(float(m.square().sum()) for m in matrices) / sum(m.numel() for m in matrices))


def read_off(points: list[dict[str, Any]], at: int) -> float:
    """KL at so many bytes, on the line through two points, in logarithms."""
    (x0, y0), (x1, y1) = ((point["bytes"], math.log(point["kl"])) for point in points)
    return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))


def tenpak_run(model: Path, texts: Path, options: tuple[str, ...], tokens: int = TOKENS) -> dict[str, Any]:
    """Compress and evaluate, each in a process of its own."""
    # With a text its blocks would be followed, whatever the statistics.
    calibration = None if "--statistics" in options else texts / "tinystories_train.txt"
    report, found = compressed(model, options, calibration, texts / "tinystories_eval.txt", tokens)
    print(f"{' '.join(options[:2])} …: {found['bpw']:.3f} bpw, KL {found['kl']:.5f}", file=sys.stderr)
    keys = ("bytes", "bpw", "kl", "kl_se", "ppl_increase", "ppl_increase_se")
    return {"options": [Path(o).name for o in options], "recipe": report["recipe"], **{key: found[key] for key in keys}}


# nncodec -------------------------------------------------------------------------------------------------------------


def nncodec(model: Path, text: Path) -> list[dict[str, Any]]:
    """Its bitstreams, decoded and measured like any other model."""
    python = peer_environment()
    points = []
    with tempfile.TemporaryDirectory(prefix="tenpak-nncodec-") as folder:
        for qp in STEPS_OF_NNCODEC:
            job = {"model": str(model / "model.safetensors"), "qp": qp, "out": f"{folder}/{qp}.safetensors"}
            command = [python, Path(__file__).with_name("nncodec_run.py"), json.dumps(job)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            size = int(done.stdout.strip().splitlines()[-1])
            points.append({"qp": qp, "bytes": size, **compared(model, Path(job["out"]), text)})
            print(f"nncodec {qp}: {size:,} bytes, KL {points[-1]['kl']:.5f}", file=sys.stderr)
    return points


def peer_environment() -> Path:
    """The interpreter of nncodec's environment, which is made where there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tenpak" / f"nncodec-{NNCODEC}-python-{sys.version_info.major}.{sys.version_info.minor}"
    interpreter, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "-q", "--no-deps", f"nncodec=={NNCODEC}"], check=True)
        # torch, numpy and safetensors are the same as here.
        packages = Path(str(find_spec("torch").origin)).parents[1]
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "shared.pth").write_text(f"{packages}\n")
        ready.touch()
    return interpreter


def compared(model: Path, weights: Path, text: Path) -> dict[str, Any]:
    """KL and perplexity of a model with other weights."""
    from safetensors.torch import load_file

    from tenpak.calibration.text import load_text, tokenize
    from tenpak.evaluation.evaluate import load_original, load_tokenizer
    from tenpak.evaluation.fidelity import fidelity

    original, other = load_original(model), load_original(model)
    other.load_state_dict(load_file(weights), strict=False)
    tokens = tokenize(load_tokenizer(model), load_text(text))
    found = fidelity(original, other, tokens, window=WINDOW).to_json()
    return {key: found[key] for key in ("kl", "kl_se", "ppl_increase", "ppl_increase_se")}
