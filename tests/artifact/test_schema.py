"""The manifest: strict, canonical, and sealed by its own hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from artifacts import blank_manifest, canonical, edit_manifest, write_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenpak.artifact.schema import (
    FORMAT_VERSION,
    SHARING_VERSION,
    DenseEntry,
    Manifest,
    dump_manifest,
    load_manifest,
    shard_names,
)
from tenpak.errors import ArtifactError, CorruptArtifactError, FormatVersionError, TenpakError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_small(tmp_path / "artifact")


def write(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "manifest.json"
    path.write_bytes(raw)
    return path


def test_what_is_written_is_read_again(artifact: Path) -> None:
    manifest = load_manifest(artifact / "manifest.json")
    assert dump_manifest(manifest) == (artifact / "manifest.json").read_bytes()
    assert manifest.weights["b.weight"].codec["id"] == "residual/1"
    assert manifest.dense["mask"].reason == "a buffer"


def test_bytes_are_compact_ascii_json_with_the_hash_last() -> None:
    manifest = blank_manifest(recipe="größe", quality={"kl": 0.25, "nested": [1, None, True]})
    raw = dump_manifest(manifest)
    content = json.loads(raw)
    assert list(content)[-1] == "sha256"
    assert raw == canonical(content)
    claimed = content.pop("sha256")
    assert claimed == hashlib.sha256(canonical(content)).hexdigest()
    assert claimed == hashlib.sha256(raw[:-77] + b"}").hexdigest()  # the same without parsing, as the format says
    assert content["recipe"] == "größe"
    assert raw.isascii()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((), {"new": 1}),
        (("source",), {"licence": "mit"}),
        (("weights", "a.weight"), {"note": ""}),
        (("weights", "a.weight", "payloads", 0), {"padding": 0}),
        (("weights", "a.weight", "payloads", 0, "fields", 0), {"offset": 0}),
        (("dense", "mask"), {"bits": 8}),
    ],
)
def test_unknown_field_is_an_error_that_names_it(where: tuple[Any, ...], value: Any, artifact: Path) -> None:
    def change(content: Any) -> None:
        for step in where:
            content = content[step]
        content.update(value)

    edit_manifest(artifact, change)
    with pytest.raises(CorruptArtifactError, match=rf"{next(iter(value))}.*not permitted") as caught:
        load_manifest(artifact / "manifest.json")
    assert caught.value.hint


@pytest.mark.parametrize(
    "field",
    [name for name in Manifest.model_fields if name not in ("quality", "calibration", "shared", "format_version")],
)
def test_missing_field_is_an_error_that_names_it(field: str, artifact: Path) -> None:
    edit_manifest(artifact, lambda content: {key: value for key, value in content.items() if key != field})
    with pytest.raises(CorruptArtifactError, match=rf"{field}.*required"):
        load_manifest(artifact / "manifest.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), "0"),
        (("seed",), True),
        (("seed",), 0.0),
        (("recipe",), None),
        (("weights", "a.weight", "bits"), -8),
        (("weights", "a.weight", "bits"), 2**63),
        (("weights", "a.weight", "bits"), "8"),
        (("weights", "a.weight", "shape"), [-8, -40]),
        (("weights", "a.weight", "shape"), [8.0, 40.0]),
        (("weights", "a.weight", "shape"), "8x40"),
        (("weights", "a.weight", "shape"), [1] * 9),
        (("weights", "a.weight", "transposed"), 1),
        (("weights", "a.weight", "sha256"), "0" * 63),
        (("weights", "a.weight", "sha256"), "0" * 64 + "\n"),
        (("weights", "a.weight", "sha256"), "G" * 64),
        (("weights", "a.weight", "codec"), "uniform/1"),
        (("weights", "a.weight", "payloads", 0, "count"), 0),
        (("weights", "a.weight", "payloads", 0, "count"), -1),
        (("weights", "a.weight", "payloads"), {}),
        (("dense", "mask"), None),
        (("tied",), []),
        (("files", "tokenizer.json"), None),
        (("overrides",), {"a": "b"}),
        (("quality",), 3),
    ],
)
def test_wrong_types_and_ranges_are_refused(path: tuple[Any, ...], value: Any, artifact: Path) -> None:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    edit_manifest(artifact, change)
    with pytest.raises(CorruptArtifactError, match=str(path[-1])):
        load_manifest(artifact / "manifest.json")


@pytest.mark.parametrize("version", [0, SHARING_VERSION + 1, -1, True, 1.0, "1", None, [1], {"a": 1}, 10**50])
def test_other_versions_say_so(version: Any, artifact: Path) -> None:
    edit_manifest(artifact, lambda content: content.update(format_version=version))
    with pytest.raises(FormatVersionError, match=f"reads {FORMAT_VERSION} and {SHARING_VERSION}"):
        load_manifest(artifact / "manifest.json")


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda raw: raw + b"\n",
        lambda raw: b" " + raw,
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.replace(b'":', b'": ', 1),
        lambda raw: json.dumps(json.loads(raw), indent=1).encode(),
        lambda raw: raw.replace(b'"seed":0', b'"seed":0,"seed":0'),
        lambda raw: raw.replace(b'"seed":0', b'"seed":1'),
        lambda raw: raw.replace(b'"seed":0', b'"seed":-0'),
        lambda raw: raw.replace(b"somewhere", b"s\\u006fmewhere"),
        lambda raw: json.dumps(dict(sorted(json.loads(raw).items())), separators=(",", ":")).encode(),
        lambda raw: raw.decode().encode("utf-16"),
    ],
)
def test_other_bytes_with_the_same_meaning_are_refused(rewrite: Any, artifact: Path) -> None:
    path = artifact / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(rewrite(raw))
    assert path.read_bytes() != raw
    with pytest.raises(CorruptArtifactError):
        load_manifest(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"format_version"',
        b"\xff\xfe",
        b'{"format_version":1}',
        b'{"format_version":1,"sha256":null}',
        b'{"format_version":1,"seed":NaN,"sha256":"0"}',
        b'{"format_version":1,"seed":1e999,"sha256":"0"}',
        b'{"format_version":1,"seed":' + b"9" * 10_000 + b',"sha256":"0"}',
        b'{"format_version":1,"quality":' + b"[" * 100_000 + b"]" * 100_000 + b',"sha256":"0"}',
        b'{"format_version":1,"quality":' + b"[" * 990 + b"]" * 990 + b',"sha256":"0"}',
        b'{"format_version":1,"recipe":"\\ud800","sha256":"0"}',
    ],
    ids=range(14),
)
def test_what_is_no_manifest_is_refused(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError):
        load_manifest(write(tmp_path, raw))


def test_lone_surrogates_are_refused(artifact: Path) -> None:
    edit_manifest(artifact, lambda content: content.update(recipe="\ud800"))
    with pytest.raises(CorruptArtifactError):
        load_manifest(artifact / "manifest.json")


def test_missing_manifest_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="no readable manifest"):
        load_manifest(tmp_path / "manifest.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_else_gives_an_artifact_error(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        load_manifest(write(tmp_path, raw))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_gives_a_tenpak_error_or_a_manifest(data: st.DataObject, value: Any, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    if not folder.exists():
        write_small(folder)
        (folder / "manifest.json").rename(tmp_path / "original.json")
    (folder / "manifest.json").write_bytes((tmp_path / "original.json").read_bytes())

    def change(content: Any) -> None:
        while True:
            keys = list(content) if isinstance(content, dict) else list(range(len(content)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(content[key], dict | list) or not content[key] or data.draw(st.booleans()):
                content[key] = value
                return
            content = content[key]

    edit_manifest(folder, change)
    try:
        manifest = load_manifest(folder / "manifest.json")
    except TenpakError:
        return
    assert dump_manifest(manifest) == (folder / "manifest.json").read_bytes()


def test_entries_are_frozen() -> None:
    entry = DenseEntry(shape=(1,), dtype="F32", reason="", sha256="0" * 64)
    with pytest.raises(ValueError, match="frozen"):
        entry.reason = "x"  # type: ignore[misc]


def test_names_of_weight_files() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
