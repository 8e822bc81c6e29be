"""Fixtures for all tests: where the optional shared models and texts are, and an offline, two-thread process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test may depend on the network

import pytest
import torch
from forked import forked as forked

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(2)


def _shared(kind: str) -> Path:
    root = Path(os.environ.get("TENPAK_SHARED", REPOSITORY.parent / "shared"))
    if not (root / kind).is_dir():
        pytest.skip(f"no shared {kind} at {root}: set TENPAK_SHARED to the folder that holds them")
    return root / kind


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change how many threads torch uses."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real models that are not part of the repository."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of texts that are not part of the repository."""
    return _shared("data")


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """The model that ships with the repository."""
    folder = REPOSITORY / "models" / "tinystories-3.7m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the embedded model is not at {folder}")
    return folder
