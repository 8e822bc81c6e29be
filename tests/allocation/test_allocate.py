"""Plans from profiles: sizes to the byte, rules kept, errors that say what is possible."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tenpak.allocation.allocate import DENSE, Rules, allocate, files_bytes
from tenpak.allocation.budget import Budget
from tenpak.allocation.profile import Option, Profile, ProfiledTensor, ProfileSource
from tenpak.allocation.saved_plan import SavedPlan
from tenpak.artifact.schema import CODES_SUFFIX
from tenpak.artifact.writer import predicted_bytes
from tenpak.errors import AllocationError, InfeasibleBudgetError, RecipeError
from tenpak.plans import rules_of

SIZE = 64 * 64


def option(recipe: str, bits: float, importance: float) -> Option:
    return Option(recipe=recipe, bytes=int(SIZE * bits / 8), loss=importance * 4.0**-bits)


def tensor(name: str, importance: float, fused: str | None = None, group: str | None = None) -> ProfiledTensor:
    options = [option(f"int{bits}:g32", bits + 0.5, importance) for bits in (2, 3, 4, 8)]
    options.append(Option(recipe=DENSE, bytes=4 * SIZE, loss=0))
    return ProfiledTensor(
        name=name, dtype="F32", shape=(64, 64), bytes=4 * SIZE, group=group or name, fused=fused, options=tuple(options)
    )


@pytest.fixture
def profile() -> Profile:
    blocks = [
        tensor(f"layers.{block}.{part}.weight", 10.0**power, fused)
        for block in range(3)
        for part, power, fused in (
            ("q", -1, f"block {block}: qkv"), ("k", 0, f"block {block}: qkv"), ("up", 1, None), ("down", block, None)
        )
    ]  # fmt: skip
    experts = [
        tensor(f"layers.3.experts.{e}.weight", 0.1 * (1 + e), group="layers.3.experts.0.weight") for e in range(4)
    ]
    norm = ProfiledTensor(name="norm.weight", dtype="F32", shape=(64,), bytes=256, group="norm.weight")
    tensors = (*blocks, *experts, norm)
    source = ProfileSource(name="model", sha256="0" * 64, parameters=16 * SIZE + 64, text="text", tokens=1000)
    return Profile(source=source, candidates=(), tensors=tensors)


def recipes(plan: SavedPlan) -> dict[str, str]:
    return {tensor.name: tensor.recipe for tensor in plan.tensors}


def loss(plan: SavedPlan) -> float:
    return math.fsum(tensor.loss or 0 for tensor in plan.tensors)


@pytest.mark.parametrize("bits", [3.2, 4.0, 5.5, 8.0, 30.0])
def test_sizes_are_those_of_the_files(profile: Profile, bits: float) -> None:
    budget = Budget("bpw", bits)
    plan = allocate(profile, budget)
    limit = budget.bytes(profile.source.parameters)
    chosen = {t.name: Option(recipe=t.recipe, bytes=t.bytes or 0, loss=0) for t in plan.tensors}
    assert plan.bytes == files_bytes(profile, chosen) <= limit
    assert plan.loss == pytest.approx(loss(plan))
    assert plan.bound is not None
    assert plan.bound <= loss(plan) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2.6, 4.0, 30.0])
def test_vectors_are_counted_as_they_are_stored(profile: Profile, bits: float) -> None:
    """In BF16 beside the flagship codec, in their own dtype where no tensor takes it."""
    flagship = Option(recipe="trellis:0.5", bytes=SIZE // 4, loss=0.02)
    tensors = [t.model_copy(update={"options": (*t.options, flagship)}) for t in profile.tensors if t.options]
    norm = ProfiledTensor(name="n", dtype="F32", shape=(640,), bytes=2560, group="n", narrowed="BF16")
    mixed = profile.model_copy(update={"tensors": (*tensors, norm)})
    plan = allocate(mixed, Budget("bpw", bits))
    taken = "trellis:0.5" in recipes(plan).values()
    rows = [(t.name + CODES_SUFFIX, "U8", (t.bytes,), t.bytes) for t in plan.tensors if t.recipe != DENSE and t.bytes]
    rows += [(t.name, "F32", (64, 64), 4 * SIZE) for t in plan.tensors if t.recipe == DENSE]
    rows.append(("n", "BF16", (640,), 1280) if taken else ("n", "F32", (640,), 2560))
    assert taken == (bits < 30)
    order = {t.name: place for place, t in enumerate(mixed.tensors)}
    rows.sort(key=lambda row: order[row[0].removesuffix(CODES_SUFFIX)])
    assert plan.bytes == predicted_bytes(rows, 10**12)


def test_no_swap_within_the_budget_is_better(profile: Profile) -> None:
    """A plan is compared with all that differ from it in two tensors."""
    budget = Budget("bpw", 4.3)
    limit = budget.bytes(profile.source.parameters)
    plan = allocate(profile, budget)
    able = [t for t in profile.tensors if t.options and t.group == t.name and "experts" not in t.name]
    chosen = {t.name: Option(recipe=t.recipe, bytes=t.bytes or 0, loss=t.loss or 0) for t in plan.tensors}
    for first in able:
        for second in able:
            for a in first.options:
                for b in second.options:
                    other = {**chosen, first.name: a, second.name: b}
                    if files_bytes(profile, other) <= limit:
                        assert math.fsum(o.loss for o in other.values()) >= loss(plan) - 1e-12


def test_a_limit_of_loss_takes_the_fewest_bytes(profile: Profile) -> None:
    plan = allocate(profile, Budget("kl", 0.05))
    assert loss(plan) <= 0.05
    assert plan.bytes is not None
    finer = allocate(profile, Budget("kl", 0.02))
    assert finer.bytes is not None
    assert finer.bytes > plan.bytes
    # With fewer bytes the loss would be above the limit.
    fewer = allocate(profile, Budget("bytes", plan.bytes - 1))
    assert loss(fewer) > 0.05


def test_what_shares_a_recipe_shares_it(profile: Profile) -> None:
    plan = recipes(allocate(profile, Budget("bpw", 4.3)))
    assert len({recipe for name, recipe in plan.items() if "experts" in name}) == 1
    assert any(plan[f"layers.{b}.q.weight"] != plan[f"layers.{b}.k.weight"] for b in range(3))
    fused = recipes(allocate(profile, Budget("bpw", 4.3), Rules(fused=True)))
    assert all(fused[f"layers.{b}.q.weight"] == fused[f"layers.{b}.k.weight"] for b in range(3))


def test_rules_are_kept(profile: Profile) -> None:
    rules = rules_of(["layers.0.*=int8:g32"], ["*.up=INT4:G32"], ["*.down=3.5"])
    plan = allocate(profile, Budget("bpw", 4.6), rules)
    for name, recipe in recipes(plan).items():
        assert recipe == "int8:g32" or not name.startswith("layers.0.")
        assert not (".up." in name and recipe == "int4:g32")
        assert not (".down." in name and recipe == "int2:g32")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (rules_of(["layers.0.q=int4:g32", "*.q=int8:g32"]), r"'layers.0.q.weight' cannot be both int4.* and int8"),
        (rules_of(["*.experts.0=int4:g32", "*.experts.1=int8:g32"]), "which share a recipe, cannot be both"),
        (rules_of(["*.up=int5:g32"]), "leave no candidate for 'layers.0.up.weight'"),
        (rules_of(["*.up=int4:g32"], ["*=int4:g32"]), "leave no candidate"),
        (rules_of(least=["*.up=33"]), "leave no candidate"),
        (rules_of(bans=["*.gate=int4:g32"]), "'[*].gate' matches no tensor"),
        (rules_of(least=["norm=4"]), "'norm' matches no tensor"),
    ],
)
def test_rules_that_contradict_are_refused(profile: Profile, rules: Rules, message: str) -> None:
    with pytest.raises(AllocationError, match=message) as caught:
        allocate(profile, Budget("bpw", 5), rules)
    assert caught.value.hint


@pytest.mark.parametrize("entry", ["up", "=4", "up=", "up=much", "up=0", "up=nan"])
def test_floors_that_cannot_be_read_are_refused(entry: str) -> None:
    with pytest.raises(AllocationError, match="sets no bits"):
        rules_of(least=[entry])
    with pytest.raises(RecipeError):
        rules_of(pins=["up=int99"])


def test_what_cannot_be_met_says_what_can(profile: Profile) -> None:
    with pytest.raises(
        InfeasibleBudgetError, match=r"smallest takes ([\d,]+) bytes.*int2:g32 for 16 tensors"
    ) as caught:
        allocate(profile, Budget("bpw", 1))
    least = int(str(caught.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    assert allocate(profile, Budget("bytes", least)).bytes == least
    with pytest.raises(InfeasibleBudgetError):
        allocate(profile, Budget("bytes", least - 1))
    with pytest.raises(InfeasibleBudgetError, match="the best takes"):
        allocate(profile, Budget("kl", 1e-9), rules_of(bans=["*=dense"]))


def test_profiles_and_plans_survive_their_files(profile: Profile, tmp_path: Path) -> None:
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile
    plan = allocate(profile, Budget("ratio", 8))
    plan.write(tmp_path / "plan.json")
    assert SavedPlan.read(tmp_path / "plan.json") == plan
    assert plan.budget == "8x"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"loss": ', '"loss": NaN, "was": ', "tensors"),
        ('"loss": ', '"loss": -', "greater than or equal"),
        ('"bytes": ', '"octets": ', "tensors"),
        ('"tenpak profile/1"', '"tenpak profile/2"', "format"),
        ('"name": "layers.0.k.weight"', '"name": "layers.0.q.weight"', "twice"),
        ("{", "", "the file"),
    ],
)
def test_damaged_profiles_are_refused(profile: Profile, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "profile.json"
    profile.write(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(AllocationError, match=message) as caught:
        Profile.read(path)
    assert caught.value.hint
    with pytest.raises(AllocationError, match="cannot read"):
        Profile.read(tmp_path / "none.json")


def test_a_profile_without_candidates_says_so(profile: Profile, tmp_path: Path) -> None:
    bare = profile.model_copy(update={"tensors": profile.tensors[-1:]})
    with pytest.raises(AllocationError, match="no tensor with candidates"):
        allocate(bare, Budget("bpw", 4))
    profile.write(tmp_path / "profile.json")
    assert json.loads((tmp_path / "profile.json").read_text())["format"] == "tenpak profile/1"
