"""Policies: which part a tensor is, which codec it gets, and that overrides say all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tiny, make_tiny_talker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tenpak
from tenpak import cli
from tenpak.allocation.buckets import sensitivities
from tenpak.artifact.reader import open_artifact
from tenpak.checkpoint.parts import Place, places
from tenpak.checkpoint.structure import Weight
from tenpak.cli import console
from tenpak.cli.options import PolicyName
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.uniform import Uniform
from tenpak.errors import BudgetError, CalibrationError, MissingStatisticsError, RecipeError
from tenpak.job import Job, open_job
from tenpak.policies import DEFAULT_MIN_DIM, DEFAULT_RANK, POLICIES, Policy, policy_of

TEXT = "the cat sat on the mat and looked at the moon.\n" * 12
SMALL = {"rank": 4, "min_dim": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder of a tiny model of a family, made once."""
    root = tmp_path_factory.mktemp("policies")

    def make(family: str, **changes: Any) -> Path:
        folder = root / "-".join([family, *(f"{name}-{value}" for name, value in changes.items())])
        return folder if folder.exists() else make_tiny(family, folder, **changes)

    return make


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks that reads text."""
    folder = tmp_path_factory.mktemp("policies-talker")
    (folder / "text.txt").write_text(TEXT)
    return make_tiny_talker(folder / "model", num_hidden_layers=6)


def weights_of(source: Path) -> list[Weight]:
    return [entry.weight for entry in open_job(source, "dense", ()).plan.entries]


def codecs(job: Job) -> dict[str, Any]:
    return {entry.weight.name: entry.codec for entry in job.plan.entries}


def given_low_rank(job: Job) -> dict[str, int]:
    """Tensor → rank."""
    return {name: codec.rank or 0 for name, codec in codecs(job).items() if isinstance(codec, LowRank)}


# Parts -----------------------------------------------------------------------------------------------------------

LLAMA = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
LLAMA_MLP = {"gate_proj": "up", "up_proj": "up", "down_proj": "down"}
PARTS = {
    "gpt2": {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    "gpt_neo": {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "attention.out_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down",
    },
    "gpt_neox": {"query_key_value": "qkv", "attention.dense": "o", "dense_h_to_4h": "up", "dense_4h_to_h": "down"},
    "falcon": {"query_key_value": "qkv", "self_attention.dense": "o"},
    "opt": {"k_proj": "k", "out_proj": "o", "fc1": "up", "fc2": "down"},
    "llama": {**LLAMA, **LLAMA_MLP},
    "mistral": {**LLAMA, **LLAMA_MLP},
    "qwen3": {**LLAMA, **LLAMA_MLP},
    "gemma2": {**LLAMA, **LLAMA_MLP},
    "phi3": {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "up", "down_proj": "down"},
    "mixtral": {**LLAMA, "w1": "up", "w3": "up", "w2": "down"},
    "qwen2_moe": {**LLAMA, **LLAMA_MLP, "shared_expert_gate": "other"},
    "gpt_oss": {**LLAMA, "experts.gate_up_proj": "up", "experts.down_proj": "down"},
    "granitemoe": {"input_linear": "up", "output_linear": "down"},
    "deepseek_v3": {"q_b_proj": "q", "kv_b_proj": "qkv", "kv_a_proj_with_mqa": "qkv", "o_proj": "o"},
    "mamba": {"in_proj": "other", "x_proj": "other", "out_proj": "other"},
}  # fmt: skip


@pytest.mark.parametrize("family", PARTS)
def test_parts_of_families(family: str, models: Any) -> None:
    found = places(weights_of(models(family)))
    for ending, part in PARTS[family].items():
        matched = {name: place.part for name, place in found.items() if name.removesuffix(".weight").endswith(ending)}
        assert matched, ending
        assert set(matched.values()) == {part}, matched
    assert {(place.block, place.blocks) for place in found.values()} == {(0, 2), (1, 2)}


def test_names_of_no_known_family_are_told_by_pieces_neighbours_and_shapes() -> None:
    shapes = {
        "mix.to_query": (32, 32), "mix.to_key": (16, 32), "mix.value_map": (16, 32), "mix.merge": (32, 32),
        "wide.first": (80, 32), "wide.second": (32, 80), "odd.square": (32, 32), "odd.thin": (5, 7),
    }  # fmt: skip
    weights = [
        Weight(f"stack.3.{name}.weight", "F32", shape, "matrix", f"stack.3.{name}.weight")
        for name, shape in shapes.items()
    ]
    weights.append(Weight("project.weight", "F32", (32, 32), "matrix", "project.weight"))
    parts = {name.split(".")[3]: place.part for name, place in places(weights).items()}
    assert parts == {
        "to_query": "q", "to_key": "k", "value_map": "v", "merge": "o", "first": "up", "second": "down",
        "square": "other", "thin": "other",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "boundary"),
    [(1, []), (2, []), (3, [0, 2]), (4, [0, 3]), (5, [0, 1, 3, 4]), (24, [0, 1, 22, 23])],
)
def test_boundary_blocks_leave_a_middle(blocks: int, boundary: list[int]) -> None:
    assert [b for b in range(blocks) if Place("k", b, blocks).boundary] == boundary


# Low rank --------------------------------------------------------------------------------------------------------


def test_only_keys_become_low_rank_and_boundary_blocks_get_more(models: Any) -> None:
    job = open_job(models("llama", num_hidden_layers=6), None, (), policy=Policy("k-proj", **SMALL))
    ranks = given_low_rank(job)
    assert ranks == {f"model.layers.{n}.self_attn.k_proj.weight": 4 if n in (2, 3) else 8 for n in range(6)}
    assert {name for name, codec in codecs(job).items() if codec is not None} == set(ranks)
    codec = codecs(job)["model.layers.2.self_attn.k_proj.weight"]
    assert codec == LowRank(rank=4, kind="plain", factor=Uniform(8, None, True), norm_correction=True)
    assert job.recipe == "dense"


def test_the_rank_never_costs_more_than_int8(models: Any) -> None:
    job = open_job(models("llama"), None, (), policy=Policy("attention", rank=1000, min_dim=1))
    for name, rank in given_low_rank(job).items():
        codec = codecs(job)[name]
        rows, columns = next(e.weight.matrix_shape for e in job.plan.entries if e.weight.name == name)
        assert rank == rows * columns // (rows + columns)
        assert sum(t.nbytes for t in codec.fields((rows, columns)) if t.dtype == torch.uint8) <= rows * columns


@pytest.mark.parametrize(
    ("policy", "endings"),
    [
        ("q-v", {"q_proj", "v_proj"}),
        ("qkv", {"q_proj", "k_proj", "v_proj"}),
        ("out-proj", {"o_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_policies_by_part(policy: str, endings: set[str], models: Any) -> None:
    plain = open_job(models("llama"), None, (), policy=Policy(policy, **SMALL))
    whitened = open_job(models("llama"), None, (), policy=Policy(f"{policy}-whitened", **SMALL))
    ranks = given_low_rank(plain)
    assert {name.split(".")[-2] for name in ranks} == endings
    assert set(ranks.values()) == {8 if policy == "q-v" else 4}
    assert given_low_rank(whitened) == ranks
    assert {codecs(whitened)[name].kind for name in ranks} == {"whitened"}


def test_fused_attention_is_taken_as_a_whole_or_refused(models: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"one tensor here.*transformer\.h\.\*\.attn\.c_attn\.weight \(qkv, 96 × 32\)"
    ) as raised:
        open_job(models("gpt2"), None, (), policy=Policy("k-proj", **SMALL))
    assert "--policy qkv" in (raised.value.hint or "")
    job = open_job(models("gpt2"), None, (), policy=Policy("qkv", **SMALL))
    assert {name.split(".")[-2] for name in given_low_rank(job)} == {"c_attn"}


def test_matching_nothing_lists_the_layers(models: Any) -> None:
    with pytest.raises(RecipeError, match=rf"16 on its smaller side, less than min-dim {DEFAULT_MIN_DIM}") as raised:
        open_job(models("llama"), None, (), policy="k-proj")
    for layer in (*LLAMA, *LLAMA_MLP):
        assert f"{layer}.weight" in str(raised.value)
    assert "--min-dim 16" in (raised.value.hint or "")
    with pytest.raises(RecipeError, match=r"none of them; layers are .*mixer\.in_proj"):
        open_job(models("mamba"), None, (), policy=Policy("k-proj", **SMALL))


def test_a_model_without_blocks_is_told_so(models: Any) -> None:
    for policy in ("k-proj", "mixed", "buckets"):
        with pytest.raises(RecipeError, match="none in numbered blocks"):
            open_job(models("llama", num_hidden_layers=0), None, (), policy=policy)


def test_what_is_left_alone_takes_the_recipe(models: Any) -> None:
    job = open_job(models("llama"), "int4:g64", (), policy=Policy("k-proj", **SMALL))
    assert codecs(job)["model.layers.0.mlp.up_proj.weight"] == Uniform(4, 64)
    assert isinstance(codecs(job)["model.layers.0.self_attn.k_proj.weight"], LowRank)


# Mixed precision and buckets ---------------------------------------------------------------------------------------


def test_mixed_by_part_and_position(models: Any) -> None:
    found = codecs(open_job(models("qwen2_moe", num_hidden_layers=6), None, (), policy="mixed"))
    inside, end = "model.layers.2.", "model.layers.5."
    assert found[f"{inside}self_attn.q_proj.weight"] == found[f"{inside}self_attn.k_proj.weight"] == Uniform(4, 16)
    assert found[f"{inside}self_attn.v_proj.weight"] == found[f"{inside}self_attn.o_proj.weight"] == Uniform(4, 32)
    assert found[f"{inside}mlp.experts.3.down_proj.weight"] == Uniform(3, 32)
    assert found[f"{inside}mlp.shared_expert_gate.weight"] == Uniform(4, 16)
    assert {codec for name, codec in found.items() if name.startswith(end) and codec} == {Uniform(4, 16)}


@pytest.mark.parametrize("recipe", ["gptq-int4:g32", "awq-gptq-int3:g128", "spin-int4:g64:search"])
def test_tables_change_bits_and_groups_of_the_recipe_only(recipe: str, models: Any) -> None:
    job = open_job(models("llama"), recipe, (), policy="mixed")
    plain = codecs(open_job(models("llama"), recipe, ()))["model.layers.0.mlp.up_proj.weight"]
    mixed = codecs(job)["model.layers.0.mlp.up_proj.weight"]
    inner = plain.inner if hasattr(plain, "inner") else plain
    wanted = replace(inner, bits=3, group=32)
    assert mixed == (replace(plain, inner=wanted) if hasattr(plain, "inner") else wanted)


@pytest.mark.parametrize("policy", ["mixed", "buckets"])
@pytest.mark.parametrize("recipe", ["dense", "nf4", "trellis:0.01"])
def test_tables_need_an_int_recipe(policy: str, recipe: str, models: Any) -> None:
    with pytest.raises(RecipeError, match="is none"):
        open_job(models("llama"), recipe, (), policy=policy)


def test_simple_sensitivity_knows_names_positions_and_magnitudes(models: Any, tmp_path: Path) -> None:
    source = models("llama", num_hidden_layers=6)
    before = _sensitivity(source)
    assert max(before.values()) == 1.0
    assert min(before.values()) > 0
    for n in range(6):
        attention = f"model.layers.{n}.self_attn."
        assert before[f"{attention}v_proj.weight"] > 2 * before[f"{attention}k_proj.weight"]
    assert before["model.layers.0.mlp.up_proj.weight"] > before["model.layers.5.mlp.up_proj.weight"]
    peaked = tmp_path / "peaked"
    peaked.mkdir()
    for path in source.iterdir():
        (peaked / path.name).write_bytes(path.read_bytes())
    tensors = load_file(peaked / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][:, ::16] *= 20  # large weights in every group: steps are wide
    save_file(tensors, peaked / "model.safetensors", {"format": "pt"})
    after = _sensitivity(peaked)
    share = after["model.layers.3.mlp.up_proj.weight"] / after["model.layers.2.mlp.up_proj.weight"]
    assert share > 1.2 * before["model.layers.3.mlp.up_proj.weight"] / before["model.layers.2.mlp.up_proj.weight"]


def _sensitivity(source: Path) -> dict[str, float]:
    job = open_job(source, "dense", ())
    weights = [entry.weight for entry in job.plan.entries]
    found = places(weights)
    groups = [[weight] for weight in weights if weight.name in found]
    steps: list[tuple[str, int, int]] = []
    weighed = sensitivities(job.checkpoint, groups, found, progress=lambda *step: steps.append(step))
    total = sum(weight.numel for group in groups for weight in group)
    assert steps[-1] == ("weighing", total, total)
    assert sorted(steps) == steps
    return dict(zip((g[0].name for g in groups), weighed, strict=True))


def test_sensitivities_do_not_depend_on_threads(models: Any) -> None:
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(_sensitivity(models("llama")))
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_constant_weights_are_not_sensitive(models: Any, tmp_path: Path) -> None:
    source = models("llama")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    zeros = {name: torch.zeros_like(value) for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(zeros, tmp_path / "model.safetensors", {"format": "pt"})
    job = open_job(tmp_path, None, (), policy="buckets")
    assert {codec.group for name, codec in codecs(job).items() if ".layers." in name and codec} == {64}


@pytest.mark.filterwarnings("ignore:.*are advised:UserWarning")
def test_fisher_buckets_follow_statistics(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingStatisticsError, match="needs statistics") as raised:
        open_job(talker, None, (), policy="buckets-fisher")
    assert "tenpak calibrate" in (raised.value.hint or "")
    known = tmp_path / "statistics"
    tenpak.calibrate(talker, known, calibration=talker.parent / "text.txt", window=16)
    before = codecs(open_job(talker, None, (), policy="buckets-fisher", statistics=known))
    assert {codec.group for codec in before.values() if codec and codec.bits == 4} <= {8, 16, 32, 64}
    assert 8 in {codec.group for codec in before.values() if codec}
    # A part of which nothing is felt any more costs nothing.
    path = known / "part-00002.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    silent = {n: torch.zeros_like(v) if "curvature" in n else v for n, v in load_file(path).items()}
    save_file(silent, path, metadata)
    after = codecs(open_job(talker, None, (), policy="buckets-fisher", statistics=known))
    assert {codec.group for name, codec in after.items() if ".layers.2." in name and codec} == {64}
    with pytest.raises(CalibrationError, match="of another model"):
        open_job(make_tiny_talker(tmp_path / "other"), None, (), policy="buckets-fisher", statistics=known)


# Overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "opt"])
@pytest.mark.parametrize(
    "policy", [Policy("attention", **SMALL), Policy("mlp", **SMALL), Policy("mixed"), Policy("buckets")]
)
def test_recorded_overrides_give_the_same_plan(family: str, policy: Policy, models: Any) -> None:
    job = open_job(models(family), None, (), policy=policy)
    again = open_job(models(family), job.recipe, job.overrides)
    assert again.plan == job.plan
    assert len(job.overrides) <= 40  # patterns, not a line for every expert


def test_small_matrices_beside_large_ones_of_the_same_name_stay(models: Any) -> None:
    """What a pattern of a layer's name would also match is set back."""
    weights = [
        Weight(name, "F32", shape, "matrix", name)
        for n in range(3)
        for name, shape in (
            (f"l.{n}.attn.k_proj.weight", (64, 64)),
            (f"l.{n}.attn.inner.{n}.k_proj.weight", (8, 64)),
            (f"l.{n}.mlp.up_proj.weight", (128, 64)),
        )
    ]
    from tenpak.allocation.plan import Override, make_plan
    from tenpak.policies import apply
    from tenpak.recipes import parse_overrides

    given = apply(Policy("k-proj", 4, 32), weights, None, "int4:g32", None)  # type: ignore[arg-type]  # reads nothing
    plan = make_plan(weights, Uniform(4, 32), [Override(*pair) for pair in parse_overrides(given)])
    low = {entry.weight.name for entry in plan.entries if isinstance(entry.codec, LowRank)}
    assert low == {f"l.{n}.attn.k_proj.weight" for n in range(3)}


