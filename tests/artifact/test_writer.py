"""Writing: streamed and sharded, sizes known beforehand, all or nothing, nothing of anybody else's lost."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from artifacts import add_tensors, blank_manifest, matrix, write_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tenpak.artifact import writer as module
from tenpak.artifact.reader import open_artifact
from tenpak.artifact.verify import verify
from tenpak.artifact.writer import MAX_SHARD_BYTES, ArtifactWriter, check_output, predicted_bytes, replace_file
from tenpak.checkpoint.header import DTYPE_BYTES
from tenpak.checkpoint.source import TORCH_DTYPES
from tenpak.errors import ArtifactError, OutputExistsError
from tenpak.recipes import parse


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# What is written ------------------------------------------------------------------------------------------------


def test_one_file_with_everything_beside_it(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "artifact")
    assert names(folder) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert names(tmp_path) == ["artifact", "tokenizer.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "none", "quantization_config": {"quant_method": "tenpak", "format_version": 1}}
    assert set(open_artifact(folder).manifest.files) == {"config.json", "tokenizer.json"}
    assert verify(folder).ok


def test_reference_reader_reads_the_container(tmp_path: Path) -> None:
    """Safetensors' own reader takes our files: the tensors, their dtypes, and the metadata transformers asks for."""
    folder = write_small(tmp_path / "artifact")
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {"a.weight_codes", "b.weight_codes", "c.weight_codes", "norm.weight", "mask"}
    assert torch.equal(tensors["norm.weight"], torch.ones(5, dtype=torch.bfloat16))
    assert tensors["mask"].dtype == torch.bool
    assert tensors["mask"].all()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_aligned_to_their_own_size(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    with ArtifactWriter(folder) as writer:
        for number, dtype in enumerate((torch.bool, torch.float16, torch.int8, torch.float64, torch.float32) * 2):
            writer.add_dense(f"t{number}", torch.zeros(3, dtype=dtype), "1-D")
        writer.publish(blank_manifest(), {})
    for info in open_artifact(folder).tensors.values():
        assert info.start % DTYPE_BYTES[info.dtype] == 0


def test_every_dtype_and_shape_survives(tmp_path: Path) -> None:
    stored = {
        f"{name}.{shape}": torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, dtype in TORCH_DTYPES.items()
        for shape in ((), (0,), (3,), (2, 0, 3), (2, 3, 4))
    }
    with ArtifactWriter(tmp_path / "artifact") as writer:
        for name, tensor in stored.items():
            writer.add_dense(name, tensor, "test")
        writer.publish(blank_manifest(), {})
    artifact = open_artifact(tmp_path / "artifact")
    for name, tensor in stored.items():
        again = artifact.read_dense(name)
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)


def test_views_are_stored_as_they_look(tmp_path: Path) -> None:
    base = matrix(6, 8)
    views = {"transposed": base.T, "slice": base[1:5:2, 3:], "expanded": base[:1].expand(4, 8)}
    with ArtifactWriter(tmp_path / "artifact") as writer:
        for name, view in views.items():
            writer.add_dense(name, view, "test")
        writer.publish(blank_manifest(), {})
    artifact = open_artifact(tmp_path / "artifact")
    assert all(torch.equal(artifact.read_dense(name), view) for name, view in views.items())


def test_nothing_at_all_is_an_artifact_too(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "artifact") as writer:
        writer.publish(blank_manifest(), {})
    assert verify(tmp_path / "artifact").ok
    assert not open_artifact(tmp_path / "artifact").tensors


def test_equal_payloads_are_described_once(tmp_path: Path) -> None:
    codec = parse("int4:g32")
    assert codec is not None
    stack = matrix(5, 8, 40)
    with ArtifactWriter(tmp_path / "artifact") as writer:
        payloads = [codec.encode(part) for part in stack]
        writer.add_weight("experts", payloads, shape=(5, 8, 40), dtype="BF16", transposed=False)
        writer.publish(blank_manifest(), {})
    artifact = open_artifact(tmp_path / "artifact")
    entry = artifact.manifest.weights["experts"]
    assert [layout.count for layout in entry.payloads] == [5]
    assert torch.equal(artifact.decode("experts"), torch.stack([codec.decode(payload) for payload in payloads]))


