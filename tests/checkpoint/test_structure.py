"""Where each tensor of a checkpoint belongs in the model: kinds, orientation, experts, ties, leftovers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import edit_json
from families import make_tiny
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from tenpak.checkpoint.source import open_checkpoint
from tenpak.checkpoint.structure import Weight, bind, build_meta_model, check_coverage
from tenpak.errors import CheckpointError, MissingTensorError


def bound(folder: Path) -> dict[str, Weight]:
    model = build_meta_model(folder)
    weights = bind(model, open_checkpoint(folder).tensors)
    check_coverage(model, weights)
    return {weight.name: weight for weight in weights}


def kinds(weights: dict[str, Weight]) -> Counter[str]:
    return Counter(weight.kind for weight in weights.values())


def rewrite(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=1)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


# Kinds ----------------------------------------------------------------------------------------------------------


def test_llama(llama: Path) -> None:
    weights = bound(llama)
    assert kinds(weights) == {"matrix": 7, "embedding": 1, "head": 1, "dense": 3}
    head = weights["lm_head.weight"]
    assert (head.kind, head.parameter, head.shape, head.dtype) == ("head", "lm_head.weight", (96, 32), "F32")
    assert {weight.reason for weight in weights.values() if weight.kind == "dense"} == {"1-D"}
    assert not any(weight.transposed or weight.tied_to or weight.slot for weight in weights.values())


def test_gpt2_is_transposed_and_fused(tmp_path: Path) -> None:
    """Conv1D stores [in, out]; the checkpoint's names lack the model's prefix."""
    weights = bound(make_tiny("gpt2", tmp_path, n_layer=1, num_hidden_layers=1))
    qkv = next(weight for name, weight in weights.items() if name.endswith("attn.c_attn.weight"))
    assert (qkv.kind, qkv.transposed, qkv.shape, qkv.matrix_shape) == ("matrix", True, (32, 96), (96, 32))
    assert kinds(weights) == {"matrix": 4, "embedding": 2, "dense": 10}


def test_fused_parts_are_one_matrix(tmp_path: Path) -> None:
    weights = bound(make_tiny("phi3", tmp_path, num_hidden_layers=1))
    assert weights["model.layers.0.self_attn.qkv_proj.weight"].kind == "matrix"
    assert weights["model.layers.0.mlp.gate_up_proj.weight"].matrix_shape == (96, 32)


def test_experts_of_their_own_tensors(tmp_path: Path) -> None:
    """Mixtral's checkpoints hold w1 and w3 of each expert; the model stacks them, one above the other."""
    weights = bound(make_tiny("mixtral", tmp_path, num_hidden_layers=1))
    experts = {name: weight for name, weight in weights.items() if weight.kind == "expert"}
    assert len(experts) == 12
    by_parameter: dict[str, set[tuple[int, int] | None]] = {}
    for weight in experts.values():
        by_parameter.setdefault(weight.parameter.rpartition(".")[2], set()).add(weight.slot)
    assert by_parameter == {
        "gate_up_proj": {(expert, part) for expert in range(4) for part in range(2)},
        "down_proj": {(expert, 0) for expert in range(4)},
    }
    for name, weight in experts.items():
        assert weight.slot is not None
        assert f".experts.{weight.slot[0]}." in name


def test_stacked_and_transposed_experts(tmp_path: Path) -> None:
    weights = bound(make_tiny("gpt_oss", tmp_path, num_hidden_layers=1))
    down = next(weight for name, weight in weights.items() if name.endswith("experts.down_proj"))
    assert (down.kind, down.transposed, down.matrices, down.slot) == ("expert", True, 4, None)
    assert down.matrix_shape == (down.shape[2], down.shape[1])
    biases = [weight for name, weight in weights.items() if name.endswith("_bias")]
    assert biases
    assert all(weight.kind == "dense" for weight in biases)


def test_ten_experts_are_numbered_in_their_natural_order(tmp_path: Path) -> None:
    weights = bound(make_tiny("mixtral", tmp_path, num_hidden_layers=1, num_local_experts=11))
    for name, weight in weights.items():
        assert weight.slot is None or f".experts.{weight.slot[0]}." in name


def test_buffers_convolutions_and_states_say_why_they_stay(tmp_path: Path) -> None:
    weights = bound(make_tiny("mamba", tmp_path, num_hidden_layers=1))
    dense = {name.rpartition("mixer.")[2]: weight.reason for name, weight in weights.items() if weight.kind == "dense"}
    assert "3-D parameter of Conv1d" in dense["conv1d.weight"]
    assert "no linear layer" in dense["A_log"]
    assert all(dense.values())


def test_matrices_of_integers_stay(model: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: torch.ones(32, 32, dtype=torch.int8)}))
    assert bound(model)[name].reason == "stored as I8"


