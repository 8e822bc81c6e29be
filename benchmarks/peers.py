"""tenpak's GPTQ against llm-compressor's: KL and time at the same bits, groups, damping and calibration windows.

llm-compressor runs in an environment of its own, which is made once in the user's cache, with the torch release that
tenpak runs on and whatever else it asks for. Both get the same windows of the same text, quantize the linear layers of
the blocks of an FP32 model to 4 bits asymmetric and leave embeddings and head as they are. Where a group does not
divide a layer's inputs, which llm-compressor refuses, that layer gets one group per row in both. tenpak stores an FP16
scale and offset per group, llm-compressor a scale of the model's dtype (here FP32) and a zero point of 4 bits.

Quality is that of what each wrote: the artifact; the compressed checkpoint, decompressed to a plain FP32 one by
llm-compressor's own code. Both are measured against the original on the same disjoint windows.

Seconds, taken in interleaved runs: ``inside`` from reading the model to having written the result, imports left out;
``process`` all of the process; ``cpu`` its processor time. tenpak tokenizes the text, llm-compressor is given tokens,
one window at a time, its default (16 at a time took it longer here). One thread each: two threads on two cores that
others use, too, wait for each other more than they compute.

    python benchmarks/run.py peers             half an hour
    PYTHON benchmarks/peers.py JOB.json        what runs in llm-compressor's environment
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environment import ROOT

LLMCOMPRESSOR = "0.14.0.1"
TOKENS = 131_072
WINDOW = 256  # of the evaluation; calibration windows are as long as the model's context, as tenpak has them
DAMPING = 0.01
ROUNDS = 3
THREADS = 1
PART = 10 * WINDOW  # tokens of a part of the evaluation text, over which standard errors are taken


@dataclass(frozen=True)
class Way:
    """The same thing said to both.

    Attributes:
        recipe: options that follow tenpak's recipe.
        peer: fields of llm-compressor's modifier; what is not said is its default.
        observer: llm-compressor's way to a group's range.
        options: further options of tenpak's compress.
        rounds: how often both run.
    """

    recipe: str
    peer: dict[str, Any]
    options: tuple[str, ...] = ()
    observer: str = "memoryless_minmax"
    rounds: int = 1


WAYS = {
    "natural order": Way("", {"actorder": None}, rounds=ROUNDS),
    "natural order, no propagation": Way("", {"actorder": None}, ("--propagation", "none"), rounds=ROUNDS),
}


@dataclass(frozen=True)
class Case:
    """A model, the size of groups, and what both calibrate and are measured on.

    Attributes:
        model: its folder.
        group: weights per group.
        linears: path of each linear layer of the blocks → its inputs.
        text: file with as much of the calibration text as is read.
        windows: file with the same as tokens, int64 ``[windows, window]``.
        tokens: how many these are.
        window: tokens per calibration window.
        evaluation: tokens to measure on.
    """

    model: Path
    group: int
    linears: dict[str, int]
    text: Path
    windows: Path
    tokens: int
    window: int
    evaluation: Any = field(repr=False)

    @property
    def by_row(self) -> list[str]:
        """Kinds of layers whose inputs the group does not divide."""
        return sorted({name.rpartition(".")[2] for name, inputs in self.linears.items() if inputs % self.group})

    @property
    def by_group(self) -> list[str]:
        """The others."""
        return sorted({name.rpartition(".")[2] for name, inputs in self.linears.items() if inputs % self.group == 0})


def run() -> Iterator[dict[str, Any]]:
    """The results so far, after each case."""
    shared = Path(os.environ.get("TENPAK_SHARED", ROOT.parent / "shared"))
    texts = shared / "data" / "tinystories_train.txt", shared / "data" / "tinystories_eval.txt"
    models = {
        shared / "models" / "babyllama-tok105-0.94m": (32, 128),
        ROOT / "models" / "tinystories-3.7m": (32,),
        shared / "models" / "stories260k": (32,),
    }
    if not all(path.exists() for path in (*texts, *models)):
        print(f"peers: skipped, the models and texts that it compares on are not in {shared}", file=sys.stderr)
        return
    python = peer_environment()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tenpak-peers-") as name:
        for model, groups in models.items():
            for group in groups:
                folder = Path(name) / f"{model.name}-g{group}"
                folder.mkdir()
                found = compare(prepare(model, group, *texts, folder), python, folder)
                results[f"{model.name}, g{group}"] = found
                yield {**conditions(python), "cases": results}


def conditions(python: Path) -> dict[str, Any]:
    """What all cases share."""
    code = (
        "import json; from importlib.metadata import version as v; "
        "print(json.dumps({n: v(n) for n in ('llmcompressor', 'compressed-tensors', 'torch', 'transformers')}))"
    )
    versions = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return {
        "peer": {"name": "llm-compressor", "versions": versions},
        "bits": 4,
        "damping": DAMPING,
        "window": WINDOW,
        "threads": THREADS,
        "rounds": ROUNDS,
    }


def peer_environment() -> Path:
    """The interpreter of llm-compressor's environment, which is made where there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    torch = version("torch").partition("+")[0]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / "tenpak" / f"llmcompressor-{LLMCOMPRESSOR}-torch-{torch}-python-{python}"
    interpreter, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return interpreter
    print(f"peers: setting up {folder} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    # The same torch in both: their kernels are not what is compared.
    constraint = folder / "constraints.txt"
    constraint.write_text(f"torch=={torch}\n")
    command = [interpreter, "-m", "pip", "install", "-q", "-c", constraint, f"llmcompressor=={LLMCOMPRESSOR}"]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        sys.exit(f"peers: llm-compressor {LLMCOMPRESSOR} cannot be installed beside torch {torch}; pip says why")
    ready.touch()
    return interpreter


def prepare(model: Path, group: int, calibration: Path, evaluation: Path, folder: Path) -> Case:
    """Texts and tokens of a case, written to ``folder``."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from tenpak.calibration.text import context_length, load_text, tokenize
    from tenpak.evaluation.evaluate import load_tokenizer

    tokenizer = load_tokenizer(model)
    text, size = load_text(calibration), TOKENS
    while (ids := tokenize(tokenizer, text[:size])).numel() < TOKENS and size < len(text):
        size += size // 4
    window = context_length(AutoConfig.from_pretrained(model))
    windows = ids[: min(TOKENS, ids.numel()) // window * window].view(-1, window)
    (folder / "calibration.txt").write_text(text[:size])
    save_file({"windows": windows}, folder / "windows.safetensors")
    with safe_open(model / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if ".layers." in name}  # noqa: SIM118
    return Case(
        model=model,
        group=group,
        linears={name.removesuffix(".weight"): shape[1] for name, shape in shapes.items() if len(shape) == 2},
        text=folder / "calibration.txt",
        windows=folder / "windows.safetensors",
        tokens=windows.numel(),
        window=window,
        evaluation=tokenize(tokenizer, load_text(evaluation)),
    )


def compare(case: Case, python: Path, folder: Path) -> dict[str, Any]:
    """Both on one case, in every way."""
    ways = {name: compare_way(case, way, python, folder / name) for name, way in WAYS.items()}
    return {
        "model": case.model.name,
        "group": case.group,
        "one_group_per_row": case.by_row,
        "calibration_tokens": case.tokens,
        "calibration_window": case.window,
        "ways": ways,
    }


def compare_way(case: Case, way: Way, python: Path, folder: Path) -> dict[str, Any]:
    """Both, ``way.rounds`` times, in turns that start with the other every time."""
    runs: dict[str, list[dict[str, Any]]] = {"tenpak": [], "llm-compressor": []}
    for number in range(way.rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            out = folder / f"{name} {number}"
            out.mkdir(parents=True)
            made = run_tenpak(case, way, out) if name == "tenpak" else run_peer(case, way, python, out)
            runs[name].append(made)
            print(f"{folder}: {name}: {made['seconds']['inside']:.1f} s", file=sys.stderr)
    restored = restore(case, python, folder / "llm-compressor 0")
    levels = most_levels(case, restored)
    measured = measure(case, folder / "tenpak 0" / "artifact", restored)
    measured["llm-compressor"]["most_levels_in_a_group"] = levels
    print(f"{folder}: KL of tenpak's / llm-compressor's: {measured['kl_ratio']:.3f}", file=sys.stderr)
    for name, made in runs.items():
        measured[name]["bits_per_weight"] = made[0]["bits"]
        measured[name]["seconds"] = {
            kind: summary([one["seconds"][kind] for one in made]) for kind in ("inside", "process", "cpu")
        }
    modifier = {"dampening_frac": DAMPING, **way.peer, "observer": way.observer}
    return {"recipe": recipe_of(f"g{case.group}", way), "modifier": modifier, **measured}


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and all."""
    return {"median": round(statistics.median(seconds), 2), "runs": [round(s, 2) for s in seconds]}


def recipe_of(group: str, way: Way) -> str:
    return f"gptq-int4:{group}:damp={DAMPING}{way.recipe}"


def run_tenpak(case: Case, way: Way, folder: Path) -> dict[str, Any]:
    """Compress with tenpak's command line."""
    command: list[str | Path] = [sys.executable, "-m", "tenpak", "compress", case.model, "-o", folder / "artifact"]
    command += ["--recipe", recipe_of(f"g{case.group}", way), "--set", "embed*=dense", *way.options]
    for kind in case.by_row:
        command += ["--set", f"*.{kind}.*={recipe_of('row:asym', way)}"]
    command += ["--calibration", case.text, "--calibration-tokens", str(case.tokens), "--evaluation", "none", "--json"]
    done, seconds = timed(command)
    report = json.loads(done)
    used = json.loads((folder / "artifact" / "manifest.json").read_text())["calibration"]
    if (used["tokens"], used["window"]) != (case.tokens, case.window):
        sys.exit(f"peers: tenpak calibrated on {used}, llm-compressor gets {case.tokens} in windows of {case.window}")
    return {
        "bits": report["payload_bits"] / report["compressed_parameters"],
        "seconds": {"inside": report["seconds"], **seconds},
    }


def run_peer(case: Case, way: Way, python: Path, folder: Path) -> dict[str, Any]:
    """Compress with llm-compressor."""
    job = {
        "step": "compress",
        "model": str(case.model),
        "windows": str(case.windows),
        "out": str(folder / "compressed"),
        "group": case.group,
        "by_group": case.by_group,
        "by_row": case.by_row,
        "observer": way.observer,
        "modifier": {"dampening_frac": DAMPING, **way.peer},
    }
    done, seconds = run_job(job, python, folder)
    return {**done, "seconds": {"inside": done["seconds"], **seconds}}


def restore(case: Case, python: Path, folder: Path) -> Path:
    """A plain checkpoint of what llm-compressor wrote."""
    job = {"step": "restore", "model": str(case.model), "out": str(folder / "plain")}
    run_job({**job, "compressed": str(folder / "compressed")}, python, folder)
    return folder / "plain"


def run_job(job: dict[str, Any], python: Path, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """A step in llm-compressor's environment: what it says, and its seconds."""
    path = folder / f"{job['step']}.json"
    path.write_text(json.dumps({**job, "answer": str(folder / "answer.json")}))
    _, seconds = timed([python, Path(__file__), path])
    return json.loads((folder / "answer.json").read_text()), seconds


def timed(command: list[str | Path]) -> tuple[str, dict[str, float]]:
    """Standard output of a command, its wall time and its processor time."""
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **threads, **offline}
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"peers: {' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, {"process": wall, "cpu": cpu}


def most_levels(case: Case, folder: Path) -> int:
    """The most different values in a group of a plain checkpoint; everything but the linear layers is the original's.

    Exits where a group has more than 16, or anything else has changed.
    """
    from tenpak.evaluation.evaluate import load_original

    found, original, most = load_original(folder).state_dict(), load_original(case.model).state_dict(), 0
    for name, weight in original.items():
        inputs = case.linears.get(name.removesuffix(".weight"))
        if inputs is None:
            if not found[name].equal(weight):
                sys.exit(f"peers: llm-compressor changed {name}")
            continue
        group = case.group if inputs % case.group == 0 else inputs
        ordered = found[name].view(-1, group).sort(-1).values
        most = max(most, 1 + int((ordered.diff() > 0).sum(-1).max()))
    if most > 16:
        sys.exit(f"peers: a group of llm-compressor's result has {most} levels")
    return most


def measure(case: Case, ours: Path, theirs: Path) -> dict[str, Any]:
    """KL and perplexity of both, the ratio of their KL, and standard errors (jackknife over parts of the text)."""
    import torch
    from transformers.utils import logging

    import tenpak
    from tenpak.evaluation.evaluate import load_original
    from tenpak.evaluation.fidelity import fidelity

    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    original, tokens = load_original(case.model), case.evaluation
    models = tenpak.load(ours, runtime="speed", dtype="float32"), load_original(theirs)
    starts = range(0, len(tokens) - PART, PART)
    # A part ends with the token that the next one begins with: its last input's target. The last takes what remains.
    parts = [tokens[start : start + PART + 1 if start != starts[-1] else len(tokens)] for start in starts]
    rows = []
    for part in parts:
        found = [fidelity(original, model, part, window=WINDOW, stride=WINDOW) for model in models]
        logs = [math.log1p(each.ppl_increase) for each in found]
        rows.append(torch.tensor([1.0, *(each.kl for each in found), *logs], dtype=torch.float64) * found[0].tokens)

    def figures(table: torch.Tensor) -> torch.Tensor:
        tokens, kl, kl_theirs, log, log_theirs = table.sum(0)
        return torch.stack([kl / tokens, kl_theirs / tokens, kl / kl_theirs, log / tokens, log_theirs / tokens])

    table = torch.stack(rows)
    without = torch.stack([figures(torch.cat([table[:i], table[i + 1 :]])) for i in range(len(table))])
    errors = ((without - without.mean(0)).square().sum(0) * (len(table) - 1) / len(table)).sqrt().tolist()
    kl, kl_theirs, ratio, log, log_theirs = figures(table).tolist()
    return {
        "tenpak": {"kl": kl, "kl_se": errors[0], "ppl_increase": math.expm1(log)},
        "llm-compressor": {"kl": kl_theirs, "kl_se": errors[1], "ppl_increase": math.expm1(log_theirs)},
        "kl_ratio": ratio,
        "kl_ratio_se": errors[2],
        "tokens": len(tokens) - 1,
    }


# In llm-compressor's environment --------------------------------------------------------------------------------------


def compress_there(job: dict[str, Any]) -> dict[str, Any]:
    """Calibrate, quantize and save; the seconds are those after the imports."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    windows = load_file(job["windows"])["windows"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")

    def scheme(kinds: list[str], **strategy: Any) -> QuantizationScheme:
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, observer=job["observer"], **strategy)
        return QuantizationScheme(targets=[rf"re:.*\.layers\..*\.{kind}$" for kind in kinds], weights=weights)

    schemes = {"groups": scheme(job["by_group"], strategy="group", group_size=job["group"])}
    if job["by_row"]:
        schemes["rows"] = scheme(job["by_row"], strategy="channel")
    targets = [target for one in schemes.values() for target in one.targets]
    oneshot(
        model=model,
        recipe=GPTQModifier(targets=targets, config_groups=schemes, **job["modifier"]),
        dataset=Dataset.from_dict({"input_ids": windows.tolist()}),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        max_seq_length=windows.shape[1],
    )
    model.save_pretrained(job["out"])
    seconds = time.perf_counter() - start
    stored = {
        name: tensor for path in Path(job["out"]).glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    parts = {name: tensor for name, tensor in stored.items() if ".weight_" in name}
    weights = sum(int(tensor.prod()) for name, tensor in parts.items() if name.endswith(".weight_shape"))
    return {"seconds": seconds, "bits": 8 * sum(tensor.nbytes for tensor in parts.values()) / weights}


def restore_there(job: dict[str, Any]) -> dict[str, Any]:
    """Decompress what was saved into the original's class."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(job["compressed"], dtype="float32", quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
    weights = found.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    plain.save_pretrained(job["out"])
    return {}


if __name__ == "__main__":
    the_job = json.loads(Path(sys.argv[1]).read_text())
    answer = {"compress": compress_there, "restore": restore_there}[the_job["step"]](the_job)
    Path(the_job["answer"]).write_text(json.dumps(answer))
