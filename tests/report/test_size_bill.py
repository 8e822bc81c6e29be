"""The size bill: whatever is in the weight files, its rows add up to their sizes, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_small
from pages import write_model

from tenpak.artifact.reader import open_artifact
from tenpak.report.bill import Bill, size_bill
from tenpak.report.contents import read_contents

KINDS = {
    "fixed rate": {},
    "entropy coded": {"self_attn.q_proj": "ec-int4:g16", "mlp.up_proj": "ec-int8:row", "embed": "ec-int8:row"},
    "sums": {"mlp.down_proj": "int4:g16+int2:g16"},
    "dense": dict.fromkeys(("embed", "self_attn.q_proj", "mlp.up_proj"), "dense"),
    "many recipes": {kind: f"int{bits}:g16" for bits, kind in enumerate(("self_attn.q_proj", "mlp.up_proj"), 3)},
}


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def check(bill: Bill, folder: Path) -> None:
    sizes = files(folder)
    assert sum(item.bytes for item in bill.items) == bill.bytes == sum(sizes.values())
    assert {file.name: file.size for file in bill.files} == sizes
    for file in bill.files:
        assert file.payload + file.dense + file.header + file.padding == file.size
        assert file.padding < 8
    for item in bill.items:
        assert not item.fields or sum(item.fields.values()) == item.bytes


@pytest.mark.parametrize("recipes", KINDS.values(), ids=KINDS)
def test_it_adds_up(recipes: dict[str, str], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "artifact", recipes=recipes)
    contents = read_contents(folder)
    check(contents.bill, folder)
    manifest = contents.manifest
    payload = sum(item.bytes for item in contents.bill.items if item.what == "payload")
    assert payload == sum(entry.bits for entry in manifest.weights.values()) // 8
    assert sum(item.tensors for item in contents.bill.items) == len(manifest.weights) + len(manifest.dense)


def test_it_adds_up_over_shards(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "artifact", max_shard_bytes=2000)
    bill = read_contents(folder).bill
    assert len(bill.files) > 3
    check(bill, folder)


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "artifact")
    artifact = open_artifact(folder)
    bill = size_bill(artifact, {name: str(entry.codec["id"]) for name, entry in artifact.manifest.weights.items()})
    check(bill, folder)
    assert {(item.what, item.name): item.tensors for item in bill.items if item.tensors} == {
        ("payload", "uniform/1"): 2, ("payload", "residual/1"): 1, ("dense", "BF16"): 1, ("dense", "BOOL"): 1,
    }  # fmt: skip
    assert {"codes", "scales"} <= set(bill.items[0].fields)


def test_the_header_is_what_the_file_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "artifact")
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length]
    found = {item.name: item.bytes for item in read_contents(folder).bill.items if item.what == "header"}
    assert found == {
        "JSON of safetensors": len(header.rstrip()), "its length": 8, "padding": length - len(header.rstrip()),
    }  # fmt: skip