# Ties -----------------------------------------------------------------------------------------------------------


def test_tied_and_stored_once(tmp_path: Path) -> None:
    weights = bound(make_tiny("qwen2", tmp_path, num_hidden_layers=1))
    assert "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].kind == "embedding"


@pytest.mark.parametrize("equal", [True, False])
def test_tied_and_stored_twice(equal: bool, tmp_path: Path) -> None:
    """The model says they are tied; whether their values agree is for the reader of the values to find out."""
    folder = make_tiny("qwen2", tmp_path, num_hidden_layers=1)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * (1 if equal else 2)}))
    weights = bound(folder)
    assert weights["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert weights["model.embed_tokens.weight"].tied_to is None


def test_only_the_head_of_a_tied_pair(tmp_path: Path) -> None:
    folder = make_tiny("qwen2", tmp_path, num_hidden_layers=1)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    weights = bound(folder)
    assert weights["lm_head.weight"].tied_to is None
    assert weights["lm_head.weight"].kind in ("head", "embedding")


# Leftovers and gaps ---------------------------------------------------------------------------------------------


def test_unused_tensors_are_carried_and_tied_to_nothing(model: Path) -> None:
    """Also with several of them: what has no parameter must not look tied to another that has none."""
    extra = {"vision.weight": torch.ones(2, 3), "vision.bias": torch.ones(2), "zzz": torch.ones(1)}
    weights = bound(rewrite(model, lambda tensors: tensors.update(extra)))
    for name in extra:
        weight = weights[name]
        assert (weight.kind, weight.parameter) == ("dense", "")
        assert "LlamaForCausalLM does not use it" in weight.reason
    assert all(weight.tied_to is None for weight in weights.values())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_tensor_is_named(name: str, model: Path) -> None:
    with pytest.raises(MissingTensorError, match=name) as caught:
        bound(rewrite(model, lambda tensors: tensors.pop(name)))
    assert "shard" in str(caught.value.hint)


@pytest.mark.parametrize(
    "shape", [(32, 33), (33, 32), (32,), (1, 32, 32), (16, 64), (0, 32)], ids=lambda shape: "x".join(map(str, shape))
)
def test_wrong_shape_is_named(shape: tuple[int, ...], model: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}.*\[{', '.join(map(str, shape))}\].*\[32, 32\]") as caught:
        bound(rewrite(model, lambda tensors: tensors.update({name: torch.zeros(shape)})))
    assert caught.value.hint


@pytest.mark.parametrize("what", ["whole expert", "one part", "one shape", "too many"])
def test_incomplete_experts(what: str, tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path, num_hidden_layers=1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        third = sorted(name for name in tensors if ".experts.2." in name)
        if what == "too many":
            tensors |= {name.replace(".experts.2.", ".experts.7."): tensors[name].clone() for name in third}
            return
        for name in third if what == "whole expert" else third[:1]:
            if what == "one shape":
                tensors[name] = tensors[name][:-1].contiguous()
            else:
                del tensors[name]

    with pytest.raises(CheckpointError, match="expert"):
        bound(rewrite(folder, change))


# Models that are none of ours -----------------------------------------------------------------------------------


def test_encoders_are_refused(tmp_path: Path) -> None:
    tiny = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        with pytest.raises(CheckpointError, match=f"{name} is a .* not a decoder-only") as caught:
            build_meta_model(tmp_path / name)
        assert "AutoModelForCausalLM" in str(caught.value.hint)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no_such_model"},
        {"model_type": None},
        {"hidden_size": -1},
        {"hidden_size": "large"},
        {"num_attention_heads": 0},
        {"vocab_size": 2**62},
        {"vocab_size": 10**12},
        {"rope_scaling": {"rope_type": "??"}},
        {"hidden_act": "no_such_function"},
    ],
    ids=str,
)
def test_impossible_configurations(change: dict[str, Any], model: Path) -> None:
    """Transformers or the shapes refuse them; no memory is taken whatever the sizes are."""
    edit_json(model / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError) as caught:
        bound(model)
    assert "\n" not in str(caught.value)


def test_remote_code_is_not_run(model: Path) -> None:
    proof = model / "proof"
    (model / "modeling.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit_json(model / "config.json", lambda config: config.update(auto_map=auto_map, model_type="own"))
    with pytest.raises(CheckpointError) as caught:
        bound(model)
    assert not proof.exists()
    assert "trust" in f"{caught.value}{caught.value.hint}"


def test_meta_model_takes_no_memory(llama: Path) -> None:
    model = build_meta_model(llama)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert json.loads((llama / "config.json").read_text())["num_hidden_layers"] == 1