def test_overrides_of_the_user_win(models: Any) -> None:
    job = open_job(models("llama"), None, ("layers.0.*.k_proj=int8:row",), policy=Policy("k-proj", **SMALL))
    assert codecs(job)["model.layers.0.self_attn.k_proj.weight"] == Uniform(8, None, True)
    assert job.overrides[-1] == "layers.0.*.k_proj=int8:row"


# Mistakes ----------------------------------------------------------------------------------------------------------


def test_an_unknown_policy_names_near_ones() -> None:
    with pytest.raises(RecipeError, match="no policy 'kproj'") as raised:
        Policy("kproj")
    assert "did you mean k-proj" in (raised.value.hint or "")


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 9000}, {"min_dim": 0}, {"rank": True}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Policy("k-proj", **options)


@pytest.mark.parametrize("name", ["mixed", "buckets", "buckets-fisher"])
def test_tables_have_no_rank(name: str) -> None:
    with pytest.raises(RecipeError, match="has no rank"):
        Policy(name, rank=8)


def test_options_without_a_policy() -> None:
    assert policy_of(None) is None
    assert policy_of("k-proj") == Policy("k-proj")
    with pytest.raises(RecipeError, match="there is none"):
        policy_of(None, rank=8)


def test_a_budget_excludes_a_policy(models: Any, tmp_path: Path) -> None:
    for run in (
        lambda: tenpak.compress(models("llama"), tmp_path / "out", policy="mixed", budget="10x"),
        lambda: tenpak.predict(models("llama"), policy=Policy("mixed"), budget="10x"),
    ):
        with pytest.raises(BudgetError, match="excludes a policy") as raised:
            run()
        assert "--set" in (raised.value.hint or "")
    assert not (tmp_path / "out").exists()


