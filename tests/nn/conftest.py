"""Tiny artifacts of every family, made once per test process and only when a test asks for them."""

from __future__ import annotations

from typing import Any

import pytest
from compressed import Case, MakeCase
from families import make_tiny
from transformers.utils import logging

import tenpak

logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> MakeCase:
    """``case(family, recipe=…, overrides=…, **changes of the configuration)``; read-only for tests."""
    made: dict[str, Case] = {}

    def make(family: str, *, recipe: str = "int4:g32", overrides: tuple[str, ...] = (), **changes: Any) -> Case:
        key = repr((family, recipe, overrides, changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            make_tiny(family, folder / "source", **changes)
            report = tenpak.compress(folder / "source", folder / "artifact", recipe=recipe, overrides=overrides)
            made[key] = Case(folder / "source", folder / "artifact", report)
        return made[key]

    return make