# Shards and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 100, 200, 300, 10_000])
def test_shards_hold_the_same_as_one_file(limit: int, tmp_path: Path) -> None:
    whole, split = write_small(tmp_path / "whole"), write_small(tmp_path / "split", max_shard_bytes=limit)
    one, many = open_artifact(whole), open_artifact(split)
    assert (len(many.files) > 1) == (limit < 1000)
    assert one.manifest == many.manifest
    assert all(torch.equal(one.decode(name), many.decode(name)) for name in one.manifest.weights)
    assert verify(split).ok
    for file in many.files:
        infos = [info for info in many.tensors.values() if info.file == file]
        assert len(infos) == 1 or sum(info.nbytes for info in infos) <= limit


def test_index_is_what_transformers_expects(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "artifact", max_shard_bytes=100)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in open_artifact(folder).files}
    held = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
    )


ROWS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    max_size=8,
    unique_by=lambda row: row[0],
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, limit=st.integers(1, 400))
def test_prediction_is_the_size_of_the_files(
    rows: list[tuple[str, str, list[int]]], limit: int, tmp_path: Path
) -> None:
    folder = tmp_path / "artifact"
    shutil.rmtree(folder, ignore_errors=True)
    tensors = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, dtype, shape in rows}
    with ArtifactWriter(folder, max_shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.add_dense(name, tensor, "test")
        writer.publish(blank_manifest(), {})
    described = [(name, dtype, tuple(shape), tensors[name].nbytes) for name, dtype, shape in rows]
    assert predicted_bytes(described, limit) == weight_bytes(folder) == open_artifact(folder).bytes
    assert all(torch.equal(open_artifact(folder).read_dense(name), tensor) for name, tensor in tensors.items())


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The spool takes what was added: 30 tensors of 2 MiB never are in memory together."""
    with ArtifactWriter(tmp_path / "artifact", max_shard_bytes=20 << 20) as writer:
        for number in range(30):
            writer.add_dense(f"t{number}", torch.full((1 << 19,), float(number)), "1-D")
            assert not any(torch.is_tensor(value) for value in vars(writer).values())
        writer.publish(blank_manifest(), {})
    assert len(open_artifact(tmp_path / "artifact").files) == 3
    assert float(open_artifact(tmp_path / "artifact").read_dense("t17")[0]) == 17.0


# All or nothing -------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


STEPS = ("_close_shard", "_close_shards", "_move_into_place")


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", [None, *STEPS, "fsync", "rename"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "replaces"])
def test_failure_leaves_what_was_there(
    step: str | None, kind: type[BaseException], before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "artifact"
    if before:
        write_small(folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    old = {name: (folder / name).read_bytes() for name in names(folder)} if before else None
    found = names(tmp_path)

    def fail(*_: object) -> None:
        raise kind

    def attempt() -> None:
        with ArtifactWriter(folder, overwrite=True) as writer:
            add_tensors(writer)
            if step is None:
                fail()
            writer.publish(blank_manifest(), {}, copied=[tmp_path / "tokenizer.json"])

    if step in STEPS:
        monkeypatch.setattr(ArtifactWriter, str(step), fail)
    elif step == "fsync":
        monkeypatch.setattr(module.os, "fsync", fail)
    elif step == "rename":
        rename = Path.rename
        # The rename that would put the new folder into place, after the old one has been moved aside.
        monkeypatch.setattr(
            Path, "rename", lambda path, target: fail() if ".partial-" in path.name else rename(path, target)
        )
    with pytest.raises(kind):
        attempt()
    monkeypatch.undo()
    assert names(tmp_path) == found
    if old is not None:
        assert {name: (folder / name).read_bytes() for name in names(folder)} == old


def test_an_interrupt_while_the_old_artifact_is_removed_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "artifact"
    write_small(folder)
    found = names(tmp_path)
    remove, calls = module.shutil.rmtree, []

    def interrupted(path: Path, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, **options)

    def replace() -> None:
        with ArtifactWriter(folder, overwrite=True) as writer:
            add_tensors(writer)
            writer.publish(blank_manifest(), {})

    monkeypatch.setattr(module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace()
    monkeypatch.undo()
    assert names(tmp_path) == found
    assert open_artifact(folder).manifest.weights


def test_file_system_errors_become_artifact_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*artifact: No space left") as caught:
        write_small(tmp_path / "artifact")
    monkeypatch.undo()
    assert "free space" in str(caught.value.hint)
    assert names(tmp_path) == ["tokenizer.json"]


def test_unfinished_folder_is_no_artifact(tmp_path: Path) -> None:
    """What a kill -9 leaves does not load: config.json is written last."""
    with ArtifactWriter(tmp_path / "artifact") as writer:
        add_tensors(writer)
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".")
        with pytest.raises(ArtifactError):
            open_artifact(partial)
    assert names(tmp_path) == []


def test_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "new" / "parents").mkdir(parents=True)
    assert verify(write_small(tmp_path / "new" / "parents" / "artifact")).ok
    with ArtifactWriter(tmp_path / "other" / "parents" / "artifact") as writer:
        writer.publish(blank_manifest(), {})
    assert verify(tmp_path / "other" / "parents" / "artifact").ok


@pytest.mark.parametrize("where", ["file/artifact", "x" * 300])
def test_impossible_places_are_artifact_errors(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"), ArtifactWriter(tmp_path / where):
        pass
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_umask_is_honoured(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        folder = write_small(tmp_path / "artifact")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}


# What is there already ------------------------------------------------------------------------------------------


def test_existing_artifact_is_kept_unless_overwrite(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "artifact")
    inode = folder.stat().st_ino
    with pytest.raises(OutputExistsError, match="exists") as caught:
        write_small(folder)
    assert "--overwrite" in str(caught.value.hint)
    assert folder.stat().st_ino == inode
    write_small(folder, overwrite=True, max_shard_bytes=100)
    assert folder.stat().st_ino != inode
    assert len(open_artifact(folder).files) > 1
    write_small(folder, overwrite=True)
    assert names(folder) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert names(tmp_path) == ["artifact", "tokenizer.json"]


def test_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    assert verify(write_small(tmp_path / "artifact")).ok


@pytest.mark.parametrize("kind", ["file", "folder of others", "checkpoint", "other quantization"])
def test_only_an_artifact_is_ever_replaced(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("precious")
        config = {"other quantization": {"quantization_config": {"quant_method": "gptq"}}, "checkpoint": {}}
        if kind in config:
            (out / "config.json").write_text(json.dumps(config[kind]))
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="not a tenpak artifact"):
            check_output(out, overwrite=overwrite)
        with pytest.raises(OutputExistsError):
            write_small(out, overwrite=overwrite)
    assert (out if kind == "file" else out / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("foreign", ["notes.txt", "data.json", "other.safetensors", "subfolder", ".hidden"])
@pytest.mark.parametrize("damage", [None, "model.safetensors", "manifest.json"])
def test_foreign_files_in_an_artifact_are_never_lost(foreign: str, damage: str | None, tmp_path: Path) -> None:
    """Whether the artifact is sound or not: only files that tenpak writes, or that the manifest lists, are its own."""
    folder = write_small(tmp_path / "artifact")
    if damage:
        (folder / damage).write_bytes(b"broken")
    if foreign == "subfolder":
        (folder / foreign).mkdir()
    else:
        (folder / foreign).write_text("precious")
    with pytest.raises(OutputExistsError, match="did not write") as caught:
        write_small(folder, overwrite=True)
    assert foreign in str(caught.value) or damage == "manifest.json"
    assert (folder / foreign).exists()


def test_broken_artifact_may_be_replaced(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "artifact", max_shard_bytes=100)
    next(folder.glob("*.safetensors")).unlink()
    write_small(folder, overwrite=True)
    assert verify(folder).ok


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "artifact") as writer:
        add_tensors(writer)
        (tmp_path / "artifact").mkdir()
        (tmp_path / "artifact" / "mine").write_text("precious")
        with pytest.raises(OutputExistsError):
            writer.publish(blank_manifest(), {})
    assert names(tmp_path) == ["artifact"]
    assert names(tmp_path / "artifact") == ["mine"]


def test_link_to_an_artifact_is_replaced_not_followed(tmp_path: Path) -> None:
    real = write_small(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    write_small(tmp_path / "link", overwrite=True, max_shard_bytes=100)
    assert verify(real).ok
    assert len(open_artifact(real).files) == 1
    assert not (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "link").ok


def test_replacing_a_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    replace_file(path, b"new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["report.json"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        replace_file(path, b"newer")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"newer")
    monkeypatch.undo()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["report.json"]


def test_default_shards_are_those_of_the_hub() -> None:
    assert 1_000_000_000 <= MAX_SHARD_BYTES <= 5_000_000_000  # the hub recommends files below 5 GB
