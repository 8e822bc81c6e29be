"""The public surface: what __all__ promises is there, and importing it is cheap."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import tenpak
import tenpak.errors
from tenpak.errors import TenpakError

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tenpak.__path__, "tenpak.")
    if not module.name.rpartition(".")[2].startswith("_")
)


def test_the_package_offers_exactly_this() -> None:
    expected = ["TenpakError", "calibrate", "compress", "evaluate", "load", "open_artifact", "predict", "verify"]
    assert sorted(tenpak.__all__) == expected
    assert all(callable(getattr(tenpak, name)) for name in expected)
    assert set(expected) <= set(dir(tenpak))
    assert tenpak.__version__.count(".") == 2


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="decompress"):
        _ = tenpak.decompress


@pytest.mark.parametrize("name", MODULES)
def test_all_resolves(name: str) -> None:
    module = importlib.import_module(name)
    is_package = hasattr(module, "__path__")
    assert is_package or module.__all__, "a public module says what it offers"
    offered = getattr(module, "__all__", [])
    assert len(set(offered)) == len(offered)
    missing = [entry for entry in offered if not hasattr(module, entry)]
    assert not missing


def test_every_error_is_exported_and_of_the_tree() -> None:
    defined = {name for name, value in vars(tenpak.errors).items() if isinstance(value, type)}
    assert set(tenpak.errors.__all__) == defined
    assert all(issubclass(getattr(tenpak.errors, name), TenpakError) for name in defined)
    assert all(f" {name}" in (tenpak.errors.__doc__ or "") for name in defined), "the drawn tree is complete"
    assert issubclass(tenpak.errors.RecipeError, ValueError)
    assert issubclass(tenpak.errors.UnknownCodecError, LookupError)


def test_an_error_carries_message_and_hint() -> None:
    error = TenpakError("what failed", hint="the remedy")
    assert (str(error), error.hint) == ("what failed", "the remedy")
    assert TenpakError("what failed").hint is None


def test_importing_is_cheap() -> None:
    program = "import sys, json, tenpak; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "tenpak" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "pydantic", "rich", "typer"}


def test_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, tenpak.cli\n"
        "sys.argv = ['tenpak', 'compress', '--help']\n"
        "try: tenpak.cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "print({'torch', 'transformers'} & set(sys.modules), code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set() 0"
