"""Which codec each tensor gets: defaults, patterns, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tenpak.allocation.plan import EMBEDDING_CODEC, Override, Plan, make_plan
from tenpak.checkpoint.structure import Kind, Weight
from tenpak.codecs.base import Codec
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import RecipeError

INT4 = Uniform(bits=4, group=32)
INT2 = Uniform(bits=2, group=32)
INT8 = Uniform(bits=8, group=64)


def weight(name: str, kind: Kind = "matrix", **more: object) -> Weight:
    return Weight(name, "F32", (8, 8), kind, more.pop("parameter", name), **more)  # type: ignore[arg-type]


WEIGHTS = (
    weight("model.embed_tokens.weight", "embedding"),
    weight("model.layers.0.self_attn.k_proj.weight"),
    weight("model.layers.0.mlp.up_proj.weight"),
    weight("model.layers.10.self_attn.k_proj.weight"),
    weight("model.norm.weight", "dense", reason="1-D"),
    weight("lm_head.weight", "head"),
)


def codecs(plan: Plan) -> dict[str, Codec | None]:
    return {entry.weight.name: entry.codec for entry in plan.entries}


def changed(pattern: str, codec: Codec | None = INT2) -> set[str]:
    """The tensors that one override changes."""
    before, after = codecs(make_plan(WEIGHTS, INT4)), codecs(make_plan(WEIGHTS, INT4, [Override(pattern, codec)]))
    return {name for name in before if before[name] != after[name]}


def test_defaults() -> None:
    plan = make_plan(WEIGHTS, INT4)
    assert codecs(plan) == {
        "model.embed_tokens.weight": EMBEDDING_CODEC,
        "model.layers.0.self_attn.k_proj.weight": INT4,
        "model.layers.0.mlp.up_proj.weight": INT4,
        "model.layers.10.self_attn.k_proj.weight": INT4,
        "model.norm.weight": None,
        "lm_head.weight": EMBEDDING_CODEC,
    }
    assert {entry.weight.name: entry.reason for entry in plan.entries if entry.codec is None} == {
        "model.norm.weight": "1-D"
    }


def test_dense_recipe_leaves_everything_with_a_reason() -> None:
    plan = make_plan(WEIGHTS, None)
    assert set(codecs(plan).values()) == {None}
    assert {entry.reason for entry in plan.entries} == {"the recipe is dense", "1-D"}


@pytest.mark.parametrize(
    ("codec", "overrides", "dtype"),
    [
        (Trellis(step=0.1), (), "BF16"),
        (None, (Override("*k_proj*", Trellis(step=0.1)),), "BF16"),
        (Trellis(step=0.1), (Override("*", INT4),), "F32"),  # which no tensor takes
        (INT4, (), "F32"),
    ],
)
def test_vectors_are_narrow_beside_the_flagship(
    codec: Codec | None, overrides: tuple[Override, ...], dtype: str
) -> None:
    vectors = (weight("model.norm.weight", "dense", reason="1-D"), weight("mask", "dense", reason="a buffer"))
    vectors = tuple(replace(vector, shape=(8,)) for vector in vectors)
    plan = make_plan((*WEIGHTS[:4], *vectors), codec, overrides)
    assert {e.weight.name: e.dtype for e in plan.entries[-2:]} == {"model.norm.weight": dtype, "mask": "F32"}
    assert {e.dtype for e in plan.entries[:-2]} == {"F32"}  # matrices that stay dense are not touched


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("embed*", {"model.embed_tokens.weight"}),
        ("embed_tokens", {"model.embed_tokens.weight"}),
        ("lm_head", {"lm_head.weight"}),
        ("lm_head.weight", {"lm_head.weight"}),
        ("k_proj", {"model.layers.0.self_attn.k_proj.weight", "model.layers.10.self_attn.k_proj.weight"}),
        ("*.k_proj", {"model.layers.0.self_attn.k_proj.weight", "model.layers.10.self_attn.k_proj.weight"}),
        ("self_attn.*", {"model.layers.0.self_attn.k_proj.weight", "model.layers.10.self_attn.k_proj.weight"}),
        ("layers.1?.*", {"model.layers.10.self_attn.k_proj.weight"}),
        ("layers.0.*", {"model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"}),
        ("model.layers.0.mlp.up_proj.weight", {"model.layers.0.mlp.up_proj.weight"}),
        ("[kv]_proj", {"model.layers.0.self_attn.k_proj.weight", "model.layers.10.self_attn.k_proj.weight"}),
        ("*", {entry.name for entry in WEIGHTS if entry.kind != "dense"}),
    ],
)
def test_patterns(pattern: str, matched: set[str]) -> None:
    assert changed(pattern) == matched


@pytest.mark.parametrize("pattern", ["proj", "head", "K_PROJ", "layers.1.*", "up_proj.bias"])
def test_a_pattern_matches_whole_names_only(pattern: str) -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        make_plan(WEIGHTS, INT4, [Override(pattern, INT2)])


def test_last_match_wins() -> None:
    first, last = Override("*.k_proj", INT2), Override("layers.0.*", INT8)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert codecs(make_plan(WEIGHTS, INT4, [first, last]))[name] == INT8
    assert codecs(make_plan(WEIGHTS, INT4, [last, first]))[name] == INT2


def test_set_dense_says_by_what() -> None:
    plan = make_plan(WEIGHTS, INT4, [Override("*.up_proj", None)])
    entry = next(entry for entry in plan.entries if entry.weight.name.endswith("up_proj.weight"))
    assert entry.codec is None
    assert "*.up_proj" in entry.reason


def test_no_match_names_what_is_near() -> None:
    with pytest.raises(RecipeError, match=r"'\*\.k_porj' matches no tensor") as error:
        make_plan(WEIGHTS, INT4, [Override("*.k_porj", INT2)])
    assert "k_proj" in str(error.value.hint)


def test_no_match_without_a_near_name_shows_how_names_look() -> None:
    with pytest.raises(RecipeError) as error:
        make_plan(WEIGHTS, INT4, [Override("zzzzzz", INT2)])
    assert "model.embed_tokens.weight" in str(error.value.hint)


def test_pattern_for_incompressible_tensors_says_why() -> None:
    with pytest.raises(RecipeError, match="1-D"):
        make_plan(WEIGHTS, INT4, [Override("norm", INT2)])


def test_experts_of_a_layer_are_not_partly_dense() -> None:
    experts = [
        weight(f"layers.0.experts.{n}.w1.weight", "expert", parameter="layers.0.experts.gate_up", slot=(n, 0))
        for n in range(3)
    ]
    with pytest.raises(RecipeError, match="partly dense") as error:
        make_plan(experts, INT4, [Override("experts.1.*", None)])
    assert error.value.hint
    assert set(codecs(make_plan(experts, INT4, [Override("experts.*", None)])).values()) == {None}
    assert len(set(codecs(make_plan(experts, INT4, [Override("experts.1.*", INT8)])).values())) == 2


def test_parameters_count_tied_weights_once_and_only_the_models_own() -> None:
    weights = (
        *WEIGHTS[:-1],
        weight("lm_head.weight", "head", tied_to="model.embed_tokens.weight"),
        weight("mask", "dense", reason="a buffer"),
        weight("vision.weight", "dense", parameter="", reason="LlamaForCausalLM does not use it"),
    )
    assert make_plan(weights, INT4).parameters == 5 * 64
