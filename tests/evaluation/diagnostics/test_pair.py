"""What is compared: refused where it does not belong together, replaced and restored exactly."""

from __future__ import annotations

import pytest
import torch

from tenpak.artifact.reader import open_artifact
from tenpak.errors import EvaluationError
from tenpak.evaluation.diagnostics.pair import open_pair, replaced_weight


def test_the_text_is_read_in_disjoint_windows(talker) -> None:
    pair = talker().open(tokens=300, window=20)
    assert len(pair.tokens) == 300
    assert [(w.start, w.stop) for w in pair.windows[:2]] == [(0, 20), (20, 40)]
    assert sum(w.scored for w in pair.windows) == 299
    assert pair.same_source


def test_another_original_of_the_same_shapes_is_told(talker, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    made = talker()
    (tmp_path / "other").mkdir()
    for path in made.source.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(made.source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert not open_pair(tmp_path / "other", made.artifact, text=made.text).same_source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 160}, "has shape"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 1}, "has no tensor 'model.layers.1."),
    ],
)
def test_another_model_is_refused(changes, message, talker) -> None:
    other = talker(**changes)
    with pytest.raises(EvaluationError, match=f"made from another model: .*{message}") as refused:
        open_pair(other.source, talker().artifact, text=other.text)
    assert "inspect" in (refused.value.hint or "")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral", "gpt_oss", "granitemoe"])
def test_replaced_weights_are_the_artifacts_and_come_back_bit_for_bit(family: str, talker) -> None:
    made = talker(family)
    pair = made.open()
    before = {name: value.clone() for name, value in pair.original.state_dict().items()}
    compressed = dict(pair.compressed.named_modules())
    for name in open_artifact(made.artifact).manifest.weights:
        weight = pair.weights[name]
        with replaced_weight(pair, name):
            changed = {key for key, value in pair.original.state_dict().items() if not torch.equal(value, before[key])}
            assert weight.parameter in changed
            assert all(
                weight.parameter == key or before[key].shape == before[weight.parameter].shape for key in changed
            )
            if weight.slot is None and weight.kind != "expert":
                owner = compressed[weight.parameter.rpartition(".")[0]]
                assert torch.equal(pair.original.get_parameter(weight.parameter), owner.weight)
    after = pair.original.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_all_parts_of_all_experts_together_are_the_compressed_stack(talker) -> None:
    """Each tensor of a checkpoint with one matrix per expert goes to its own rows."""
    from contextlib import ExitStack

    pair = talker("mixtral").open()
    with ExitStack() as stack:
        for name, weight in pair.weights.items():
            if weight.slot is not None:
                stack.enter_context(replaced_weight(pair, name))
        experts = [name for name, _ in pair.original.named_parameters() if ".experts." in name]
        assert experts
        for name in experts:
            assert torch.equal(pair.original.get_parameter(name), pair.compressed.get_parameter(name))


def test_a_replaced_weight_comes_back_after_an_error(talker) -> None:
    pair = talker().open()
    name = "model.layers.0.mlp.up_proj.weight"
    before = pair.original.get_parameter(name).clone()
    with pytest.raises(RuntimeError), replaced_weight(pair, name):
        raise RuntimeError
    assert torch.equal(pair.original.get_parameter(name), before)
