"""What the page reads besides the artifact: ``report.json``, a diagnosis, a profile.

Unlike the manifest the first two are not sealed, and each may lack any part: a part that is missing or null takes its
default, a number that is not finite counts as missing, and what is not known is skipped. A part of the wrong type is an
error that names the file and the place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from tenpak.allocation.profile import Profile
from tenpak.checkpoint.header import read_whole
from tenpak.errors import EvaluationError

__all__ = [
    "Culprit",
    "Diagnosis",
    "Finding",
    "Layer",
    "Loss",
    "Quality",
    "Recorded",
    "Sample",
    "Step",
    "load_diagnosis",
    "load_profile",
]

_MAX_BYTES = 200_000_000

Number = Annotated[float | None, AfterValidator(lambda value: value if value is not None and _finite(value) else None)]


def _finite(value: float) -> bool:
    return math.isfinite(value)


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data


class Quality(_Loose):
    """What ``tenpak evaluate`` measured; ``*_se`` are standard errors, ``kl`` is in nats per token."""

    ppl_original: Number = None
    ppl: Number = None
    ppl_increase: Number = None
    ppl_increase_se: Number = None
    kl: Number = None
    kl_se: Number = None
    top1: Number = None
    top1_se: Number = None
    text: str = ""
    text_sha256: str = ""
    tokens: int = 0
    window: int | None = None
    dtype: str = ""
    tokens_per_second_original: Number = None
    tokens_per_second: Number = None


class Trial(_Loose):
    """A value that a search tried and what it cost, in the unit of its budget."""

    value: Number = None
    cost: Number = None


class Search(_Loose):
    """A budget and what was tried to meet it; the last trial was taken."""

    budget: str = ""
    trials: tuple[Trial, ...] = ()


class Recorded(_Loose):
    """Those parts of ``report.json`` that neither the manifest nor the files say."""

    seconds: Number = None
    search: Search | None = None
    environment: dict[str, str | int] = {}
    quality: Quality | None = None


class Layer(_Loose):
    """How far a block's output is from the original's; see ``tenpak diagnose``."""

    name: str = ""
    depth: int = 0
    cosine: Number = None
    norm_ratio: Number = None
    relative_error: Number = None
    peak_original: Number = None
    peak: Number = None
    outliers_original: Number = None
    outliers: Number = None


class Culprit(_Loose):
    """The layer that does most of the damage, and why."""

    layer: str = ""
    why: str = ""


class Finding(_Loose):
    """One compressed weight; ``kl`` in nats per token with this one alone compressed, measured."""

    name: str
    codec: str | None = None
    relative_error: Number = None
    kurtosis: Number = None
    outlier_share: Number = None
    effective_rank: Number = None
    kl: Number = None


class Token(_Loose):
    """A token and its probability."""

    token: str = ""
    probability: Number = None


class Step(_Loose):
    """The next token after a prompt, by both models."""

    prompt: str = ""
    original: tuple[Token, ...] = ()
    compressed: tuple[Token, ...] = ()
    entropy_original: Number = None
    entropy: Number = None
    kl: Number = None


class Sample(_Loose):
    """A prompt continued by both models."""

    prompt: str = ""
    original: str = ""
    compressed: str = ""
    first_divergence: int | None = None
    repetition_original: Number = None
    repetition: Number = None
    distinct_2_original: Number = None
    distinct_2: Number = None


class Diagnosis(_Loose):
    """What ``tenpak diagnose --json`` prints."""

    original: str = ""
    artifact: str = ""
    text: str = ""
    tokens: int = 0
    layers: tuple[Layer, ...] = ()
    culprit: Culprit | None = None
    weights: tuple[Finding, ...] = ()
    step: Step | None = None
    generation: tuple[Sample, ...] = ()
    verdict: tuple[str, ...] = ()


class Loss(BaseModel):
    """A tensor's recipe with what was predicted and what was measured of it, nats per token."""

    model_config = ConfigDict(frozen=True)

    name: str
    recipe: str
    predicted: float
    measured: float


def load_diagnosis(path: Path, tensors: Mapping[str, Any]) -> Diagnosis:
    """Read a diagnosis of an artifact that holds ``tensors``.

    Raises:
        EvaluationError: it cannot be read, is malformed, or tells of none of these tensors.
    """
    hint = "write it with `tenpak diagnose ORIGINAL ARTIFACT --json > FILE`"
    found = _load(path, Diagnosis, "a diagnosis", hint)
    _require_known(path, [weight.name for weight in found.weights], tensors, hint)
    return found


def load_profile(path: Path, source_sha256: str) -> Profile:
    """Read a profile of the model that was compressed.

    Raises:
        AllocationError: it cannot be read or is malformed.
        EvaluationError: it is of another model.
    """
    found = Profile.read(path)
    if found.source.sha256 != source_sha256:
        raise EvaluationError(
            f"{path} is a profile of another model ({found.source.name}) or of other weights",
            hint="make one of the model that was compressed: `tenpak profile MODEL -o FILE`",
        )
    return found


_Kind = TypeVar("_Kind", bound=_Loose)


def _load(path: Path, kind: type[_Kind], what: str, hint: str) -> _Kind:
    try:
        return kind.model_validate_json(read_whole(path, _MAX_BYTES))
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(f"{path} is not {what}: {where or 'it'}: {first['msg']}", hint=hint) from error


def _require_known(path: Path, names: list[str], tensors: Mapping[str, Any], hint: str) -> None:
    if names and not any(name in tensors for name in names):
        raise EvaluationError(
            f"{path} tells of other tensors, such as {names[0]!r}, than the artifact holds", hint=hint
        )
