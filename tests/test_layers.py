"""The architecture, enforced: imports point down, files and functions stay small, nothing is called utils."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tenpak

ROOT = Path(tenpak.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)

# A module may import its own layer and those to its right. What the design calls compress is
# `pipeline`, `measuring`, `publishing`, `prediction`, `knobs`, `profiling`, `dial`, `recovery`, `task`, `sequential`,
# `encoding`, `work` and `job`.
LAYERS = (
    "cli", "doctor", "pixel", "pipeline", "measuring", "publishing", "prediction", "knobs", "profiling", "dial",
    "recovery", "task", "sequential", "encoding", "work", "calibrating", "job", "policies", "plans", "report", "tuning",
    "allocation", "evaluation", "nn", "calibration", "artifact", "checkpoint", "recipes", "codecs", "kernels",
    "errors",
)  # fmt: skip
# The package itself, what runs it, and what registers it hold the layers together.
OUTSIDE = {"__init__", "__main__", "_autoload"}


def layer(module: str) -> str:
    """``nn`` for ``tenpak.nn.load``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every tenpak import in a file, late and conditional ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "tenpak")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative imports hide the layer"
            if node.module == "tenpak":
                yield from ((node.lineno, f"tenpak.{alias.name}") for alias in node.names)
            elif node.module and node.module.startswith("tenpak."):
                yield node.lineno, node.module


def home(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring: a list of options is no code, nor what explains them."""
    first = node.body[0]
    start = (first.end_lineno or 0) + 1 if ast.get_docstring(node) is not None else first.lineno
    return (node.end_lineno or 0) - start + 1


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 30
    assert {home(path) for path in FILES} - OUTSIDE <= set(LAYERS), "a layer is missing from the list"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    here = home(path)
    if here in OUTSIDE:
        return
    upward = [
        f"line {line}: {here} imports {module}"
        for line, module in imports(path)
        if layer(module) != "__init__" and LAYERS.index(layer(module)) < LAYERS.index(here)
    ]
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{node.name}: {lines} lines" for node in functions if (lines := code_lines(node)) > 60]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.name == "__main__.py"


def test_nothing_is_a_drawer() -> None:
    drawers = {"util", "utils", "helper", "helpers", "misc", "common", "tools"}
    names = {part.removesuffix(".py").strip("_") for path in FILES for part in path.relative_to(ROOT).parts}
    assert not names & drawers
