"""Bad input: one clear line, one hint, a non-zero exit, nothing that loads, nothing lost.

The messages come from the real program's ``main``, run in this process; what kills a process runs in one of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make_tiny, make_tiny_talker
from forked import Forked
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import tenpak
from tenpak import cli
from tenpak.artifact.schema import MANIFEST_NAME, dump_manifest, load_manifest
from tenpak.cli import application, console
from tenpak.errors import TenpakError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound ``model`` and its ``artifact``; read-only for tests."""
    folder = tmp_path_factory.mktemp("good")
    make_tiny_talker(folder / "model")
    tenpak.compress(folder / "model", folder / "artifact")
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "model", tmp_path / "model"))


@pytest.fixture
def artifact(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "artifact", tmp_path / "artifact"))


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """``fails(*arguments)`` runs tenpak, requires one error line and one hint, and returns both."""
    monkeypatch.setattr(application.signal, "signal", lambda *_: None)
    monkeypatch.setattr(application.warnings, "showwarning", application.warnings.showwarning)  # put back afterwards

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tenpak", *map(str, arguments)])
        monkeypatch.setattr(console.err, "_file", None)
        monkeypatch.setattr(console.out, "_file", None)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line]
        assert end.value.code == 1, err
        assert out == ""
        assert len(lines) == 2, err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("hint: ")
        return err

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def compress_fails(fails: Callable[..., str], model: object, out: Path, *options: object) -> str:
    """Compressing fails and leaves the folder around the output as it was."""
    before = snapshot(out.parent)
    message = fails("compress", model, "-o", out, "--evaluation", "none", *options)
    assert snapshot(out.parent) == before
    return message


# Checkpoints -----------------------------------------------------------------------------------------------------


def test_no_such_model(fails, tmp_path: Path) -> None:
    assert "no/such/model" in compress_fails(fails, "no/such/model", tmp_path / "out")
    assert "nowhere" in compress_fails(fails, tmp_path / "nowhere", tmp_path / "out")
    assert "hub" in compress_fails(fails, "nobody/has-this-model-0", tmp_path / "out")


