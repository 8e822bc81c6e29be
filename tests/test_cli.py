"""The command line: results on stdout, everything else on stderr, exit codes that mean something."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from families import make_tiny_talker
from typer.testing import CliRunner

import tenpak
from tenpak import cli
from tenpak.cli import application, console
from tenpak.recipes import PRESETS, parse

VERBS = ("compress", "inspect", "verify", "evaluate", "diagnose", "generate", "recipes", "report", "compare")
TEXT = "the cat sat on the mat and looked at the moon.\n" * 12  # enough windows for a standard error


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``text.txt`` and ``artifact`` in it; read-only for tests."""
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_talker(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    tenpak.compress(folder / "model", folder / "artifact", overrides=("lm_head=dense",))
    return folder


def run(*arguments: object, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    command = [sys.executable, "-m", "tenpak", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, **options)


def invoke(*arguments: object) -> tuple[str, str]:
    """The same in this process, where it succeeds; stdout and stderr."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(autouse=True)
def consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles that write to whatever stdout and stderr are at the time: CliRunner replaces them."""
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)


# Help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb() -> None:
    out, _ = invoke("--help")
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_explains_every_option(verb: str) -> None:
    out, _ = invoke(verb, "--help")
    assert "--json" in out
    for line in out.splitlines():
        if line.strip().startswith("--") and len(line.split()) < 3 and "--help" not in line:
            pytest.fail(f"unexplained option: {line}")


def test_no_arguments_shows_help() -> None:
    done = run()
    assert done.returncode == 2
    assert "compress" in done.stdout + done.stderr


# Verbs, for people and for machines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(work: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What compressing a model that has a text of its own wrote and printed."""
    model = make_tiny_talker(work / "with text")
    (model / "texts").mkdir()
    (model / "texts" / "evaluation.txt").write_text(TEXT)
    return work / "measured", run("compress", model, "-o", work / "measured")


def test_compress_writes_and_reports(measured) -> None:
    folder, done = measured
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    for fact in (f"{report['bytes']:,}", f"{report['bpw']:.3f}", f"{report['ratio_fp32']:.2f}×", "left dense", "KL"):
        assert fact in done.stdout
    phases = dict.fromkeys(line.partition(":")[0] for line in done.stderr.splitlines())
    assert list(phases) == ["encoding", "writing", "evaluating"]  # no terminal: a line each, more if slow, and no bar
    assert done.stderr.replace("\n", "").isprintable()
    assert tenpak.verify(folder).ok


def test_models_own_text_is_the_default_and_none_means_none(measured, tmp_path: Path) -> None:
    folder, _ = measured
    assert json.loads((folder / "report.json").read_text())["quality"]["text"] == "evaluation.txt"
    out, _ = invoke("compress", folder.parent / "with text", "-o", tmp_path / "out", "--evaluation", "none", "--json")
    assert json.loads(out)["quality"] is None


def test_compress_json(work: Path, tmp_path: Path) -> None:
    out, err = invoke("compress", work / "model", "-o", tmp_path / "out", "-r", "nf4", "--set", "embed*=int4", "--json")
    report = json.loads(out)
    assert report == {
        key: value for key, value in json.loads((tmp_path / "out" / "report.json").read_text()).items() if key in report
    }
    assert report["recipe"] == "nf4"
    assert report["quality"] is None
    assert "quality not measured" in err


def test_dry_run_writes_nothing_and_is_exact(work: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    out, _ = invoke("compress", work / "model", "-o", tmp_path / "out", "--dry-run", "--json")
    prediction = json.loads(out)
    people, _ = invoke("compress", work / "model", "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    assert f"{prediction['bytes']:,} bytes" in people
    assert prediction["exact"]
    assert {"memory", "disk", "seconds", "bpw", "dense"} <= set(prediction)
    written, _ = invoke("compress", work / "model", "-o", tmp_path / "out", "--evaluation", "none", "--json")
    assert json.loads(written)["bytes"] == prediction["bytes"]


def test_inspect(work: Path) -> None:
    machine = json.loads(invoke("inspect", work / "artifact", "--json")[0])
    assert machine["bytes"] == (work / "artifact" / "model.safetensors").stat().st_size
    assert machine["weights"]["model.layers.0.mlp.up_proj.weight"]["codec"]["id"] == "uniform/1"
    people, _ = invoke("inspect", work / "artifact")
    assert f"{machine['bytes']:,}" in people
    # Every tensor in full on a line of its own, however narrow a terminal would be: for grep.
    for name in machine["weights"]:
        assert any(line.split()[:1] == [name] for line in people.splitlines()), name
    assert "set dense by 'lm_head'" in people


def test_inspect_shows_measured_quality(measured) -> None:
    machine = json.loads(invoke("inspect", measured[0], "--json")[0])
    people, _ = invoke("inspect", measured[0])
    assert f"{machine['quality']['ppl']:.4f}" in people


def test_verify(work: Path) -> None:
    machine = json.loads(invoke("verify", work / "artifact", "--json")[0])
    assert machine == {"ok": True, "tensors": machine["tensors"], "problems": []}
    assert machine["tensors"] == 21
    people, _ = invoke("verify", work / "artifact")
    assert people.startswith("intact: 21 tensors")


def test_evaluate(work: Path) -> None:
    arguments = ("evaluate", work / "artifact", "--against", work / "model", "--text", work / "text.txt")
    machine = json.loads(invoke(*arguments, "--json")[0])
    assert {"bytes", "bpw", "ratio_fp32", "ratio_checkpoint", "ppl_original", "ppl", "ppl_increase", "kl", "top1",
            "tokens", "ppl_increase_se", "kl_se", "top1_se"} <= set(machine)  # fmt: skip
    people, _ = invoke(*arguments, "--window", "32", "--stride", "32", "--dtype", "float32")
    assert "windows of 32" in people
    assert "nats per token" in people


def test_generate(work: Path) -> None:
    arguments = ("generate", work / "artifact", "--prompt", "the cat", "--tokens", "5")
    machine = json.loads(invoke(*arguments, "--json")[0])
    assert machine["prompt"] == "the cat"
    people, _ = invoke(*arguments)
    assert people.startswith("the cat")
    assert people.rstrip("\n") == ("the cat" + machine["continuation"]).rstrip("\n")
    sampled = [
        json.loads(invoke(*arguments, "--temperature", "1", "--seed", seed, "--json")[0])["continuation"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert json.loads(invoke("generate", work / "model", "-p", "the", "--tokens", "3", "--json")[0])["continuation"]


def test_recipes() -> None:
    machine = json.loads(invoke("recipes", "--json")[0])
    assert set(machine) == {"presets", "model", "recommended"}
    assert set(machine["presets"]) == set(PRESETS)
    assert machine["model"] is machine["recommended"] is None
    for entry in machine["presets"].values():
        bits = parse(entry["recipe"]).estimate_bits((4096, 4096))
        assert entry["bits"] == (None if bits is None else bits / 4096**2)
    people, _ = invoke("recipes")
    rows = {line.split()[0]: line for line in people.splitlines() if line.split()[:1] and line.split()[0] in PRESETS}
    assert set(rows) == set(PRESETS)
    assert rows["int4-g32"].split()[1] == "5.000"
    assert rows["pixel-svd"].split()[1:3] == ["by", "coding"]
    assert "gptq-" in people.partition("written by hand")[2]  # the grammar


def test_recipes_for_a_model(work: Path, tmp_path: Path) -> None:
    machine = json.loads(invoke("recipes", "--for", work / "model", "--json")[0])
    for name in ("int4-g32", "nf3", "pocketllm-v2"):
        written, _ = invoke(
            "compress", work / "model", "-o", tmp_path / name, "-r", name, "--evaluation", "none", "--json"
        )
        assert json.loads(written)["bytes"] == machine["presets"][name]["bytes"]
        assert json.loads(written)["bpw"] == pytest.approx(machine["presets"][name]["bpw"])
    assert not machine["presets"]["pixel-svd"]["exact"]
    advice = machine["recommended"]
    assert advice["command"] == f"tenpak compress {work / 'model'} -o OUT --target 10x"
    assert advice["bytes"] == json.loads(invoke(*advice["command"].split()[1:], "--dry-run", "--json")[0])["bytes"]
    assert [other["command"].split()[-1] for other in advice["fixed_rate"]] == ["gptq-int4", "int4-g32"]
    people, _ = invoke("recipes", "--for", work / "model")
    assert f"{machine['presets']['nf3']['bytes']:,}" in people
    assert people.splitlines()[-1].startswith(f"Recommended: `{advice['command']}`")


# Exit codes, streams, terminals ----------------------------------------------------------------------------------


def test_errors_are_two_lines_and_exit_code_one(work: Path) -> None:
    done = run("inspect", work / "model")
    assert done.returncode == 1
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("hint: ")


def test_debug_shows_the_traceback(work: Path) -> None:
    done = run("inspect", work / "model", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ArtifactError" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("compres",), ("compress",), ("compress", "model"), ("compress", "model", "--wat"),
        ("compress", "model", "-o", "out", "--seed", "many"), ("evaluate", "artifact"), ("generate", "model"),
        ("generate", "model", "-p", "x", "--tokens", "0"), ("generate", "model", "-p", "x", "--device", "abacus"),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_two(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr


def test_verify_of_a_damaged_artifact_fails_and_names_the_tensor(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "artifact", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 128
    file.write_bytes(data)
    done = run("verify", tmp_path / "damaged")
    assert done.returncode == 1
    assert done.stderr.startswith("checking: ")
    assert "\nerror: the bytes of tensor '" in done.stderr
    assert "\nhint: " in done.stderr
    machine = run("verify", tmp_path / "damaged", "--json")
    assert machine.returncode == 1
    assert json.loads(machine.stdout)["ok"] is False
    assert len(json.loads(machine.stdout)["problems"]) == 1


@pytest.mark.parametrize("verb", ["inspect", "recipes"])
def test_reader_that_goes_away_is_no_crash(verb: str, work: Path) -> None:
    arguments = [verb, str(work / "artifact")] if verb == "inspect" else [verb]
    process = subprocess.Popen(
        [sys.executable, "-m", "tenpak", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # before it has written anything
    _, error = process.communicate(timeout=60)
    assert error == b""
    assert process.returncode in (0, 1)


def on_a_terminal(*arguments: object, resize: tuple[int, int] | None = None) -> tuple[int, str, bytes]:
    """Exit code, stdout and what a terminal of 120 columns was sent; after its first bytes it may get another size."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tenpak", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=other,
        env={**environment, "TERM": "xterm"},
    )
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        shown += piece
        if resize is not None:
            fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", *resize, 0, 0))
            resize = None
    out, _ = process.communicate(timeout=60)
    os.close(main)
    return process.returncode, out.decode(), shown


def test_progress_is_a_bar_on_terminals(work: Path, tmp_path: Path) -> None:
    code, out, shown = on_a_terminal("compress", work / "model", "-o", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["bytes"]
    assert b"%" in shown or "━".encode() in shown
    assert b"encoding:" not in shown


def test_a_bar_survives_a_smaller_window(work: Path, tmp_path: Path) -> None:
    quietly = ("compress", work / "model", "-o", tmp_path / "out", "--evaluation", "none", "--json")
    code, _, shown = on_a_terminal(*quietly, resize=(5, 30))
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    drawn = [frame for frame in re.split(r"[\r\n]+", text) if frame.strip()]
    assert 0 < len(drawn[-1]) <= 30


def test_quiet_leaves_errors_only_and_verbose_tells_each_tensor(work: Path, tmp_path: Path) -> None:
    compress = ("compress", work / "model", "--evaluation", "none")
    for place, option in enumerate(("-q", "--quiet")):  # anywhere on the line
        arguments = [*compress, "-o", tmp_path / option]
        arguments.insert(place * len(arguments), option)
        done = run(*arguments)
        assert done.returncode == 0
        assert done.stderr == ""
        assert "bits per weight" in done.stdout
    failed = run("inspect", work / "model", "-q")
    assert [line.partition(":")[0] for line in failed.stderr.splitlines()] == ["error", "hint"]
    told = run(*compress, "-o", tmp_path / "out", "-v")
    lines = [line for line in told.stderr.splitlines() if line.startswith("encoding: ")]
    names = {line.rpartition(" ")[2] for line in lines}
    assert set(tenpak.open_artifact(tmp_path / "out").manifest.weights) <= names
    code, _, shown = on_a_terminal(*compress, "-o", tmp_path / "again", "-v")
    assert code == 0
    assert b"encoding:" in shown
    code, _, shown = on_a_terminal(*compress, "-o", tmp_path / "silent", "-q")
    assert (code, shown) == (0, b"")


def test_what_follows_two_dashes_is_no_option() -> None:
    assert application._everywhere(["generate", "m", "-v", "-p", "x", "--debug"]) == (
        ["-v", "--debug", "generate", "m", "-p", "x"], True,
    )  # fmt: skip
    assert application._everywhere(["inspect", "--", "-q", "--debug"]) == (["inspect", "--", "-q", "--debug"], False)


def test_brackets_in_names_are_no_markup(work: Path, tmp_path: Path) -> None:
    (tmp_path / "a[").mkdir()
    for name in ("[bold]", "a[/b]"):
        (tmp_path / name).symlink_to(work / "artifact")
        done = run("inspect", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].strip() == name


def test_warnings_are_one_line_without_a_path(capsys: pytest.CaptureFixture) -> None:
    application._warn(UserWarning("the text is [short]: figures are noisy"), UserWarning, "/somewhere/evaluate.py", 12)
    assert capsys.readouterr().err == "warning: the text is [short]: figures are noisy\n"
