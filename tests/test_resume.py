"""A run that was killed goes on where it was, and makes the artifact that it would have made."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from families import make_tiny_talker
from forked import Forked
from safetensors.torch import load_file, save_file

import tenpak
from tenpak.errors import ArtifactError, CalibrationError
from tenpak.job import open_job
from tenpak.recipes import parse
from tenpak.report.report import Report
from tenpak.work import Unit, Work

pytestmark = pytest.mark.filterwarnings("ignore:.*are advised:UserWarning")

TEXT = "the moon and the sun went over the sea and the star sat on the moon. " * 60
KILLS = 20


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 352}  # large enough for BLAS to split
    folder = make_tiny_talker(tmp_path_factory.mktemp("resume") / "model", **sizes)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Of the files of an artifact that the inputs decide: all but the report, which has times in it."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("report.json", "README.md")
    }


def arguments(talker: Path, out: Path) -> tuple[object, ...]:
    recipe = ("--recipe", "gptq-nf3:g32:learned", "--set", "lm_head=gptq-int4:g32")  # needs every kind of statistics
    return ("compress", talker, "-o", out, *recipe, "--calibration", talker.parent / "text.txt", "--evaluation", "none")


@pytest.fixture(scope="module")
def undisturbed(talker: Path, forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    code, error = forked(*arguments(talker, out))
    assert code == 0, error
    return hashes(out)


def test_killed_at_random_moments(
    talker: Path,
    forked: Forked,
    undisturbed: dict[str, str],
    tmp_path: Path,
) -> None:
    """One run after another is killed until one comes through; then it starts anew, until 20 have been killed."""
    draw = random.Random(0)
    kills, went_on, finished = 0, 0, 0
    longest = 0.5
    while kills < KILLS or not finished:
        out = tmp_path / f"out-{finished}"
        code, error = forked(
            *arguments(talker, out), number=signal.SIGKILL, delay=draw.uniform(0.05, longest), repeat=False
        )
        went_on += "went on from an earlier run" in error
        if code == -signal.SIGKILL:
            kills += 1
            longest *= 1.1  # on a slow machine no run would ever come through
            if (out / "config.json").exists():  # killed after it was complete
                assert hashes(out) == undisturbed
                finished += 1
                for folder in tmp_path.glob(f".{out.name}.*"):
                    shutil.rmtree(folder)
            continue
        assert code == 0, error
        assert hashes(out) == undisturbed
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "nothing hidden is left"
        finished += 1
    assert went_on, "no run ever found finished work"


def test_one_thread_makes_the_same_bytes(talker: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    try:
        tenpak.compress(
            talker,
            tmp_path / "out",
            recipe="gptq-nf3:g32:learned",
            overrides=("lm_head=gptq-int4:g32",),
            calibration=talker.parent / "text.txt",
        )
    finally:
        torch.set_num_threads(2)
    assert hashes(tmp_path / "out") == undisturbed


def interrupted(talker: Path, out: Path, work: Path, after: int, **options: object) -> None:
    """A run that stops when so many tensors are finished."""
    seen = 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(talker, out, work, progress=stop, **options)


def run(talker: Path, out: Path, work: Path, **options: object) -> Report:
    text = talker.parent / "text.txt"
    return tenpak.compress(talker, out, **{"recipe": "gptq-int4:g32", "calibration": text, "work": work, **options})


def test_the_report_says_what_was_reused(talker: Path, tmp_path: Path) -> None:
    interrupted(talker, tmp_path / "out", tmp_path / "work", 12)
    report = run(talker, tmp_path / "out", tmp_path / "work")
    assert report.reused >= 12
    assert not (tmp_path / "work").exists()
    assert run(talker, tmp_path / "again", tmp_path / "work").reused == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "again")


@pytest.mark.parametrize(
    "other",
    [{"recipe": "gptq-int3:g32"}, {"calibration_tokens": 1000}, {"propagation": "own"}, {"seed": 1}],
    ids=lambda other: next(iter(other)),
)
def test_the_work_of_another_run_is_refused(talker: Path, tmp_path: Path, other: dict[str, object]) -> None:
    interrupted(talker, tmp_path / "out", tmp_path / "work", 3)
    with pytest.raises(ArtifactError, match="belongs to another run") as error:
        run(talker, tmp_path / "out", tmp_path / "work", **other)
    assert error.value.hint
    assert (tmp_path / "work").exists(), "it is not ours to delete"


def test_a_changed_model_is_another_run(talker: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in talker.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (tmp_path / "text.txt").write_text(TEXT)
    interrupted(copy, tmp_path / "out", tmp_path / "work", 3)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="it differs in source"):
        run(copy, tmp_path / "out", tmp_path / "work")


def test_damaged_work_is_done_again(talker: Path, tmp_path: Path) -> None:
    run(talker, tmp_path / "whole", tmp_path / "work")
    interrupted(talker, tmp_path / "out", tmp_path / "work", 12)
    for path in sorted((tmp_path / "work" / "units").iterdir())[::2]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    sorted((tmp_path / "work" / "units").iterdir())[1].write_bytes(b"")
    run(talker, tmp_path / "out", tmp_path / "work")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("missing", ["q_proj", "k_proj", "down_proj"])
def test_one_missing_tensor_comes_back_the_same(talker: Path, tmp_path: Path, missing: str) -> None:
    """Alone it is encoded with all threads, with its neighbours each takes one."""
    run(talker, tmp_path / "whole", tmp_path / "work")
    interrupted(talker, tmp_path / "out", tmp_path / "work", 22)
    names = [entry.weight.name for entry in open_job(talker, "int4:g32", ()).plan.entries]
    number = next(n for n, name in enumerate(names) if "layers.1." in name and f".{missing}." in name)
    (tmp_path / "work" / "units" / f"{number:05d}.safetensors").unlink()
    run(talker, tmp_path / "out", tmp_path / "work")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_folder_with_other_things_is_no_work_folder(talker: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("x")
    with pytest.raises(ArtifactError, match="holds no work of tenpak"):
        run(talker, tmp_path / "out", mine)
    assert [path.name for path in mine.iterdir()] == ["precious.txt"]
    with pytest.raises(ArtifactError, match="lies in the output"):
        run(talker, tmp_path / "out", tmp_path / "out" / "work")


def test_other_tokens_are_another_run(talker: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(talker, copy)
    (tmp_path / "text.txt").write_text(TEXT)
    interrupted(copy, tmp_path / "out", tmp_path / "work", 3)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["m"], vocabulary["n"] = vocabulary["n"], vocabulary["m"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArtifactError, match="it differs in tokens"):
        run(copy, tmp_path / "out", tmp_path / "work")


def test_work_in_use_is_refused(talker: Path, tmp_path: Path) -> None:
    with (
        Work(tmp_path / "work", {"a": 1}),
        pytest.raises(ArtifactError, match="in use by another run"),
        Work(tmp_path / "work", {"a": 1}),
    ):
        pass


def test_units_come_back_as_they_were(tmp_path: Path) -> None:
    codec = parse("int3:g16+nf2:row")
    payload = codec.encode(torch.randn(5, 33, generator=torch.Generator().manual_seed(0)))
    with Work(tmp_path / "work", {}) as work:
        work.put(3, "a.weight", Unit((payload, payload), "ab", (7, 8)))
        found = work.get(3, "a.weight")
        assert found is not None
        assert (found.source_sha256, found.counts) == ("ab", (7, 8))
        assert list(found.payloads[1].tensors) == list(payload.tensors)
        assert torch.equal(codec.decode(found.payloads[0]), codec.decode(payload))
        assert work.get(3, "b.weight") is None, "another tensor's place"


def test_statistics_of_another_model_are_refused(talker: Path, tmp_path: Path) -> None:
    other = make_tiny_talker(tmp_path / "other", hidden_size=64)
    tenpak.calibrate(other, tmp_path / "statistics", calibration=talker.parent / "text.txt")
    with pytest.raises(CalibrationError, match="of another model"):
        tenpak.compress(talker, tmp_path / "out", recipe="gptq-int4:g32", statistics=tmp_path / "statistics")
