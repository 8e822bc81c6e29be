"""Artifacts made to harm: each is refused with a TenpakError, before memory is taken, by every door.

The manifest is sealed again after each change, so that it is not its hash that gives the attack away. The doors:
opening, ``verify``, ``tenpak.load`` and transformers' own ``from_pretrained``.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import edit_header, edit_json, edit_manifest, join_file, little_memory, split_file
from families import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.errors import TenpakError

logging.disable_progress_bar()
logging.set_verbosity_error()

WEIGHTS = "model.safetensors"
FIRST = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
HUGE = 2**62


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_tiny("llama", folder / "model", num_hidden_layers=1)
    (folder / "model" / "tokenizer.json").write_text("{}")
    tenpak.compress(folder / "model", folder / "one", recipe="int4:g8+nf3:g16:learned")
    tenpak.compress(folder / "model", folder / "two", max_shard_bytes=9000)
    tenpak.compress(folder / "model", folder / "shared", recipe="vq4x16:shared", overrides=["*.k_proj=vq8x16:shared"])
    assert (folder / "two" / FIRST).is_file()
    load_everywhere(folder / "one")
    load_everywhere(folder / "shared")
    load_everywhere(folder / "two")
    return folder


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """An artifact of one weight file, to tamper with."""
    return Path(shutil.copytree(sound / "one", tmp_path / "artifact"))


@pytest.fixture
def sharded(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "two", tmp_path / "artifact"))


def load_everywhere(folder: Path) -> None:
    open_artifact(folder)
    assert tenpak.verify(folder).ok
    tenpak.load(folder)
    AutoModelForCausalLM.from_pretrained(folder)


def refused(folder: Path, *, opening: bool = True) -> None:
    """Refused with our own error by every door; ``opening`` says that already opening must fail."""
    doors: list[Callable[[Path], Any]] = [tenpak.load, AutoModelForCausalLM.from_pretrained]
    if opening:
        doors += [open_artifact, tenpak.verify]
    for door in doors:
        with little_memory(), pytest.raises(TenpakError) as caught:
            door(folder)
        assert str(caught.value)
        assert len(str(caught.value)) < 2000
        assert "\n" not in str(caught.value)


# Manifests ------------------------------------------------------------------------------------------------------


def weight(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["weights"][Q].update(changes)


def layout(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["weights"][Q]["payloads"][0].update(changes)


def field(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["weights"][Q]["payloads"][0]["fields"][0].update(changes)


def codec(config: Any) -> Callable[[Any], None]:
    return weight(codec=config)


def uniform(**changes: Any) -> Callable[[Any], None]:
    base = {"id": "uniform/1", "bits": 4, "group": 8, "symmetric": False, "search": False}
    return codec({**base, **changes})


def nested(depth: int, *, left: bool = False) -> dict[str, Any]:
    leaf = {"id": "dense/1", "dtype": "float32"}
    config: dict[str, Any] = leaf
    for _ in range(depth):
        base, rest = (config, leaf) if left else (leaf, config)
        config = {"id": "residual/1", "base": base, "rest": rest}
    return config


def chain(content: Any) -> None:
    """A tie to a tie."""
    content["tied"] = {"a": "b", "b": Q}


def billion(content: Any) -> None:
    """As many experts as payloads, and none of them takes a byte."""
    content["weights"][Q].update(shape=[10**9, 32, 32], payloads=[{"count": 10**9, "fields": []}], bits=0)


def rename(content: Any) -> None:
    content["weights"]["other.weight"] = content["weights"].pop(Q)


def both(content: Any) -> None:
    """Listed as compressed and, under its stored name, as dense."""
    entry = content["weights"][Q]
    content["dense"][f"{Q}_codes"] = {
        "shape": [entry["bits"] // 8],
        "dtype": "U8",
        "reason": "",
        "sha256": entry["sha256"],
    }


MANIFESTS: dict[str, Callable[[Any], Any]] = {
    "huge shape": weight(shape=[HUGE, HUGE]),
    "huge rows": weight(shape=[10**9, 32]),
    "huge columns": weight(shape=[32, 10**12]),
    "negative shape": weight(shape=[-32, 32]),
    "zero shape": weight(shape=[0, 32]),
    "no shape": weight(shape=[]),
    "one dimension": weight(shape=[1024]),
    "four dimensions": weight(shape=[1, 1, 32, 32]),
    "many experts": weight(shape=[10**9, 32, 32]),
    "transposed": weight(shape=[16, 64], transposed=True),
    "not a float": weight(dtype="I64"),
    "unknown dtype": weight(dtype="F8_E4M3"),
    "wrong bits": weight(bits=8),
    "no payloads": weight(payloads=[]),
    "a billion payloads": layout(count=10**9),
    "a billion empty payloads": billion,
    "payloads beyond 64 bits": layout(count=10**30),
    "no fields": layout(fields=[]),
    "many fields": lambda c: layout(fields=c["weights"][Q]["payloads"][0]["fields"] * 100)(c),
    "huge field": field(shape=[HUGE]),
    "overflowing field": field(shape=[2**32, 2**32, 2**32]),
    "field of unknown dtype": field(dtype="F4"),
    "field of other dtype": field(dtype="BF16"),
    "field of other name": field(name="other"),
    "unknown codec": codec({"id": "magic/1"}),
    "codec of tomorrow": uniform(id="uniform/2"),
    "codec without id": codec({}),
    "codec id a number": codec({"id": 7}),
    "codec id a path": codec({"id": "os:system"}),
    "codec with a new field": uniform(magic=1),
    "codec without bits": codec({"id": "uniform/1"}),
    "bits a string": uniform(bits="4"),
    "bits a float": uniform(bits=4.0),
    "bits a bool": uniform(bits=True),
    "bits a list": uniform(bits=[4]),
    "bits null": uniform(bits=None),
    "bits out of range": uniform(bits=10**100),
    "bits negative": uniform(bits=-4),
    "group zero": uniform(group=0),
    "group huge": uniform(group=2**63),
    "group a codec": uniform(group={"id": "dense/1", "dtype": "float32"}),
    "symmetric a number": uniform(symmetric=1),
    "levels a list": codec({"id": "normalfloat/1", "bits": 4, "group": 64, "levels": ["normal"]}),
    "levels unknown": codec({"id": "normalfloat/1", "bits": 4, "group": 64, "levels": "magic"}),
    "dtype a path": codec({"id": "dense/1", "dtype": "os.system"}),
    "stage no codec": codec({"id": "residual/1", "base": 1, "rest": None}),
    "stage of unknown codec": codec({"id": "residual/1", "base": {"id": "magic/1"}, "rest": {"id": "magic/1"}}),
    "stages without end": codec(nested(300)),
    "stages to the left": codec(nested(300, left=True)),
    "17 stages": codec(nested(16)),
    "other codec": codec({"id": "dense/1", "dtype": "float32"}),
    "other bits": uniform(bits=5),
    "weight of another name": rename,
    "weight missing": lambda content: content["weights"].pop(Q) and None,
    "weight twice": both,
    "dense missing": lambda content: content["dense"].pop(NORM) and None,
    "dense of other shape": lambda content: content["dense"][NORM].update(shape=[16]),
    "dense of huge shape": lambda content: content["dense"][NORM].update(shape=[HUGE, HUGE]),
    "dense of other dtype": lambda content: content["dense"][NORM].update(dtype="I32"),
    "tied to nothing": lambda content: content["tied"].update(a="nothing"),
    "tied to itself": lambda content: content["tied"].update(a="a"),
    "tied to a tie": chain,
    "stored and tied": lambda content: content["tied"].update({NORM: Q}),
    "tied to stored bytes": lambda content: content["tied"].update(a=f"{Q}_codes"),
    **{
        f"file {name[:12]!a}": lambda content, name=name: content["files"].update({name: "0" * 64})
        for name in (
            "../secret",
            "/etc/passwd",
            "a/b",
            "a\\b",
            "..",
            ".",
            "",
            "a\0",
            "x" * 1000,
            WEIGHTS,
            "manifest.json",
        )
    },
    "a thousand weights": lambda content: content["weights"].update(
        dict.fromkeys(map(str, range(1000)), content["weights"][Q])
    ),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_hostile_manifest(change: Callable[[Any], Any], artifact: Path) -> None:
    edit_manifest(artifact, lambda content: change(content) and None)
    refused(artifact)


BOOK, OTHER = "shared_0_codebook", "shared_1_codebook"


def shared(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["shared"][BOOK].update(changes)


def unshared(content: Any) -> None:
    """A dense tensor listed as one that is shared, but no weight names it."""
    content["shared"][NORM] = {key: value for key, value in content["dense"].pop(NORM).items() if key != "reason"}


def twice(content: Any) -> None:
    """Listed as shared and as dense."""
    content["dense"][BOOK] = {**content["shared"][BOOK], "reason": ""}


SHARED: dict[str, Callable[[Any], Any]] = {
    "a missing tensor": weight(shared={"codebook": "shared_7_codebook"}),
    "a tensor that is no shared one": weight(shared={"codebook": NORM}),
    "its own payload": weight(shared={"codebook": f"{Q}_codes"}),
    "a tensor of another shape": weight(shared={"codebook": OTHER}),
    "nothing": lambda content: content["weights"][Q].pop("shared") and None,
    "an empty list": weight(shared={}),
    "another field": weight(shared={"scales": BOOK}),
    "one field too many": weight(shared={"codebook": BOOK, "more": BOOK}),
    "a field too many, missing": weight(shared={"codebook": BOOK, "more": "nothing"}),
    "a number": weight(shared={"codebook": 7}),
    "a huge shape": shared(shape=[HUGE, HUGE]),
    "another shape": shared(shape=[4, 16]),
    "another dtype": shared(dtype="BF16"),
    "an unknown dtype": shared(dtype="F4"),
    "no list": lambda content: content.pop("shared") and None,
    "a list without it": lambda content: content["shared"].pop(BOOK) and None,
    "what no weight names": unshared,
    "two tensors of a name": twice,
    "the version of others": lambda content: content.update(format_version=1),
}


@pytest.mark.parametrize("change", SHARED.values(), ids=SHARED)
def test_hostile_sharing(change: Callable[[Any], Any], sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound / "shared", tmp_path / "artifact"))
    edit_manifest(folder, lambda content: change(content) and None)
    refused(folder)


@pytest.mark.parametrize("change", [weight(shared={"codebook": NORM}), lambda c: c.update(format_version=2)])
def test_sharing_where_nothing_is_shared(change: Callable[[Any], Any], artifact: Path) -> None:
    edit_manifest(artifact, lambda content: change(content) and None)
    refused(artifact)


def test_manifest_too_large_to_be_read(artifact: Path) -> None:
    """Sparse: it costs the attacker nothing."""
    os.truncate(artifact / "manifest.json", 300_000_000)
    refused(artifact)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_manifest_nested_without_end(opening: bytes, artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(opening * 1_000_000)
    refused(artifact)


# Weight files ---------------------------------------------------------------------------------------------------


def tensor(header: Any, **changes: Any) -> None:
    header[f"{Q}_codes"].update(changes)


def swapped(header: Any) -> Any:
    """Two tensors of equal size exchange their names."""
    names = [name for name in header if name.endswith("layernorm.weight")]
    return {{names[0]: names[1], names[1]: names[0]}.get(name, name): entry for name, entry in header.items()}


HEADERS: dict[str, Callable[[Any], Any]] = {
    "huge shape": lambda h: tensor(h, shape=[HUGE]),
    "huge offsets": lambda h: tensor(h, data_offsets=[0, HUGE], shape=[HUGE]),
    "negative": lambda h: tensor(h, data_offsets=[-1, h[f"{Q}_codes"]["shape"][0] - 1]),
    "overlap": lambda h: tensor(h, data_offsets=h[NORM]["data_offsets"], shape=[128]),
    "as floats": lambda h: tensor(h, dtype="F32", shape=[h[f"{Q}_codes"]["shape"][0] // 4]),
    "as a matrix": lambda h: tensor(h, shape=[h[f"{Q}_codes"]["shape"][0] // 4, 4]),
    "as signed": lambda h: tensor(h, dtype="I8"),
    "unknown dtype": lambda h: tensor(h, dtype="F8_E4M3"),
    "dtype a list": lambda h: tensor(h, dtype=["U8"]),
    "extra empty tensor": lambda h: h.update(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "renamed": lambda h: {("other" if name == NORM else name): value for name, value in h.items()},
    "other metadata": lambda h: {**h, "__metadata__": {"format": "tf"}},
    "more metadata": lambda h: {**h, "__metadata__": {"format": "pt", "note": "x"}},
    "no metadata": lambda h: {name: value for name, value in h.items() if name != "__metadata__"},
    "metadata of numbers": lambda h: {**h, "__metadata__": {"format": 1}},
    "other order": lambda h: dict(reversed(h.items())),
    "not an object": lambda h: [],
}  # fmt: skip


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_hostile_header(change: Callable[[Any], Any], artifact: Path) -> None:
    edit_header(artifact / WEIGHTS, change)
    refused(artifact)


def test_hole_before_the_data(artifact: Path) -> None:
    header, data = split_file(artifact / WEIGHTS)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    join_file(artifact / WEIGHTS, header, bytes(8) + data)
    refused(artifact)


def test_name_twice(artifact: Path) -> None:
    header, data = split_file(artifact / WEIGHTS)
    text = json.dumps(header)
    again = json.dumps({NORM: header[NORM]})
    join_file(artifact / WEIGHTS, (text[:-1] + "," + again[1:]).encode(), data)
    refused(artifact)


def test_swapped_names(artifact: Path) -> None:
    """Shapes and sizes agree; the hashes do not."""
    edit_header(artifact / WEIGHTS, swapped)
    refused(artifact, opening=False)
    assert not tenpak.verify(artifact).ok


@pytest.mark.parametrize("length", [-1, 1, -1000, 1000, 1 << 20])
def test_file_shorter_or_longer(length: int, artifact: Path) -> None:
    os.truncate(artifact / WEIGHTS, (artifact / WEIGHTS).stat().st_size + length)
    refused(artifact)


@pytest.mark.parametrize("change", [-16, 16])
def test_blob_shorter_or_longer_than_its_fields(change: int, artifact: Path) -> None:
    """Header and manifest agree with each other and with the file, but not with the codec."""
    header, data = split_file(artifact / WEIGHTS)
    name = f"{Q}_codes"
    start, end = header[name]["data_offsets"]
    data = data[: end + min(change, 0)] + bytes(max(change, 0)) + data[end:]
    header[name]["shape"][0] += change
    header[name]["data_offsets"][1] += change
    for other, entry in header.items():
        if other not in ("__metadata__", name) and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + change for offset in entry["data_offsets"]]
    join_file(artifact / WEIGHTS, json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(), data)
    edit_manifest(artifact, weight(bits=8 * (end - start + change)))
    refused(artifact)


@pytest.mark.parametrize("name", ["model.norm.weight", Q])
def test_tensor_that_the_model_needs_is_gone_everywhere(name: str, artifact: Path) -> None:
    """Removed from manifest and file alike: the artifact is sound, the model would be initialised at random."""
    stored = name if name == NORM else f"{Q}_codes"
    rebuild(
        artifact,
        lambda tensors, content: (
            tensors.pop(stored),
            content["dense"].pop(name, None) or content["weights"].pop(name),
        ),
    )
    open_artifact(artifact)
    refused(artifact, opening=False)


def test_tensor_of_another_shape_everywhere(artifact: Path) -> None:
    def change(tensors: Any, content: Any) -> None:
        tensors[NORM] = ("F32", [16], tensors[NORM][2][:64])
        content["dense"][NORM].update(shape=[16], dtype="F32", sha256=sha256(tensors[NORM][2]))

    rebuild(artifact, change)
    open_artifact(artifact)
    refused(artifact, opening=False)


def test_compressed_tensor_that_the_model_does_not_know(artifact: Path) -> None:
    def change(tensors: Any, content: Any) -> None:
        tensors["other.weight_codes"] = tensors[f"{Q}_codes"]
        content["weights"]["other.weight"] = copy.deepcopy(content["weights"][Q])

    rebuild(artifact, change)
    open_artifact(artifact)
    refused(artifact, opening=False)


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def rebuild(folder: Path, change: Callable[[Any, Any], Any]) -> None:
    """Change tensors, as (dtype, shape, bytes) by stored name, and manifest together, and write a sound artifact."""
    from tenpak.checkpoint.header import DTYPE_BYTES, encode_header

    header, data = split_file(folder / WEIGHTS)
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    edit_manifest(folder, lambda content: change(tensors, content) and None)
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPE_BYTES[item[1][0]], item[0]))
    raw = encode_header((name, dtype, tuple(shape), len(part)) for name, (dtype, shape, part) in ordered)
    (folder / WEIGHTS).write_bytes(raw + b"".join(part for _, (_, _, part) in ordered))


# Several weight files and the index -----------------------------------------------------------------------------


def test_two_sets_of_weight_files(sound: Path, sharded: Path) -> None:
    """Transformers would take one of them, the reader the other."""
    shutil.copy(sound / "one" / WEIGHTS, sharded)
    refused(sharded)


@pytest.mark.parametrize("kind", ["gone", "renumbered", "extra", "foreign"])
def test_shards_that_do_not_belong_together(kind: str, sharded: Path) -> None:
    first = sharded / FIRST
    if kind == "gone":
        first.unlink()
    elif kind == "renumbered":
        first.rename(sharded / "model-00001-of-00003.safetensors")
    else:
        join_file(
            sharded / ("model-00003-of-00003.safetensors" if kind == "extra" else "adapter_model.safetensors"), {}, b""
        )
    refused(sharded)


INDEXES: dict[str, Callable[[Any], Any]] = {
    "leaves a tensor out": lambda index: index["weight_map"].pop(NORM) and None,
    "leaves a shard out": lambda index: {
        **index, "weight_map": {name: file for name, file in index["weight_map"].items() if file != FIRST}
    },
    "adds a tensor": lambda index: index["weight_map"].update(ghost=FIRST),
    "swapped shards": lambda index: {
        **index,
        "weight_map": {
            name: FIRST if file != FIRST else "model-00002-of-00002.safetensors"
            for name, file in index["weight_map"].items()
        },
    },
    "shard outside": lambda index: index["weight_map"].update({NORM: "../model.safetensors"}),
    "absolute shard": lambda index: index["weight_map"].update({NORM: "/dev/zero"}),
    "pickle": lambda index: index["weight_map"].update({NORM: "pytorch_model.bin"}),
    "shard a number": lambda index: index["weight_map"].update({NORM: 7}),
    "no map": lambda index: {"metadata": {}},
    "a list": lambda index: [],
    "another total": lambda index: index["metadata"].update(total_size=10**15),
}  # fmt: skip


@pytest.mark.parametrize("change", INDEXES.values(), ids=INDEXES)
def test_hostile_index(change: Callable[[Any], Any], sharded: Path) -> None:
    """A lying index must not have transformers initialise what it does not list."""
    edit_json(sharded / INDEX, change)
    for door in (open_artifact, tenpak.verify, tenpak.load):
        with little_memory(), pytest.raises(TenpakError):
            door(sharded)
    with pytest.raises((TenpakError, OSError, ValueError, TypeError, AttributeError, KeyError)):
        AutoModelForCausalLM.from_pretrained(sharded)  # transformers reads the index before it asks us


def test_missing_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(TenpakError):
        tenpak.load(sharded)


# Files that are none --------------------------------------------------------------------------------------------


def test_linked_shard_elsewhere_is_read_like_any_other(artifact: Path, tmp_path: Path) -> None:
    """Links are how the hub's cache stores files; what they lead to is checked as if it lay here."""
    (artifact / WEIGHTS).rename(tmp_path / "elsewhere")
    (artifact / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    load_everywhere(artifact)
    os.truncate(tmp_path / "elsewhere", 100)
    refused(artifact)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/hostname", "nowhere", "."])
@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json", "config.json"])
def test_links_to_what_is_none_of_ours(name: str, target: str, artifact: Path) -> None:
    (artifact / name).unlink()
    (artifact / name).symlink_to(target)
    for door in (open_artifact, tenpak.verify, tenpak.load):
        with little_memory(), pytest.raises(TenpakError):
            door(artifact)


@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json", "config.json", "tokenizer.json"])
def test_pipes_do_not_make_us_wait(name: str, artifact: Path) -> None:
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    if name == "tokenizer.json":
        assert not tenpak.verify(artifact).ok
        return
    for door in (open_artifact, tenpak.verify, tenpak.load):
        with pytest.raises(TenpakError):
            door(artifact)


# config.json ----------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "enormous vocabulary": {"vocab_size": 10**12},
    "overflowing vocabulary": {"vocab_size": 2**62},
    "wider": {"hidden_size": 64},
    "enormous width": {"hidden_size": 2**40, "intermediate_size": 2**40},
    "more layers": {"num_hidden_layers": 2},
    "fewer layers": {"num_hidden_layers": 0},
    "negative layers": {"num_hidden_layers": -1},
    "layers without end": {"num_hidden_layers": 10**9},
    "another family": {"model_type": "gpt2"},
    "no family": {"model_type": "nothing"},
    "an encoder": {"model_type": "bert"},
    "a string": {"hidden_size": "64"},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_hostile_configuration(change: dict[str, Any], artifact: Path) -> None:
    """Whoever wrote the artifact can seal any configuration; it must fit the tensors all the same."""
    edit_json(artifact / "config.json", lambda config: config.update(change))
    assert change.get("num_hidden_layers", 0) > 1024 or not tenpak.verify(artifact).ok
    with little_memory(), pytest.raises(TenpakError):
        tenpak.load(artifact)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a":' * 100_000, '{"quantization_config":"tenpak"}', "\ud800"], ids=range(6)
)
def test_configuration_that_is_none(text: str, artifact: Path) -> None:
    (artifact / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for door in (open_artifact, tenpak.verify, tenpak.load):
        with little_memory(), pytest.raises(TenpakError):
            door(artifact)


def test_code_in_an_artifact_is_not_run(artifact: Path) -> None:
    proof = artifact / "proof"
    (artifact / "modeling.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit_json(artifact / "config.json", lambda config: config.update(auto_map=auto_map, model_type="own"))
    with pytest.raises(TenpakError):
        tenpak.load(artifact)
    assert not proof.exists()


def test_pickle_instead_of_weights(artifact: Path) -> None:
    torch.save({NORM: torch.zeros(32)}, artifact / "pytorch_model.bin")
    (artifact / WEIGHTS).unlink()
    refused(artifact)


# Anything at all ------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([HUGE, -1, 10**40, "uniform/1", "F32", Q])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_value_anywhere_is_harmless(data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    """One value of the manifest or the header replaced by another: an error of ours, or an artifact that reads."""
    folder = tmp_path / "artifact"
    if not folder.exists():
        shutil.copytree(sound / "one", folder)

    def change(content: Any) -> None:
        while True:
            keys = sorted(content) if isinstance(content, dict) else list(range(len(content)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(content[key], dict | list) or not content[key] or data.draw(st.integers(0, 5)) == 0:
                content[key] = data.draw(VALUES)
                return
            content = content[key]

    name = data.draw(st.sampled_from(["manifest.json", WEIGHTS]))
    raw = (folder / name).read_bytes()
    try:
        if name == WEIGHTS:
            edit_header(folder / name, change)
        else:
            edit_manifest(folder, change)
        artifact = open_artifact(folder)
        for weight_name in artifact.manifest.weights:
            artifact.decode(weight_name)
    except TenpakError:
        pass
    finally:
        (folder / name).write_bytes(raw)
