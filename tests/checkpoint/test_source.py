"""Source checkpoints: every way in which a model may lie on the disk, and every way in which it may lie."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import edit_header, edit_json, little_memory, write_small
from families import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tenpak
from tenpak.checkpoint.source import (
    dtype_name,
    is_artifact,
    is_plain_name,
    locate,
    open_checkpoint,
    read_config,
    tensor_bytes,
    tensor_sha256,
)
from tenpak.errors import CheckpointError, MissingTensorError, UnsafeCheckpointError, UnsupportedDtypeError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=1)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same model in three shards with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()
    return model


def refused(folder: Path, match: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def same(first: Path, second: Path) -> bool:
    one, two = open_checkpoint(first), open_checkpoint(second)
    return one.tensors.keys() == two.tensors.keys() and all(torch.equal(one.read(n), two.read(n)) for n in one.tensors)


# Sound checkpoints ----------------------------------------------------------------------------------------------


def test_single_file(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    expected = load_file(llama / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert checkpoint.bytes == (llama / "model.safetensors").stat().st_size
    assert checkpoint.name == "model"
    assert checkpoint.config["model_type"] == "llama"


def test_shards_hold_the_same(llama: Path, sharded: Path) -> None:
    assert same(llama, sharded)
    assert len(open_checkpoint(sharded).files) == 3


def test_loose_single_file(llama: Path, model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights-of-mine.safetensors")
    assert same(llama, model)


def test_single_file_comes_before_an_index(llama: Path, sharded: Path) -> None:
    """As transformers does it: compress what it would load."""
    shutil.copy(llama / "model.safetensors", sharded)
    assert [file.name for file in open_checkpoint(sharded).files] == ["model.safetensors"]


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("shards", [False, True])
def test_pickled(shards: bool, old: bool, llama: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if shards:
        names = sorted(tensors)
        parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": {k: tensors[k] for k in names[n::2]} for n in range(2)}
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        parts = {"pytorch_model.bin": {**tensors, "version": 3}}  # what is no tensor is left out
    for file, part in parts.items():
        torch.save(part, model / file, _use_new_zipfile_serialization=not old)
    assert same(llama, model)


def test_safetensors_come_before_pickles(llama: Path, model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"never read")
    assert same(llama, model)


def test_mixed_dtypes(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {name: tensor.to(dtypes[n % 3]) for n, (name, tensor) in enumerate(tensors.items())}
    save_file(mixed, model / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(model)
    for name, tensor in mixed.items():
        assert checkpoint.tensors[name].dtype == dtype_name(tensor.dtype)
        assert torch.equal(checkpoint.read(name), tensor)


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """A checkpoint of 512 MiB, sparse on the disk: opening must not touch its data, reading only what is asked for."""
    length = 64 << 20
    names = ["model.embed_tokens.weight", "b", "c", "d", "e", "f", "g", "h"]
    entries = {
        name: {"dtype": "U8", "shape": [length], "data_offsets": [n * length, (n + 1) * length]}
        for n, name in enumerate(names)
    }
    text = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + len(names) * length)
    (tmp_path / "config.json").write_text("{}")
    with little_memory():
        assert len(open_checkpoint(tmp_path).tensors) == len(names)


def test_bytes_and_hash_are_those_of_the_file(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    raw = (llama / "model.safetensors").read_bytes()
    for name, info in checkpoint.tensors.items():
        assert bytes(tensor_bytes(checkpoint.read(name))) == raw[info.start : info.end]
    assert tensor_sha256(torch.arange(6).reshape(2, 3).T) == tensor_sha256(torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_unknown_tensor_is_named(llama: Path) -> None:
    with pytest.raises(MissingTensorError, match="no tensor 'nothing'"):
        open_checkpoint(llama).read("nothing")


# Hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which is offline."""
    import huggingface_hub.constants as constants

    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub: Path, name: str, source: Path, revision: str = "main") -> Path:
    """What downloading would have left: blobs, and a snapshot of links to them."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    return snapshot


def test_hub_id_offline_from_the_cache(llama: Path, hub: Path) -> None:
    snapshot = cache(hub, "someone/tiny", llama)
    assert locate("someone/tiny") == snapshot
    checkpoint = open_checkpoint("someone/tiny")
    assert checkpoint.name == "someone/tiny"
    assert torch.equal(checkpoint.read("model.norm.weight"), open_checkpoint(llama).read("model.norm.weight"))


def test_hub_revision(llama: Path, hub: Path) -> None:
    cache(hub, "someone/tiny", llama, "v2")
    assert open_checkpoint("someone/tiny", revision="v2").tensors
    with pytest.raises(CheckpointError, match="someone/tiny is neither"):
        open_checkpoint("someone/tiny")


def test_hub_pickle_offline(llama: Path, model: Path, hub: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    cache(hub, "someone/pickled", model)
    assert open_checkpoint("someone/pickled").tensors.keys() == open_checkpoint(llama).tensors.keys()


def test_artifact_from_the_cache(llama: Path, hub: Path, tmp_path: Path) -> None:
    """Links are how the cache stores files, so an artifact may consist of them."""
    tenpak.compress(llama, tmp_path / "artifact")
    snapshot = cache(hub, "someone/small", tmp_path / "artifact")
    assert tenpak.verify(snapshot).ok
    assert tenpak.load("someone/small").config.model_type == "llama"


@pytest.mark.parametrize("source", ["someone/nothing", "nothing", "a b", "someone/some--thing..", "x" * 200])
def test_unknown_id(source: str, hub: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor") as caught:
        open_checkpoint(source)
    assert "spelling" in str(caught.value.hint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./nothing", "/nothing/at/all", "a/b/c", "../x", "~/x"])
def test_paths_are_never_asked_of_the_hub(source: str, hub: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(source)


def test_file_instead_of_folder(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(llama / "model.safetensors")


# Bad checkpoints ------------------------------------------------------------------------------------------------


def test_empty_folder(tmp_path: Path) -> None:
    assert "config.json" in str(refused(tmp_path, "no readable config").hint)
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path, r"holds no model\.safetensors").hint


def test_two_loose_files_are_ambiguous(model: Path) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    shutil.copy(model / "a.safetensors", model / "b.safetensors")
    refused(model, "holds no model")


@pytest.mark.parametrize("raw", [b"", b"[]", b"7", b"{", b"\xff", b'{"a":' * 100_000, b"9" * 10_000], ids=range(7))
def test_config_that_is_no_object(raw: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(raw)
    refused(model, r"config\.json is not")


@pytest.mark.parametrize("target", ["config.json", "model.safetensors"])
def test_endless_and_waiting_files(target: str, model: Path) -> None:
    (model / target).unlink()
    (model / target).symlink_to("/dev/zero")
    with little_memory():
        refused(model, "no readable config|holds no model|not a regular file")
    (model / target).unlink()
    os.mkfifo(model / target)
    refused(model, "no readable config|holds no model|not a regular file")


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {}])
def test_quantized_sources_are_refused(method: dict[str, Any], model: Path) -> None:
    edit_json(model / "config.json", lambda config: {**config, "quantization_config": method})
    error = refused(model, f"already quantized .*{method.get('quant_method', 'unnamed')}")
    assert "unquantized" in str(error.hint)


def test_artifact_is_no_source(tmp_path: Path) -> None:
    refused(write_small(tmp_path / "artifact"), "already quantized .*tenpak")
    assert is_artifact(tmp_path / "artifact")
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "nothing")


def test_unknown_dtype_is_named(model: Path) -> None:
    def change(header: Any) -> None:
        entry = header["model.norm.weight"]
        entry |= {"dtype": "F8_E4M3", "shape": [entry["shape"][0] * 4]}

    edit_header(model / "model.safetensors", change)
    refused(model, "model.norm.weight.*F8_E4M3", UnsupportedDtypeError)
    with pytest.raises(UnsupportedDtypeError, match="float8"):
        dtype_name(torch.float8_e4m3fn)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert str(sharded) in str(refused(sharded, r"shard model-00002-of-00003\.safetensors is missing").hint)


def test_index_that_promises_too_much(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors"))
    refused(sharded, "does not hold tensor 'ghost'", MissingTensorError)


def test_index_that_says_the_wrong_shard(sharded: Path) -> None:
    name = "model.norm.weight"
    held = json.loads((sharded / INDEX).read_text())["weight_map"][name]
    other = next(file.name for file in sharded.glob("*.safetensors") if file.name != held)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({name: other}))
    refused(sharded, f"{other} does not hold tensor '{name}'", MissingTensorError)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second, _ = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(second) | {"model.norm.weight": torch.zeros(32)}
    save_file(tensors | load_file(first), second)
    with pytest.raises(CheckpointError, match=r"is in model-0|does not hold"):
        open_checkpoint(sharded)


def test_stale_shard_outside_the_index_is_not_read(llama: Path, sharded: Path) -> None:
    save_file({"stale": torch.zeros(1)}, sharded / "model-00009-of-00009.safetensors")
    assert same(llama, sharded)


TRICKS = [
    "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\0b", "a\\b", "x" * 300, "\ud800",
    None, 7, [1], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", TRICKS, ids=ascii)
@pytest.mark.parametrize("others", [True, False], ids=["beside others", "alone"])
def test_shards_outside_the_folder_are_refused(name: Any, others: bool, sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "model.safetensors")
    edit_json(sharded / INDEX, lambda index: {"weight_map": {**(index["weight_map"] if others else {}), "trick": name}})
    refused(sharded, "outside its folder|not a valid index")


def test_plain_names() -> None:
    assert all(map(is_plain_name, ("model.safetensors", "ümlaut", "a b", "...", "x" * 255)))
    assert not any(is_plain_name(name) for name in TRICKS if isinstance(name, str))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map":[]}',
        b'{"weight_map":{}}',
        b'{"weight_map":null}',
        b"[" * 100_000,
        b'{"weight_map":"model.safetensors"}',
    ],
)
def test_index_that_is_none(index: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(index)
    refused(sharded, "not a valid index|lists no shards")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.bin"])
def test_index_of_something_else(name: str, sharded: Path) -> None:
    (sharded / "tokenizer.bin").write_bytes(b"not a pickle")
    edit_json(sharded / INDEX, lambda index: {"weight_map": {"a": name}})
    refused(sharded, name)


# Pickles that mean harm -----------------------------------------------------------------------------------------


class Harmful:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


def pickled(model: Path, content: Any) -> Path:
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("how", ["zip", "plain pickle", "hidden in a state dict"])
def test_code_in_a_pickle_does_not_run(how: str, model: Path) -> None:
    proof = model / "proof"
    pickle.loads(pickle.dumps(Harmful(proof)))
    assert proof.exists()  # the attack works, where it is let
    proof.unlink()
    tensors: dict[str, Any] = load_file(model / "model.safetensors")
    content = Harmful(proof) if how == "zip" else {**tensors, "extra": Harmful(proof)}
    pickled(model, content)
    if how == "plain pickle":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    error = refused(model, "could run code", UnsafeCheckpointError)
    assert "safetensors" in str(error.hint)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3, None], ids=["list", "tensor", "3", "None"])
def test_pickle_without_a_dictionary(content: Any, model: Path) -> None:
    refused(pickled(model, content), "not a dictionary of tensors")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),  # four bytes that claim to be four TiB
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_pickled_tensor_that_is_no_plain_array(tensor: Tensor, model: Path) -> None:
    pickled(model, {"odd.weight": tensor})
    with little_memory():
        refused(model, "odd.weight.*not a plain array")


def test_pickled_dtype_is_named(model: Path) -> None:
    refused(pickled(model, {"odd.weight": torch.zeros(2, dtype=torch.complex64)}), "odd.weight", UnsupportedDtypeError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_pickles(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    old = data.draw(st.booleans(), label="before torch 1.6")
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=not old)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with contextlib.suppress(CheckpointError):  # nothing else may come out
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_zip_that_is_no_checkpoint(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(model, "pytorch_model.bin")


# Configurations that would take for ever to build ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("value", [2_000, 10**9, 1e300])
def test_more_layers_than_tensors(key: str, value: float, model: Path) -> None:
    edit_json(model / "config.json", lambda config: {**config, key: value})
    refused(model, f"{key} = .* tensors")
    edit_json(model / "config.json", lambda config: {"model_type": "llama", "text_config": {key: value}})
    refused(model, f"{key} = .* tensors")


def test_config_is_given_as_it_is(llama: Path) -> None:
    assert read_config(llama) == json.loads((llama / "config.json").read_text())
