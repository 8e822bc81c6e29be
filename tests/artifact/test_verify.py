"""Any flipped bit is found: by ``verify`` everywhere, by opening or reading wherever it could matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from artifacts import flip, write_small
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tenpak.artifact.reader import open_artifact
from tenpak.artifact.verify import verify
from tenpak.errors import ArtifactError, CorruptArtifactError, TenpakError

SLOW = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("sound") / "artifact", max_shard_bytes=300)


@pytest.fixture(scope="module")
def copy(sound: Path) -> Path:
    """One copy that every example damages and mends: copying for each would take most of the time."""
    return Path(shutil.copytree(sound, sound.parent / "copy"))


def found_by_verify(folder: Path) -> bool:
    try:
        return not verify(folder).ok
    except ArtifactError:
        return True


def found_by_reading(folder: Path) -> bool:
    try:
        artifact = open_artifact(folder)
        for name in artifact.manifest.weights:
            artifact.decode(name)
        for name in artifact.manifest.dense:
            artifact.read_dense(name)
    except TenpakError:
        return True
    return False


def test_sound_artifact_is_sound(sound: Path) -> None:
    result = verify(sound)
    assert result.ok
    assert result.problems == ()
    assert result.tensors == 5
    assert result.bytes == sum(path.stat().st_size for path in sound.glob("*.safetensors"))
    assert len(list(sound.glob("*.safetensors"))) == 2
    assert not found_by_reading(sound)


@SLOW
@given(data=st.data())
def test_any_flipped_bit_is_found(data: st.DataObject, copy: Path) -> None:
    path = data.draw(st.sampled_from(sorted(copy.iterdir())), label="file")
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1), label="bit")
    flip(path, bit)
    try:
        assert found_by_verify(copy)
        assert path.suffix != ".safetensors" or found_by_reading(copy)
        assert path.name != "manifest.json" or found_by_reading(copy)
    finally:
        flip(path, bit)


def test_every_byte_of_every_header_is_checked(copy: Path) -> None:
    """Headers are small enough to try all bytes; their padding and metadata have no hash of their own."""
    for path in copy.glob("*.safetensors"):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        raw = path.read_bytes()
        for byte in range(header):
            flip(path, 8 * byte + byte % 8)
            with pytest.raises(TenpakError):
                open_artifact(copy)
            path.write_bytes(raw)


@SLOW
@given(data=st.data())
@example(data=None)
def test_cut_and_grown_files_are_found(data: st.DataObject | None, copy: Path) -> None:
    if data is None:
        assert not found_by_verify(copy)
        return
    path = data.draw(st.sampled_from(sorted(copy.iterdir())), label="file")
    raw = path.read_bytes()
    length = data.draw(st.integers(0, len(raw) + 20).filter(lambda n: n != len(raw)), label="length")
    path.write_bytes((raw + bytes(20))[:length])
    try:
        assert found_by_verify(copy)
    finally:
        path.write_bytes(raw)


def test_missing_files_are_found_by_name(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        raw = path.read_bytes()
        path.unlink()
        if path.name == "tokenizer.json":
            assert verify(copy).problems == ("file 'tokenizer.json' is missing",)
        else:
            with pytest.raises(ArtifactError):
                verify(copy)
        path.write_bytes(raw)
    assert verify(copy).ok


def test_problems_name_tensor_and_file(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "artifact")
    info = open_artifact(folder).tensors["b.weight_codes"]
    flip(info.file, 8 * info.start)
    (folder / "tokenizer.json").write_text("{}")
    problems = verify(folder).problems
    assert len(problems) == 2
    assert "'b.weight_codes'" in problems[0]
    assert "'tokenizer.json'" in problems[1]
    with pytest.raises(CorruptArtifactError, match=r"b\.weight_codes"):
        open_artifact(folder).decode("b.weight")
    open_artifact(folder).decode("b.weight", verify=False)
    open_artifact(folder).decode("a.weight")


def test_swapped_tensors_of_equal_size_are_found(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "artifact")
    artifact = open_artifact(folder)
    info = artifact.tensors["a.weight_codes"]
    raw = bytearray(info.file.read_bytes())
    half = info.nbytes // 2
    raw[info.start : info.start + half], raw[info.start + half : info.end] = (
        raw[info.start + half : info.end],
        raw[info.start : info.start + half],
    )
    info.file.write_bytes(raw)
    assert found_by_verify(folder)
    assert found_by_reading(folder)


def test_verify_needs_little_memory(tmp_path: Path) -> None:
    import torch
    from artifacts import RESIDENT, blank_manifest, little_memory

    from tenpak.artifact.writer import ArtifactWriter

    with ArtifactWriter(tmp_path / "artifact") as writer:
        writer.add_dense("large", torch.zeros(2 * RESIDENT // 4), "1-D")
        writer.publish(blank_manifest(), {})
    with little_memory():
        assert verify(tmp_path / "artifact").ok


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "checkpoint"])
def test_what_is_no_artifact_is_said_to_be_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind != "nothing":
        path.mkdir()
    if kind == "checkpoint":
        (path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a") as caught:
        verify(path)
    assert caught.value.hint
