"""Codebooks that tensors share: learned once, stored once and counted once, from the plan to the loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import flip
from families import make_tiny, make_tiny_talker
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tenpak
from tenpak import cli
from tenpak.artifact.reader import open_artifact
from tenpak.artifact.schema import dump_manifest, load_manifest
from tenpak.checkpoint.source import open_checkpoint
from tenpak.codecs.vector import Vector
from tenpak.errors import CorruptArtifactError, RecipeError
from tenpak.nn.modules import CompressedWeight
from tenpak.profiling import profile
from tenpak.report.bill import size_bill
from tenpak.report.contents import read_contents

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*are advised:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*calibration tokens for layers"),
]

RECIPE = "vq4x32:shared"
CALIBRATED = "gptq-vq4x32:shared"
TEXT = "the moon and the sun went over the sea and the star sat on the moon. " * 60
BOOK = "shared_0_codebook"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    (folder / "text.txt").write_text(TEXT)
    return make_tiny_talker(folder / "model")


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    tenpak.compress(model, model.parent / "artifact", recipe=RECIPE)
    return model.parent / "artifact"


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def files(folder: Path) -> dict[str, bytes]:
    """What the inputs decide: all but the report, which has times in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("report.json", "README.md")}


def sharers(folder: Path) -> dict[str, list[str]]:
    return open_artifact(folder).manifest.sharers


# What is stored ------------------------------------------------------------------------------------------------------


def test_one_codebook_of_all_tensors(model: Path, artifact: Path) -> None:
    """What is stored is k-means on the vectors of all matrices of the blocks, and each decodes with it."""
    opened, checkpoint = open_artifact(artifact), open_checkpoint(model)
    names = [name for name, entry in opened.manifest.weights.items() if entry.codec["id"] == "vector/1"]
    assert len(names) == 14
    assert opened.manifest.sharers == {BOOK: names}
    codec = Vector(4, 32, scaled=True, shared=True)
    learned = codec.learn([checkpoint.read(name) for name in names])["codebook"]
    assert torch.equal(opened.read_shared(BOOK), learned)
    for name in names:
        (payload,) = opened.payloads(name)
        assert list(payload.tensors) == ["scales", "codes"]
        assert payload.bits == opened.manifest.weights[name].bits == codec.estimate_bits(payload.shape)
        alone = codec.encode_sharing(checkpoint.read(name), {"codebook": learned})
        assert torch.equal(alone.tensors["codes"], payload.tensors["codes"])


