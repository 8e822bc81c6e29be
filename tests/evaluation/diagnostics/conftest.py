"""Tiny models that talk, their artifacts, and a text long enough for ten windows; made once per test process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families import make_tiny_talker
from transformers.utils import logging

import tenpak
from tenpak.evaluation.diagnostics.pair import Pair, open_pair

logging.disable_progress_bar()
logging.set_verbosity_error()

TEXT = "The cat sat on the mat and looked at the moon.\nA dog ran over the hill, and nobody saw it go.\n" * 12


@dataclass(frozen=True)
class Talker:
    """A tiny model with a text, and its artifact."""

    source: Path
    artifact: Path
    text: Path

    def open(self, **options: Any) -> Pair:
        """Both loaded, on the text."""
        return open_pair(self.source, self.artifact, **{"text": self.text, **options})


MakeTalker = Callable[..., Talker]


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> MakeTalker:
    """``talker(family, recipe=…, overrides=…, **changes of the configuration)``; read-only for tests."""
    made: dict[str, Talker] = {}

    def make(
        family: str = "llama", *, recipe: str = "int4:g32", overrides: tuple[str, ...] = (), **changes: Any
    ) -> Talker:
        key = repr((family, recipe, overrides, changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            make_tiny_talker(folder / "source", family, **changes)
            (folder / "text.txt").write_text(TEXT)
            tenpak.compress(folder / "source", folder / "artifact", recipe=recipe, overrides=overrides)
            made[key] = Talker(folder / "source", folder / "artifact", folder / "text.txt")
        return made[key]

    return make