# End to end --------------------------------------------------------------------------------------------------------


def test_products_come_from_the_int8_factors(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models("gpt_neo", hidden_size=64)
    report = tenpak.compress(source, tmp_path / "out", policy=Policy("k-proj", rank=8, min_dim=32))
    assert report.bytes == tenpak.predict(source, policy=Policy("k-proj", rank=8, min_dim=32)).bytes
    manifest = open_artifact(tmp_path / "out").manifest
    assert (manifest.recipe, len(manifest.weights)) == ("dense", 2)
    again = tenpak.compress(source, tmp_path / "again", recipe=manifest.recipe, overrides=manifest.overrides)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert again.codecs == report.codecs == {"lowrank/1": 2 * (4 + 2 * 8 * 64 + 2 * (64 + 8))}  # rank, codes, scales
    model = tenpak.load(tmp_path / "out")
    tokens = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    held = tenpak.load(tmp_path / "out", runtime="speed")(tokens).logits

    def never(*_: Any) -> None:
        raise AssertionError("the weight was expanded")

    monkeypatch.setattr(LowRank, "decode", never)
    monkeypatch.setattr(Uniform, "decode", never)  # nor were the factors
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, held, atol=2e-4, rtol=1e-4)


def test_the_command_line(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_file", None)
    monkeypatch.setattr(console.err, "_file", None)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, ["compress", str(talker), *map(str, arguments), "--json"])

    options = ("--policy", "k-proj", "--rank", 4, "--min-dim", 8)
    predicted = json.loads(run(*options, "--dry-run").stdout)
    done = run(*options, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == predicted["bytes"]
    assert set(report["codecs"]) == {"lowrank/1"}
    assert isinstance(run("--policy", "kproj", "--dry-run").exception, RecipeError)
    assert isinstance(run("--rank", 4, "--dry-run").exception, RecipeError)


def test_help_names_every_policy() -> None:
    told = PolicyName.__metadata__[0].help
    assert all(name.removesuffix("-whitened") in told for name in POLICIES)
    assert (DEFAULT_RANK, DEFAULT_MIN_DIM) == (128, 1024)
