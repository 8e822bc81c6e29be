"""Completion in shells: presets and policies, without waiting for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tenpak.cli.completion import POLICY_NAMES, complete_override, complete_policy, complete_recipe
from tenpak.policies import POLICIES
from tenpak.recipes import PRESETS

_PROGRAM = "import sys; sys.argv[0] = 'tenpak'; from tenpak.cli import main; main()"


def completed(*words: str) -> tuple[list[str], str]:
    """What bash is offered for the last of these words, and everything that was imported."""
    environment = {
        "_TENPAK_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-X", "importtime", "-c", _PROGRAM]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return done.stdout.split(), done.stderr


def test_policies_are_those_that_there_are() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


def test_names_that_begin_so() -> None:
    assert [name for name, _ in complete_recipe("INT4-g1")] == ["int4-g16", "int4-g128"]
    assert len(complete_recipe("")) == len(PRESETS)
    assert complete_policy("buck") == ["buckets", "buckets-fisher"]
    assert [name for name, _ in complete_override("*.down_proj.*=nf3")] == [
        "*.down_proj.*=nf3", "*.down_proj.*=nf3-learned",
    ]  # fmt: skip
    assert complete_override("*.down_proj.*") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tenpak", "compress", "m", "--recipe", "pocket"), ["pocketllm-v1", "pocketllm-v2"]),
        (("tenpak", "-q", "compress", "m", "-v", "--policy", "k-proj-"), ["k-proj-whitened"]),
        (("tenpak", "doc"), ["doctor"]),
    ],
)
def test_a_shell_completes_without_torch(words: tuple[str, ...], expected: list[str]) -> None:
    found, imported = completed(*words)
    assert found == expected
    assert " tenpak.cli" in imported
    assert not any(line.split("|")[-1].strip() in ("torch", "numpy", "transformers") for line in imported.splitlines())


def test_the_script_for_a_shell_can_be_shown() -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-c", _PROGRAM, "--show-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "_TENPAK_COMPLETE=complete_bash" in done.stdout