def test_decoding_is_the_formula(artifact: Path) -> None:
    opened = open_artifact(artifact)
    for name, entry in opened.manifest.weights.items():
        if entry.shared:
            (payload,) = opened.payloads(name)
            rows, columns = payload.shape
            bits = np.unpackbits(payload.tensors["codes"].numpy(), axis=1, bitorder="little")[:, : columns // 4 * 5]
            codes = bits.reshape(rows, -1, 5) @ (1 << np.arange(5))
            book = opened.read_shared(BOOK).float().numpy()
            scales = payload.tensors["scales"].float().numpy()
            assert np.array_equal(book[codes].reshape(rows, columns) * scales[:, None], opened.decode(name).numpy())


@pytest.mark.parametrize("shard", [5000, 4_000_000_000])
def test_bytes_are_counted_once_and_as_predicted(model: Path, tmp_path: Path, shard: int) -> None:
    options = {"recipe": RECIPE, "overrides": ("*.down_proj=vq8x16:shared:seed=1",), "max_shard_bytes": shard}
    predicted = tenpak.predict(model, **options)
    report = tenpak.compress(model, tmp_path / "out", **options)
    assert predicted.exact
    assert predicted.bytes == report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    opened = open_artifact(tmp_path / "out")
    books = {name: info.nbytes for name, info in opened.tensors.items() if name.startswith("shared_")}
    assert books == {BOOK: 2 * 4 * 32, "shared_1_codebook": 2 * 8 * 16}
    payloads = sum(entry.bits for entry in opened.manifest.weights.values())
    assert report.payload_bits == payloads + 8 * sum(books.values())
    assert sum(report.codecs.values()) == report.payload_bits // 8
    contents = read_contents(tmp_path / "out")
    fields = [item.fields.get("codebook") for item in contents.bill.items if "shared" in item.name]
    assert sorted(filter(None, fields)) == sorted(books.values())
    labels = {name: tensor.codec for name, tensor in contents.tensors.items()}
    assert size_bill(opened, labels).bytes == report.bytes
    stored = sum(tensor.bytes for tensor in contents.tensors.values())
    assert stored == sum(info.nbytes for info in opened.tensors.values())


def test_sharing_is_smaller(model: Path, artifact: Path, tmp_path: Path) -> None:
    each = tenpak.compress(model, tmp_path / "each", recipe="vq4x32:row")
    assert each.bytes - tenpak.predict(model, recipe=RECIPE).bytes > 12 * 2 * 4 * 32
    assert load_manifest(tmp_path / "each" / "manifest.json").format_version == 1
    assert b"shared" not in (tmp_path / "each" / "manifest.json").read_bytes()


def test_inspect_lists_what_is_shared(artifact: Path) -> None:
    told = CliRunner().invoke(cli.app, ["inspect", str(artifact), "--json"])
    assert json.loads(told.stdout)["shared"] == {BOOK: {"shape": [32, 4], "dtype": "F16", "weights": 14}}


# Groups --------------------------------------------------------------------------------------------------------------


def test_groups_are_those_of_equal_codecs(model: Path, tmp_path: Path) -> None:
    """Two groups, one of them of a single tensor; an override takes a tensor out of its group."""
    overrides = ("*.layers.1.*=vq8x16:shared", "*.layers.1.mlp.up_proj=vq4x32:shared:seed=5", f"{Q}=int4:g32")
    tenpak.compress(model, tmp_path / "out", recipe=RECIPE, overrides=overrides)
    found = sharers(tmp_path / "out")
    assert {name: len(weights) for name, weights in found.items()} == {
        BOOK: 6, "shared_1_codebook": 6, "shared_2_codebook": 1,
    }  # fmt: skip
    assert Q not in found[BOOK]
    assert found["shared_2_codebook"] == ["model.layers.1.mlp.up_proj.weight"]
    opened, checkpoint = open_artifact(tmp_path / "out"), open_checkpoint(model)
    learned = Vector(4, 32, scaled=True, shared=True).learn(checkpoint.read(name) for name in found[BOOK])
    assert torch.equal(opened.read_shared(BOOK), learned["codebook"])


@pytest.mark.parametrize(("family", "count"), [("mixtral", 32), ("gpt_oss", 12), ("gpt2", 8)])
def test_experts_and_transposed_layers(family: str, count: int, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "model")
    report = tenpak.compress(tmp_path / "model", tmp_path / "out", recipe=RECIPE)
    assert report.bytes == tenpak.predict(tmp_path / "model", recipe=RECIPE).bytes
    assert [len(weights) for weights in sharers(tmp_path / "out").values()] == [count]
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        memory, speed = (tenpak.load(tmp_path / "out", runtime=r)(tokens).logits for r in ("memory", "speed"))
    torch.testing.assert_close(memory, speed)


@pytest.mark.parametrize("recipe", ["vq4x32:shared+int4:g32", "ec-vq4x32:shared"])
def test_sums_and_wrappers_share_nothing(recipe: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot share its codebook") as caught:
        tenpak.compress(model, tmp_path / "out", recipe=recipe)
    assert "':shared'" in str(caught.value.hint)


@pytest.mark.parametrize("options", [{"candidates": ("int4:g32,vq4x32:shared",)}, {"overrides": (f"{Q}={RECIPE}",)}])
def test_profiles_try_tensors_one_by_one(options: dict[str, tuple[str, ...]], model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a profile.*cannot share its codebook") as caught:
        profile(model, tmp_path / "profile.json", calibration=model.parent / "text.txt", **options)
    assert "':shared'" in str(caught.value.hint)


# Runs ----------------------------------------------------------------------------------------------------------------


def run(model: Path, out: Path, **options: object) -> tenpak.Report:
    text = model.parent / "text.txt"
    return tenpak.compress(model, out, **{"recipe": CALIBRATED, "calibration": text, **options})


def interrupted(model: Path, out: Path, phase: str, after: int, work: Path) -> None:
    seen = 0

    def stop(what: str, *_: int) -> None:
        nonlocal seen
        seen += what.startswith(phase)
        if seen == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, out, work=work, progress=stop)


@pytest.mark.parametrize("damage", [None, "codebook", "all of it"])
def test_a_stopped_run_goes_on_with_its_codebook(damage: str | None, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole", recipe=CALIBRATED)
    interrupted(model, tmp_path / "out", "model.", 6, tmp_path / "work")
    (kept,) = (tmp_path / "work" / "shared").iterdir()
    if damage == "codebook":
        flip(kept, 8 * kept.stat().st_size - 1)
    elif damage is not None:
        kept.write_bytes(b"")
    phases = set()
    report = run(model, tmp_path / "out", work=tmp_path / "work", progress=lambda what, *_: phases.add(what))
    assert report.reused >= 6
    assert ("learning" in phases) == (damage is not None)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "work").exists()


def test_stopped_while_learning(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out", "learning", 3, tmp_path / "work")
    assert not (tmp_path / "work").exists(), "nothing in it was worth keeping"


def test_tuning_leaves_the_codebook_alone(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "plain", calibration_window=32)
    run(model, tmp_path / "tuned", calibration_window=32, tuning=4)
    plain, tuned = (open_artifact(tmp_path / name) for name in ("plain", "tuned"))
    assert torch.equal(plain.read_shared(BOOK), tuned.read_shared(BOOK))
    assert list(plain.manifest.sharers) == list(tuned.manifest.sharers) == [BOOK]


def test_budgets_count_what_fixed_tensors_share(model: Path, tmp_path: Path) -> None:
    overrides = ("*.k_proj=vq4x32:shared",)
    report = run(model, tmp_path / "out", recipe=None, budget="8bpw", overrides=overrides, calibration="none", tuning=0)
    assert report.bytes <= report.parameters
    assert len(sharers(tmp_path / "out")[BOOK]) == 2


# Loading -------------------------------------------------------------------------------------------------------------


def test_loaded_models_hold_one_codebook_and_save_the_same_files(artifact: Path, tmp_path: Path) -> None:
    loaded = tenpak.load(artifact)
    weights = [module for module in loaded.modules() if isinstance(module, CompressedWeight) and module.entry.shared]
    assert len(weights) == 14
    assert len({weight.payloads()[0].shared["codebook"].data_ptr() for weight in weights}) == 1
    assert not any(name.startswith("shared") for name in loaded.state_dict())
    expected = AutoModelForCausalLM.from_pretrained(artifact)
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
        wide = loaded(tokens).logits
        assert torch.allclose(loaded.to(torch.bfloat16)(tokens).logits.float(), wide, atol=0.05)
    tenpak.load(artifact, runtime="speed").save_pretrained(tmp_path / "again")
    again = files(tmp_path / "again")
    manifest = load_manifest(artifact / "manifest.json").model_copy(update={"quality": None})
    assert again == {**files(artifact), "manifest.json": dump_manifest(manifest)}


# Damage --------------------------------------------------------------------------------------------------------------


def test_flipped_bits_are_found(copy: Path) -> None:
    path = copy / "model.safetensors"
    info = open_artifact(copy).tensors[BOOK]
    flip(path, 8 * info.start + 3)
    assert tenpak.verify(copy).problems == (f"the bytes of tensor {BOOK!r} are not those that were written",)
    opened = open_artifact(copy)
    for door in (lambda: opened.decode(Q), lambda: opened.read_shared(BOOK), lambda: tenpak.load(copy)):
        with pytest.raises(CorruptArtifactError, match=f"the bytes of '{BOOK}'"):
            door()
