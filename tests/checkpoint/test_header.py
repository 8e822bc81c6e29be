"""The safetensors container: read as the reference reads it, and whatever else comes, one kind of error."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import edit_header, join_file, little_memory, split_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tenpak.checkpoint.header import DTYPE_BYTES, encode_header, read_header, read_into, read_whole
from tenpak.checkpoint.source import TORCH_DTYPES, dtype_name, read_tensor, tensor_bytes
from tenpak.errors import CheckpointError, UnsupportedDtypeError

ONE_FOLDER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def sound(path: Path) -> Path:
    save_file({"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
    return path


# Sound files ----------------------------------------------------------------------------------------------------


def test_reads_what_the_reference_writes(path: Path) -> None:
    tensors = {
        f"{name}{list(shape)}": torch.randint(0, 2, shape).to(dtype)
        for name, dtype in TORCH_DTYPES.items()
        for shape in ((), (0,), (5,), (2, 3), (1, 2, 0), (2, 2, 2))
    }
    save_file(tensors, path)
    header = read_header(path)
    assert header.keys() == tensors.keys()
    for name, info in header.items():
        assert (info.dtype, info.shape) == (dtype_name(tensors[name].dtype), tuple(tensors[name].shape))
        assert info.nbytes == tensors[name].nbytes
        assert info.numel == tensors[name].numel()
        again = read_tensor(info)
        assert again.dtype == tensors[name].dtype
        assert torch.equal(again, tensors[name])
    assert [info.start for info in header.values()] == sorted(info.start for info in header.values())


def test_reference_reads_what_we_write(path: Path) -> None:
    tensors = {'ü "quoted"\n': torch.arange(3, dtype=torch.int64), "b": torch.rand(2, 3).half(), "c": torch.empty(0)}
    rows = [(name, dtype_name(t.dtype), tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    path.write_bytes(encode_header(rows) + b"".join(bytes(tensor_bytes(t)) for t in tensors.values()))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) for name, t in tensors.items())
    assert read_header(path).keys() == tensors.keys()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(encode_header(rows)) % 8 == 0


def test_empty_and_metadata(path: Path) -> None:
    save_file({}, path)
    assert read_header(path) == {}
    save_file({"a": torch.zeros(2)}, path, {"anything": "at all"})
    assert list(read_header(path)) == ["a"]


# Malformed files ------------------------------------------------------------------------------------------------

HUGE = 2**62
BROKEN_HEADERS: dict[str, Any] = {
    "a list": [],
    "a number": b"7",
    "null": b"null",
    "no JSON": b"{oops}",
    "empty": b"",
    "spaces": b"      ",
    "cut": b'{"a":{"dtype":"F32","sha',
    "not UTF-8": b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "UTF-16": json.dumps({"a": entry()}).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode(),
    "surrogates": b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "deep": b"[" * 200_000,
    "deep entry": b'{"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "name twice": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
    b'"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "key twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "entry a list": {"a": [1]},
    "entry null": {"a": None},
    "entry without shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "entry with more": {"a": {**entry(), "strides": [1]}},
    "shape a number": {"a": {**entry(), "shape": 2}},
    "shape null": {"a": {**entry(), "shape": None}},
    "shape negative": {"a": entry(shape=[-2])},
    "shape two negatives": {"a": entry(shape=[-1, -2])},
    "shape a float": {"a": entry(shape=[2.0])},
    "shape a bool": {"a": entry(shape=[True, 2])},
    "shape a string": {"a": entry(shape=["2"])},
    "shape nested": {"a": entry(shape=[[2]])},
    "shape huge": {"a": entry(shape=[HUGE])},
    "shape overflows to what is there": {"a": entry(shape=[2**32, 2**32, 2])},
    "shape beyond 64 bits": {"a": entry(shape=[2**64 + 2])},
    "shape of many digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "shape of many dimensions": {"a": entry(shape=[1] * 100_000 + [2])},
    "offsets negative": {"a": entry(offsets=[-8, 0])},
    "offsets backwards": {"a": entry(offsets=[8, 0])},
    "offsets one": {"a": entry(offsets=[8])},
    "offsets three": {"a": entry(offsets=[0, 8, 8])},
    "offsets floats": {"a": entry(offsets=[0.0, 8.0])},
    "offsets beyond the file": {"a": entry(shape=[HUGE // 4], offsets=[0, HUGE])},
    "size wrong": {"a": entry(shape=[3])},
    "zero shape with bytes": {"a": entry(shape=[0, 5])},
    "overlap": {"a": entry(), "b": entry(shape=[1], offsets=[4, 8])},
    "same bytes": {"a": entry(), "b": entry()},
    "hole at the start": {"a": entry(shape=[1], offsets=[4, 8])},
    "hole in the middle": {"a": entry("U8", [3], [0, 3]), "b": entry("U8", [4], [4, 8])},
    "hole at the end": {"a": entry(shape=[1], offsets=[0, 4])},
    "empty tensor elsewhere": {"a": entry(), "b": entry(shape=[0], offsets=[4, 4])},
    "nothing described": {},
    "metadata a list": {"__metadata__": ["format"], "a": entry()},
    "metadata null": {"__metadata__": None, "a": entry()},
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": entry()},
}
BROKEN_DTYPES = ["F8_E4M3", "F4", "f32", "", "C64", None, 5, ["F32"], {"F32": 1}, True]


@pytest.mark.parametrize("header", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_malformed_header_is_refused(header: Any, path: Path) -> None:
    join_file(path, header, bytes(8))
    with little_memory(), pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(path)
    assert caught.value.hint
    assert not isinstance(caught.value, UnsupportedDtypeError)


@pytest.mark.parametrize("dtype", BROKEN_DTYPES, ids=repr)
def test_unknown_dtype_is_named(dtype: Any, path: Path) -> None:
    join_file(path, {"layer.weight": {**entry(), "dtype": dtype}}, bytes(8))
    with pytest.raises(UnsupportedDtypeError) as caught:
        read_header(path)
    assert "layer.weight" in str(caught.value)
    assert repr(dtype) in str(caught.value)
    assert "BF16" in str(caught.value.hint)


NO_FILES = [
    *(b"", b"\0", bytes(7), bytes(8), b"\xff" * 8, b"\xff" * 100, b"PK\x03\x04" * 9),
    *((2**40).to_bytes(8, "little"), b"\0\0\0\0\0\0\0\x80{}"),
]


@pytest.mark.parametrize("raw", NO_FILES)
def test_what_is_no_safetensors_file_is_refused(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    with little_memory(), pytest.raises(CheckpointError, match="sound safetensors"):
        read_header(path)


def test_header_that_announces_gigabytes_takes_none(path: Path) -> None:
    """A sparse file is as large as it says: only the limit protects."""
    with path.open("wb") as file:
        file.write((3 << 30).to_bytes(8, "little"))
        file.truncate(4 << 30)
    with little_memory(), pytest.raises(CheckpointError, match="announces"):
        read_header(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "loop"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(path)
    with pytest.raises(OSError, match=r"."):
        read_whole(path, 100)


@pytest.mark.parametrize("lost", [1, 8, 20, 32, 60])
def test_truncated_file_is_refused(lost: int, sound: Path) -> None:
    raw = sound.read_bytes()
    sound.write_bytes(raw[:-lost])
    with pytest.raises(CheckpointError):
        read_header(sound)
    sound.write_bytes(raw + bytes(lost))
    with pytest.raises(CheckpointError, match="describes"):
        read_header(sound)


def test_file_that_shrinks_while_it_is_open(sound: Path) -> None:
    info = read_header(sound)["b"]
    os.truncate(sound, info.start + 3)
    with pytest.raises(CheckpointError, match="ends before"):
        read_tensor(info)
    with sound.open("rb") as file, pytest.raises(CheckpointError, match="ends before"):
        read_into(file, info, memoryview(bytearray(info.nbytes)))
    sound.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_tensor(info)


@ONE_FOLDER
@given(raw=st.binary(max_size=300))
def test_random_bytes(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for data in (raw, len(raw).to_bytes(8, "little") + raw):
        path.write_bytes(data)
        refused_or_agreed(path)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([*DTYPE_BYTES])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 2**31, 2**62, 2**64]) | st.integers(-9, 40), max_size=4)


@ONE_FOLDER
@given(
    header=st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from([*DTYPE_BYTES, "F8_E4M3"]), "shape": NUMBERS, "data_offsets": NUMBERS}
        )
        | VALUES,
        max_size=3,
    ),
    size=st.integers(0, 40),
)
def test_headers_of_any_values(header: Any, size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    join_file(path, header, bytes(size))
    refused_or_agreed(path)


@ONE_FOLDER
@given(data=st.data())
def test_mutations_of_a_sound_file(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.int8)}, path, {"format": "pt"})
    header, body = split_file(path)
    length = len(path.read_bytes()) - len(body)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.sampled_from(b'0123456789-.eE[]{},:" \\u\x00\xff'))
    path.write_bytes(raw)
    refused_or_agreed(path)
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(sorted(header[name])))
    header[name][key] = data.draw(VALUES)
    join_file(path, header, body)
    refused_or_agreed(path)


def refused_or_agreed(path: Path) -> None:
    """Only our errors may come out; what we accept, the reference accepts and reads alike."""
    tracemalloc.start()
    try:
        found = read_header(path)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 << 20  # a file of some hundred bytes
    try:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(found)
            for name, info in found.items():
                assert tuple(file.get_slice(name).get_shape()) == info.shape
    except SafetensorError as error:
        pytest.fail(f"accepted what the reference refuses: {error}")


def test_change_of_one_entry_is_noticed(sound: Path) -> None:
    """The helper that makes broken files leaves a sound one sound."""
    edit_header(sound, lambda header: None)
    assert set(read_header(sound)) == {"a", "b"}
    edit_header(sound, lambda header: {name: header[name] for name in header if name != "a"})
    with pytest.raises(CheckpointError):
        read_header(sound)
