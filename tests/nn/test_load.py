"""Loading: through transformers too, in other dtypes, on other devices, and never with an invented weight."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed import Case, MakeCase, logits, weight_files
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tenpak
from tenpak.artifact.schema import MANIFEST_NAME, Manifest, dump_manifest, load_manifest
from tenpak.errors import ArtifactError, CorruptArtifactError


@pytest.mark.parametrize("first", ["tenpak", "transformers"])
def test_transformers_loads_artifacts_after_import_tenpak(first: str, case: MakeCase) -> None:
    made = case("llama")
    second = {"tenpak": "transformers", "transformers": "tenpak"}[first]
    program = (
        f"import sys, json, {first}, {second}, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): print(json.dumps(model(torch.arange(3, 9)[None]).logits.tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(made.artifact)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout))
    assert torch.allclose(found, logits(tenpak.load(made.artifact), torch.arange(3, 9)[None]), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_dtype_given_while_loading(family: str, case: MakeCase, tmp_path: Path) -> None:
    made = case(family)
    expected = logits(made.reference(tmp_path / "dense", torch.bfloat16))
    for runtime in ("memory", "speed"):
        model = tenpak.load(made.artifact, dtype=torch.bfloat16, runtime=runtime)
        assert model.dtype == torch.bfloat16
        assert model.get_input_embeddings()(torch.tensor([[3]])).dtype == torch.bfloat16
        # One rounding more or less of a bfloat16 sum (biases apart): 2^-8 each, over two layers.
        assert (logits(model) - expected).abs().max().item() <= 2**-5 * expected.abs().max().item()


@pytest.mark.parametrize("runtime", ["memory", "speed"])
def test_dtype_changed_afterwards(runtime: str, case: MakeCase) -> None:
    made = case("mixtral")
    model = tenpak.load(made.artifact, runtime=runtime).to(torch.bfloat16)
    assert torch.allclose(
        logits(model), logits(tenpak.load(made.artifact, runtime=runtime, dtype="bfloat16")), atol=1e-2, rtol=0
    )
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_checkpoint_dtype_is_the_default(case: MakeCase) -> None:
    assert tenpak.load(case("llama", dtype=torch.bfloat16).artifact).dtype == torch.bfloat16
    assert tenpak.load(case("llama").artifact).dtype == torch.float32


def test_copies_compute_the_same_and_save_themselves(case: MakeCase, tmp_path: Path) -> None:
    made = case("qwen2")
    model = tenpak.load(made.artifact)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin.save_pretrained(tmp_path / "twin")
    assert weight_files(tmp_path / "twin") == weight_files(made.artifact)


def test_saving_leaves_no_trace_of_the_runtime(case: MakeCase, tmp_path: Path) -> None:
    made = case("llama")
    tenpak.load(made.artifact, runtime="speed", verify=False).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((made.artifact / "config.json").read_text())


def test_saving_never_replaces_what_is_no_artifact(case: MakeCase, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="not a tenpak artifact"):
        tenpak.load(case("llama").artifact).save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_state_dict_holds_payloads_and_no_decoded_weight(case: MakeCase) -> None:
    made = case("llama")
    state = tenpak.load(made.artifact).state_dict()
    stored = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    assert stored <= made.report.bytes
    assert any(name.endswith("codes") for name in state)


def test_plain_checkpoint_is_refused_by_load(case: MakeCase) -> None:
    with pytest.raises(ArtifactError, match="not a tenpak artifact"):
        tenpak.load(case("llama").source)


# What a damaged artifact says about itself can be made consistent again; loading must still not invent a weight. ---


def rewritten(made: Case, folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> Path:
    """A copy with other tensors, and a manifest that is signed again."""
    shutil.copytree(made.artifact, folder)
    tensors = load_file(folder / "model.safetensors")
    content = load_manifest(folder / MANIFEST_NAME).model_dump(mode="json")
    change(tensors, content)
    # The order of the writer: wide dtypes first, so that all stay aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    save_file(ordered, folder / "model.safetensors", {"format": "pt"})
    (folder / MANIFEST_NAME).write_bytes(dump_manifest(Manifest.model_validate(content)))
    return folder


CODES = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def drop_weight(tensors, manifest) -> None:
    del tensors[f"{CODES}_codes"], manifest["weights"][CODES]


def drop_dense(tensors, manifest) -> None:
    del tensors[NORM], manifest["dense"][NORM]


def rename_weight(tensors, manifest) -> None:
    tensors["model.layers.7.mlp.up_proj.weight_codes"] = tensors.pop(f"{CODES}_codes")
    manifest["weights"]["model.layers.7.mlp.up_proj.weight"] = manifest["weights"].pop(CODES)


def reshape_dense(tensors, manifest) -> None:
    tensors[NORM] = tensors[NORM][:16].contiguous()
    manifest["dense"][NORM]["shape"] = [16]


def move_to_norm(tensors, manifest) -> None:
    """A payload where the model has a norm."""
    tensors[f"{NORM}_codes"] = tensors.pop(f"{CODES}_codes")
    manifest["weights"][NORM] = manifest["weights"].pop(CODES)
    del tensors[NORM], manifest["dense"][NORM]


@pytest.mark.parametrize("change", [drop_weight, drop_dense, rename_weight, reshape_dense, move_to_norm])
@pytest.mark.parametrize("through", [tenpak.load, AutoModelForCausalLM.from_pretrained], ids=["tenpak", "transformers"])
def test_missing_extra_or_wrong_tensor_is_an_error(change, through, case: MakeCase, tmp_path: Path) -> None:
    folder = rewritten(case("llama"), tmp_path / "changed", change)
    with pytest.raises(CorruptArtifactError, match=r"lacks|shape|does not use|cannot use"):
        through(folder)


def test_carried_tensor_that_no_model_uses_survives_saving(case: MakeCase, tmp_path: Path) -> None:
    """An extra tensor is legitimate where the checkpoint had it: carried over, listed, saved again."""
    source = tmp_path / "source"
    shutil.copytree(case("llama").source, source)
    tensors = load_file(source / "model.safetensors")
    tensors["vision_tower.weight"] = torch.arange(12.0).reshape(3, 4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = tenpak.compress(source, tmp_path / "artifact")
    assert "does not use it" in report.dense["vision_tower.weight"]["reason"]
    assert report.parameters == case("llama").report.parameters
    tenpak.load(tmp_path / "artifact").save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(again["vision_tower.weight"], tensors["vision_tower.weight"])


def test_flipped_bit_is_found_while_loading_unless_told_not_to(case: MakeCase, tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    shutil.copytree(case("llama").artifact, folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for position in (start + 5, len(data) - 1):  # a dense tensor's byte, a payload's byte
        flipped = data.copy()
        flipped[position] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CorruptArtifactError, match="not those that were written"):
            tenpak.load(folder)
        tenpak.load(folder, verify=False)


def test_config_of_another_size_is_an_error(case: MakeCase, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    shutil.copytree(case("llama").artifact, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 97}.items():
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CorruptArtifactError):
            tenpak.load(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("runtime", ["memory", "speed"])
def test_on_a_gpu(family: str, runtime: str, case: MakeCase, tmp_path: Path) -> None:
    made = case(family)
    expected = logits(tenpak.load(made.artifact))
    for model in (
        tenpak.load(made.artifact, device="cuda", runtime=runtime),
        tenpak.load(made.artifact, runtime=runtime).to("cuda"),
        AutoModelForCausalLM.from_pretrained(made.artifact, device_map="cuda"),
    ):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        # float32 products on another device: another order of summation.
        assert (logits(model) - expected).abs().max().item() <= 1e-4 * expected.abs().max().item()
    model.save_pretrained(tmp_path / "again")
    assert weight_files(tmp_path / "again") == weight_files(made.artifact)
