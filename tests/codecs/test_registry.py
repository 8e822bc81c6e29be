"""Ids, near names, third-party codecs and duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from tenpak.codecs import registry
from tenpak.codecs.base import Codec
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CodecError, RecipeError, UnknownCodecError


class Foreign(Uniform):
    """What another package might register."""

    id = "foreign/1"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    registry._targets.cache_clear()
    registry._load.cache_clear()
    yield lambda name, value: points.append(EntryPoint(name, value, registry.ENTRY_POINT_GROUP))
    registry._targets.cache_clear()
    registry._load.cache_clear()


def test_every_id_is_its_class_id() -> None:
    assert registry.ids() == tuple(sorted(registry.ids()))
    for codec_id in registry.ids():
        codec = registry.get(codec_id)
        assert issubclass(codec, Codec)
        assert codec.id == codec_id


def test_unknown_ids_name_what_is_near() -> None:
    with pytest.raises(UnknownCodecError, match="unifrom/1") as caught:
        registry.get("unifrom/1")
    assert "uniform/1" in str(caught.value.hint)
    with pytest.raises(LookupError) as far:
        registry.get("qqqq")
    assert "registered are" in str(getattr(far.value, "hint", ""))


def test_a_later_version_is_unknown() -> None:
    with pytest.raises(UnknownCodecError):
        registry.from_json({"id": "uniform/2", "bits": 4})


@pytest.mark.parametrize("config", [{}, {"id": None}, {"id": 1}, {"bits": 4}, {"id": ["uniform/1"]}])
def test_a_configuration_names_its_codec(config: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="id"):
        registry.from_json(config)


def test_missing_fields_are_named() -> None:
    with pytest.raises(RecipeError, match="bits"):
        registry.from_json({"id": "uniform/1"})


def test_entry_points_register_codecs(install, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    install("foreign/1", f"{__name__}:Foreign")
    assert registry.get("foreign/1").id == "foreign/1"
    assert "foreign/1" in registry.ids()
    assert registry.from_json({"id": "foreign/1", "bits": 4}) == Foreign(4)


def test_a_duplicate_id_raises(install) -> None:  # type: ignore[no-untyped-def]
    install("uniform/1", f"{__name__}:Foreign")
    with pytest.raises(CodecError, match="registered twice"):
        registry.get("dense/1")


@pytest.mark.parametrize(
    "target", ["no_such_module:X", "tenpak.codecs.uniform:NoSuch", "tenpak.codecs.uniform:Uniform", "json:dumps"]
)
def test_a_broken_entry_point_is_named(install, target: str) -> None:  # type: ignore[no-untyped-def]
    install("foreign/1", target)
    with pytest.raises(CodecError, match="foreign/1"):
        registry.get("foreign/1")
    assert registry.get("uniform/1") is Uniform