def test_folder_without_weights_or_config(fails, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in compress_fails(fails, tmp_path / "empty", tmp_path / "out")
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in compress_fails(fails, model, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -5000])
def test_truncated_weights(keep: int, fails, model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in compress_fails(fails, model, tmp_path / "out")


def with_header(model: Path, change: Callable[[dict], None]) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [10**12, 10**12]}, {"shape": [-48, -32]}, {"shape": [48]}, {"shape": "48x32"},
        {"data_offsets": [0, 6144]}, {"data_offsets": [-1, 6143]}, {"data_offsets": [10**15, 10**15 + 6144]},
        {"data_offsets": [6144, 0]}, {"dtype": "F16"}, {"extra": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_lying_header(lie: dict, fails, model: Path, tmp_path: Path) -> None:
    with_header(model, lambda header: header[NAME].update(lie))
    assert "model.safetensors" in compress_fails(fails, model, tmp_path / "out")


def test_unknown_dtype_is_named(fails, model: Path, tmp_path: Path) -> None:
    with_header(model, lambda header: header[NAME].update(dtype="F4_E2M1"))
    message = compress_fails(fails, model, tmp_path / "out")
    assert "F4_E2M1" in message
    assert NAME in message


def test_missing_shard(fails, good: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(good / "model").save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in compress_fails(fails, tmp_path / "sharded", tmp_path / "out")


def test_missing_tensor_is_named(fails, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[NAME]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert NAME in compress_fails(fails, model, tmp_path / "out")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weight_that_is_no_number_is_named(value: str, fails, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[NAME][3, 5] = float(value)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = compress_fails(fails, model, tmp_path / "out")
    assert NAME in message
    assert "NaN or infinite" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "no_such"}', "{}", '{"model_type": "llama", "hidden_size": -3}']
)
def test_bad_config(text: str, fails, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(text)
    compress_fails(fails, model, tmp_path / "out")


def test_models_that_are_no_decoders(fails, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=64, **small)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        assert "decoder-only" in compress_fails(fails, tmp_path / name, tmp_path / "out")


def test_model_that_is_already_quantized(fails, good: Path, tmp_path: Path) -> None:
    assert "already quantized (tenpak)" in compress_fails(fails, good / "artifact", tmp_path / "out")


def test_pickle_with_code_is_not_run(fails, model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    (model / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, model / "pytorch_model.bin")
    assert "could run code" in compress_fails(fails, model, tmp_path / "out")
    assert not (tmp_path / "was here").exists()


# Recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "near"),
    [
        ("int4-g23", "int4-g32"), ("imt4:g32", "int4"), ("nf44", "4"), ("int4:serch", "search"), ("", "int4:g32"),
        ("int4:g32+", "int4:g32"), ("int9", "2"), ("int1:g32", "2"), ("nf5", "2"), ("int4:g7", "8"),
        ("int4:g512", "256"),
        ("int4:g0", "8"), ('{"id": "uniform/1", "bots": 4}', "bits"),
        ('{"id": "unifrm/1"}', "uniform/1"), ("{", "JSON"),
    ],
)  # fmt: skip
def test_recipe_says_what_is_near_or_in_range(recipe: str, near: str, fails, good: Path, tmp_path: Path) -> None:
    assert near in compress_fails(fails, good / "model", tmp_path / "out", "--recipe", recipe)


@pytest.mark.parametrize(("override", "near"), [("k_porj=int8", "k_proj"), ("*=itn4", "int4"), ("embed*", "=")])
def test_override_says_what_is_near(override: str, near: str, fails, good: Path, tmp_path: Path) -> None:
    assert near in compress_fails(fails, good / "model", tmp_path / "out", "--set", override)


# Outputs ---------------------------------------------------------------------------------------------------------


def test_existing_artifact_is_kept_unless_overwritten(fails, model: Path, artifact: Path) -> None:
    assert "--overwrite" in compress_fails(fails, model, artifact)
    tenpak.compress(model, artifact, recipe="int2", overwrite=True)
    assert load_manifest(artifact / MANIFEST_NAME).recipe == "int2"
    assert tenpak.verify(artifact).ok
    assert {path.name for path in artifact.parent.iterdir()} == {"model", "artifact"}


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_only_an_artifact_is_ever_replaced(options: tuple[str, ...], fails, model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    assert "thesis" in compress_fails(fails, model, tmp_path / "thesis", *options)
    (tmp_path / "file").write_text("a file")
    assert "file" in compress_fails(fails, model, tmp_path / "file", *options)
    assert "model" in compress_fails(fails, model, model, *options)  # the source itself


def test_artifact_with_other_peoples_files_is_not_replaced(fails, model: Path, artifact: Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    assert "notes.txt" in compress_fails(fails, model, artifact, "--overwrite")


def test_output_that_cannot_be_made(fails, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    compress_fails(fails, model, tmp_path / "file" / "out")
    fails("compress", model, "-o", "/proc/out")
    compress_fails(fails, model, tmp_path / ("long" * 100))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(fails, model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    compress_fails(fails, model, tmp_path / "locked" / "out")


def test_missing_parents_are_made(model: Path, tmp_path: Path) -> None:
    tenpak.compress(model, tmp_path / "a" / "b" / "out")
    assert tenpak.verify(tmp_path / "a" / "b" / "out").ok


def test_failed_overwrite_keeps_the_old_artifact(fails, model: Path, artifact: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")  # the last tensor: everything before it has been written
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    compress_fails(fails, model, artifact, "--overwrite")
    assert tenpak.verify(artifact).ok


# Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"  \n", b"a", b"\xff\xfe\x00b\x00c", b"caf\xe9", b"x\0y"], ids=repr)
def test_text_that_cannot_be_measured_on(content: bytes | None, fails, good: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    text = tmp_path / "text.txt"
    fails("evaluate", good / "artifact", "--against", good / "model", "--text", text)
    before = snapshot(tmp_path)
    fails("compress", good / "model", "-o", tmp_path / "out", "--evaluation", text)
    assert snapshot(tmp_path) == before


def test_evaluate_against_another_model(fails, good: Path, tmp_path: Path) -> None:
    make_tiny_talker(tmp_path / "other", vocab_size=130)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    arguments = ("--against", tmp_path / "other", "--text", tmp_path / "text.txt")
    fails("evaluate", good / "artifact", *arguments)
    fails("evaluate", good / "model", *arguments)
    fails("evaluate", good / "artifact", "--against", good / "artifact", "--text", tmp_path / "text.txt")


def test_model_without_a_tokenizer(fails, tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat")
    before = snapshot(tmp_path)
    message = fails("compress", source, "-o", tmp_path / "out", "--evaluation", tmp_path / "text.txt")
    assert "tokenizer" in message
    assert snapshot(tmp_path) == before
    assert "tokenizer" in fails("generate", source, "-p", "the")


def test_generate_with_nothing_to_go_on(fails, good: Path) -> None:
    fails("generate", good / "artifact", "-p", "")


@pytest.mark.parametrize("option", [("--dtype", "float99"), ("--window", "0"), ("--stride", "99")])
def test_evaluate_options_out_of_range(option: tuple[str, str], fails, good: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    extra = ("--window", "32") if option[0] == "--stride" else ()
    arguments = ("evaluate", good / "artifact", "--against", good / "model", "--text", tmp_path / "text.txt")
    fails(*arguments, *option, *extra)


# Artifacts -------------------------------------------------------------------------------------------------------


def verbs(artifact: Path) -> list[tuple[object, ...]]:
    return [("inspect", artifact), ("verify", artifact), ("generate", artifact, "-p", "the", "--tokens", "2")]


def test_not_an_artifact(fails, good: Path, tmp_path: Path) -> None:
    for verb in ("inspect", "verify"):
        for folder in (good / "model", tmp_path, tmp_path / "nowhere", good / "model" / "config.json"):
            fails(verb, folder)


@pytest.mark.parametrize("name", [MANIFEST_NAME, "model.safetensors"])
def test_missing_or_truncated_file_of_an_artifact(name: str, fails, artifact: Path) -> None:
    data = (artifact / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", None):
        if damaged is None:
            (artifact / name).unlink()
        else:
            (artifact / name).write_bytes(damaged)
        for verb in verbs(artifact):
            fails(*verb)


def test_flipped_bits_are_found(artifact: Path) -> None:
    """Any bit of weights or manifest, here thirty at random."""
    draw = random.Random(0)
    for name in (MANIFEST_NAME, "model.safetensors"):
        data = (artifact / name).read_bytes()
        for _ in range(15):
            flipped = bytearray(data)
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            (artifact / name).write_bytes(flipped)
            with pytest.raises(TenpakError):
                tenpak.load(artifact)
            with contextlib.suppress(TenpakError):
                assert not tenpak.verify(artifact).ok
        (artifact / name).write_bytes(data)
    assert tenpak.verify(artifact).ok


def test_replaced_tokenizer_file_is_found(fails, artifact: Path) -> None:
    (artifact / "tokenizer.json").write_text("{}")
    assert not tenpak.verify(artifact).ok


def hostile(content: dict) -> list[Callable[[], None]]:
    """Ways to lie in a manifest that is signed again."""
    weight = content["weights"][NAME]
    field = weight["payloads"][0]["fields"][0]
    return [
        lambda: weight.update(shape=[2**40, 2**40]),
        lambda: weight.update(shape=[0, 32]),
        lambda: weight["codec"].update(id="no_such/1"),
        lambda: weight["codec"].update(bits=7),
        lambda: weight["codec"].update(group=10**9),
        lambda: weight["codec"].update(extra=1),
        lambda: field.update(shape=[2**62]),
        lambda: field.update(dtype="OBJECT"),
        lambda: weight["payloads"][0].update(count=10**15),
        lambda: weight.update(bits=0),
        lambda: content["tied"].update({"a": "nowhere"}),
        lambda: content["dense"].pop("model.norm.weight"),
        lambda: content["dense"]["model.norm.weight"].update(shape=[64]),
        lambda: content["weights"].update({"../../etc/passwd": weight}),
    ]


@pytest.mark.parametrize("number", range(14))
def test_hostile_manifest_is_refused_before_memory_is_taken(number: int, fails, artifact: Path) -> None:
    from tenpak.artifact.schema import Manifest

    content = load_manifest(artifact / MANIFEST_NAME).model_dump(mode="json")
    hostile(content)[number]()
    (artifact / MANIFEST_NAME).write_bytes(dump_manifest(Manifest.model_validate(content)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for verb in verbs(artifact):
        fails(*verb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("name", ["../escape.json", "/etc/hostname", "sub/file.json"])
def test_manifest_that_names_files_elsewhere(name: str, artifact: Path) -> None:
    from tenpak.artifact.schema import Manifest

    content = load_manifest(artifact / MANIFEST_NAME).model_dump(mode="json")
    content["files"][name] = "0" * 64
    (artifact / MANIFEST_NAME).write_bytes(dump_manifest(Manifest.model_validate(content)))
    with contextlib.suppress(TenpakError):
        assert not tenpak.verify(artifact).ok


def test_another_format_version_says_so(fails, artifact: Path) -> None:
    manifest = load_manifest(artifact / MANIFEST_NAME).model_copy(update={"format_version": 99})
    (artifact / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    for verb in verbs(artifact):
        assert "99" in fails(*verb)


# Full disks and interruptions, in real processes -----------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 10_000])
def test_full_disk(limit: int, forked: Forked, good: Path, artifact: Path) -> None:
    """A limit on file sizes stands for it: writing fails with an OSError in the middle."""
    before = snapshot(artifact.parent)
    code, error = forked("compress", good / "model", "-o", artifact, "--overwrite", limit=limit)
    assert code == 1, error
    *_, first, second = error.splitlines()  # phases that are finished have been told
    assert first.startswith(f"error: cannot write {artifact.parent}")
    assert second.startswith("hint: ")
    left = [folder for folder in artifact.parent.iterdir() if folder.name.startswith(f".{artifact.name}.work-")]
    assert len(left) == (1 if limit else 0), "finished tensors are kept, and nothing else"
    code, error = forked("compress", good / "model", "-o", artifact, "--overwrite")  # room has been made
    assert code == 0, error
    assert ("went on from an earlier run" in error) == bool(limit)
    assert before.keys() == snapshot(artifact.parent).keys()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes about a second."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
    return make_tiny("llama", tmp_path_factory.mktemp("larger") / "model", **sizes)


def over_and_over(model: Path, out: Path) -> tuple[object, ...]:
    return ("compress", model, "-o", out, "--recipe", "int3:g32:search", "--evaluation", "none", "--overwrite")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_at_random_moments(number: int, code: int, forked: Forked, larger: Path, tmp_path: Path) -> None:
    """Nothing is left behind but, perhaps, a whole artifact, and finished tensors to go on with."""
    draw = random.Random(number)
    for _ in range(5):
        found, error = forked(*over_and_over(larger, tmp_path / "out"), number=number, delay=draw.uniform(0, 2))
        assert found == code, error
        *_, first, second = error.splitlines()  # it may have told before that it went on from the last run
        assert first == "error: interrupted"
        assert second.startswith("hint: ")
        assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".out.work-")} <= {"out"}
        if (tmp_path / "out").exists():
            assert tenpak.verify(tmp_path / "out").ok
            assert tenpak.load(tmp_path / "out") is not None


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(seed: int, forked: Forked, larger: Path, tmp_path: Path) -> None:
    """What a killed run leaves is hidden and loads nowhere; an artifact that was there is there, or set aside whole."""
    out = tmp_path / "out"
    tenpak.compress(larger, out, recipe="int2:g64")
    draw = random.Random(seed)
    for _ in range(5):
        assert (
            forked(*over_and_over(larger, out), number=signal.SIGKILL, delay=draw.uniform(0, 2))[0] == -signal.SIGKILL
        )
        candidates = [out, *(folder / "out" for folder in tmp_path.glob(".out.replaced-*"))]
        whole = [folder for folder in candidates if (folder / "config.json").exists()]
        assert whole, "the artifact is gone"
        assert all(tenpak.verify(folder).ok for folder in whole)
        assert tenpak.load(whole[0]) is not None
        for folder in tmp_path.glob(".out.partial-*"):
            if (folder / "config.json").exists():  # killed between the last byte and the renaming: it is whole
                assert tenpak.verify(folder).ok
            else:
                with pytest.raises(TenpakError):
                    tenpak.load(folder)
        if not out.exists():
            whole[0].rename(out)
    tenpak.compress(larger, out, overwrite=True)  # what is left disturbs no later run, and goes with it
    assert tenpak.verify(out).ok
    assert not [*tmp_path.glob(".out.partial-*"), *tmp_path.glob(".out.work-*")]
