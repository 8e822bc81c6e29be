"""Recipe strings: what they mean, that they round-trip, and what typos are told."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenpak.codecs.base import Codec
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq, Nearest
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.errors import RecipeError, UnknownCodecError
from tenpak.kernels.core import STATES
from tenpak.recipes import PRESETS, format, parse, parse_overrides


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("int4:g32", Uniform(4, 32)),
        ("int4", Uniform(4, 32)),
        ("int4:search", Uniform(4, 32, search=True)),
        ("int8:row", Uniform(8, None, symmetric=True)),
        ("int8", Uniform(8, None, symmetric=True)),
        ("int8:asym", Uniform(8, None)),
        ("int8:g128", Uniform(8, 128)),
        ("int3:g64:search", Uniform(3, 64, search=True)),
        ("int3:search:sym:g64", Uniform(3, 64, True, True)),
        (" INT4 : G16 ", Uniform(4, 16)),
        ("nf4:g64", NormalFloat(4, 64)),
        ("nf4", NormalFloat(4, 64)),
        ("nf3:g32:learned", NormalFloat(3, 32, "learned")),
        ("nf2:row", NormalFloat(2, None)),
        ("int4:g16+int2:g16", Residual(Uniform(4, 16), Uniform(2, 16))),
        ("int4 + nf2 + int2", Residual(Uniform(4), Residual(NormalFloat(2), Uniform(2)))),
        ("nf4-learned+int2:g16", Residual(NormalFloat(4, 64, "learned"), Uniform(2, 16))),
        ("gptq-int4", Uniform(4, 128, rounding=Gptq())),
        ("gptq-int4:g32", Uniform(4, 32, rounding=Gptq())),
        ("gptq-int8", Uniform(8, 128, rounding=Gptq())),
        ("gptq-int3:row:search", Uniform(3, None, True, True, Gptq())),
        ("gptq-int4:actorder:damp=0.02:sweeps=2", Uniform(4, 128, rounding=Gptq(0.02, "activation", 2))),
        ("GPTQ-int4 : damp=1e-5 : sym", Uniform(4, 128, True, rounding=Gptq(1e-5))),
        ("gptq-nf4", NormalFloat(4, 128, rounding=Gptq())),
        ("gptq-nf3:g64:learned:sweeps=1", NormalFloat(3, 64, "learned", Gptq(sweeps=1))),
        ("gptq-int4+gptq-int2:g16", Residual(Uniform(4, 128, rounding=Gptq()), Uniform(2, 16, rounding=Gptq()))),
        ('{"id": "uniform/1", "bits": 4, "rounding": "gptq"}', Uniform(4, rounding=Gptq())),
        ("awq-int4", ChannelScaled(Uniform(4, 128))),
        ("awq-int8", ChannelScaled(Uniform(8, 128))),
        ("awq-int4:g32:exp=0.5", ChannelScaled(Uniform(4, 32), 0.5)),
        ("awq-int4:exp=1:row", ChannelScaled(Uniform(4, None, True), 1.0)),
        ("awq-nf4:learned:exp=0", ChannelScaled(NormalFloat(4, 128, "learned"), 0.0)),
        ("spin-int4:g64", Rotated(Uniform(4, 64))),
        ("spin-nf3", Rotated(NormalFloat(3, 128))),
        ("spin-int4:seed=7:search", Rotated(Uniform(4, 128, search=True), 7)),
        ("awq-gptq-int3:g128", ChannelScaled(Uniform(3, 128, rounding=Gptq()))),
        ("spin-gptq-int4:g32:damp=0.1:seed=1", Rotated(Uniform(4, 32, rounding=Gptq(0.1)), 1)),
        ("awq-spin-int4:exp=0.5:seed=2", ChannelScaled(Rotated(Uniform(4, 128), 2), 0.5)),
        ("spin-awq-gptq-nf4 : G32", Rotated(ChannelScaled(NormalFloat(4, 32, rounding=Gptq())))),
        ("awq-int4:g64+spin-int2:g16", Residual(ChannelScaled(Uniform(4, 64)), Rotated(Uniform(2, 16)))),
        ("int4-calibrated", ChannelScaled(Uniform(4, 128), 0.5)),
        ("int3-calibrated", ChannelScaled(Uniform(3, 128), 0.5)),
        ("gptq-style", Uniform(4, 128, rounding=Gptq())),
        ("int4-calibrated:g32", ChannelScaled(Uniform(4, 32), 0.5)),
        ("int4-calibrated : row", ChannelScaled(Uniform(4, None, True), 0.5)),
        ("gptq-style:g64", Uniform(4, 64, rounding=Gptq())),
        ("int4-opt:g128", Uniform(4, 128, search=True)),
        ("int4-g32:g64", Uniform(4, 64)),
        ("nf4-learned:g32", NormalFloat(4, 32, "learned")),
        ("int4-residual:g32", Residual(Uniform(4, 32), Uniform(2, 32))),
        (
            "int4-calibrated:g32+nf3-learned:row",
            Residual(ChannelScaled(Uniform(4, 32), 0.5), NormalFloat(3, None, "learned")),
        ),
        ("trellis:0.001", Trellis(0.001)),
        (" TRELLIS : 1e-3 : Datafree ", Trellis(0.001, calibrated=False)),
        ("trellis:.5:states=8:rate=0:damp=0.1", Trellis(0.5, 8, rate_weight=0.0, damping=0.1)),
        ("trellis:2:damp=1:datafree:states=1", Trellis(2.0, 1, False, damping=1.0)),
        ("trellis:0.01:datafree+int4:g16", Residual(Trellis(0.01, calibrated=False), Uniform(4, 16))),
        ('{"id": "trellis/1", "step": 1}', Trellis(1.0)),
        ("bf16", Dense("bfloat16")),
        ("fp16", Dense("float16")),
        ("fp32", Dense("float32")),
        ("int4:g16+bf16", Residual(Uniform(4, 16), Dense("bfloat16"))),
        ("dense", None),
        ('{"id": "uniform/1", "bits": 4, "group": null}', Uniform(4, None)),
    ],
)
def test_parse(text: str, codec: Codec | None) -> None:
    assert parse(text) == codec
    assert parse(format(codec)) == codec


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (Uniform(4), "int4:g32"),
        (Uniform(4, 32, True, True), "int4:g32:sym:search"),
        (Uniform(8, None, True), "int8:row"),
        (Uniform(8, None), "int8:row:asym"),
        (NormalFloat(3, None, "learned"), "nf3:row:learned"),
        (Residual(Uniform(4, 16), Residual(Uniform(2, 16), Dense("float16"))), "int4:g16+int2:g16+fp16"),
        (Uniform(4, 128, rounding=Gptq()), "gptq-int4:g128"),
        (
            Uniform(4, 32, True, True, Gptq(0.02, "activation", 2)),
            "gptq-int4:g32:sym:search:actorder:damp=0.02:sweeps=2",
        ),
        (NormalFloat(4, None, "learned", Gptq(1e-6)), "gptq-nf4:row:learned:damp=1e-06"),
        (ChannelScaled(Uniform(4, 128)), "awq-int4:g128"),
        (ChannelScaled(Uniform(4, 32, rounding=Gptq(sweeps=1)), 0.5), "awq-gptq-int4:g32:sweeps=1:exp=0.5"),
        (Rotated(NormalFloat(3, None), 7), "spin-nf3:row:seed=7"),
        (ChannelScaled(Rotated(Uniform(4, 64), 1), 0.25), "awq-spin-int4:g64:exp=0.25:seed=1"),
        (Rotated(ChannelScaled(Uniform(4, 64))), "spin-awq-int4:g64"),
        (Trellis(0.001), "trellis:0.001"),
        (Trellis(1e-05, 8, False, 0.5, 0.02), "trellis:1e-05:datafree:states=8:rate=0.5:damp=0.02"),
        (Residual(Trellis(1.0), Dense("bfloat16")), "trellis:1.0+bf16"),
        (
            ChannelScaled(Trellis(1.0, 1)),
            '{"id":"channelscaled/1","inner":{"id":"trellis/1","step":1.0,"states":1,'
            '"calibrated":true,"rate_weight":0.3,"damping":0.01},"exponent":null}',
        ),
        (None, "dense"),
    ],
)
def test_format(codec: Codec | None, text: str) -> None:
    assert format(codec) == text


roundings = st.just(Nearest()) | st.builds(
    Gptq, st.floats(1e-6, 1), st.sampled_from(["natural", "activation"]), st.integers(0, 100)
)
groups = st.none() | st.integers(8, 256)
stages = st.one_of(
    st.builds(Uniform, st.integers(2, 8), groups, st.booleans(), st.booleans(), roundings),
    st.builds(NormalFloat, st.integers(2, 4), groups, st.sampled_from(["normal", "learned"]), roundings),
    st.builds(Dense, st.sampled_from(["float32", "bfloat16", "float16"])),
    st.builds(
        Trellis, st.floats(1e-12, 1e6), st.sampled_from(STATES), st.booleans(), st.floats(0, 2), st.floats(1e-6, 1)
    ),
)
exponents = st.none() | st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)
codecs = st.recursive(
    stages,
    lambda inner: st.one_of(
        st.builds(Residual, inner, inner), st.builds(ChannelScaled, inner, exponents), st.builds(Rotated, inner, seeds)
    ),
    max_leaves=5,
)
prefixed = st.one_of(
    st.builds(ChannelScaled, stages, exponents),
    st.builds(Rotated, stages, seeds),
    st.builds(lambda inner, e, seed: ChannelScaled(Rotated(inner, seed), e), stages, exponents, seeds),
    st.builds(lambda inner, e, seed: Rotated(ChannelScaled(inner, e), seed), stages, exponents, seeds),
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(codecs | prefixed)
def test_format_round_trips(codec: Codec) -> None:
    assert parse(format(codec)) == codec
    assert parse(json.dumps(codec.to_json())) == codec


option_words = st.lists(
    st.sampled_from(["g32", "damp=", "damp=inf", "sweeps=3", "sweeps=1e9", "=", "actorder", "sym", "exp=0.1", "seed=1"])
)
prefix_text = st.builds(
    lambda prefixes, words: ":".join(["".join(prefixes) + "int4", *words]),
    st.lists(st.sampled_from(["gptq-", "awq-", "spin-"]), max_size=4),
    option_words,
)
trellis_text = st.builds(
    lambda words: ":".join(["trellis", *words]),
    st.lists(
        st.sampled_from(["1", "1e-3", "inf", "nan", "-1", "", "datafree", "states=8", "states=", "rate=1", "damp=0.1"])
    ),
)
preset_text = st.builds(lambda name, words: ":".join([name, *words]), st.sampled_from(sorted(PRESETS)), option_words)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(
    st.text(max_size=30)
    | st.text(alphabet='intfgrow0123456789:+{}" -', max_size=20)
    | prefix_text
    | preset_text
    | trellis_text
)
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        codec = parse(text)
    except (RecipeError, UnknownCodecError):
        return
    assert parse(format(codec)) == codec


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("int9:g32", "bits must be an integer from 2 to 8, got 9", "2 to 8"),
        ("int1", "bits must be an integer from 2 to 8, got 1", "2 to 8"),
        ("nf5", "bits must be an integer from 2 to 4, got 5", "2 to 4"),
        ("int4:g7", "group must be an integer from 8 to 256, or null, got 7", "8 to 256"),
        ("int4:g1024", "got 1024", "8 to 256"),
        ("int4:g32:serach", "'serach' is not an option", "'search'"),
        ("int4:32", "'32' is not an option", "'g32'"),
        ("nf4:search", "'search' is not an option", "learned"),
        ("nf4:lerned", "'lerned'", "'learned'"),
        ("it4:g32", "'it4:g32' is not a recipe", "int4"),
        ("int4_g32", "'int4_g32' is not a recipe", "int4-g32"),
        ("nf4-lerned", "is not a recipe", "nf4-learned"),
        ("int4:sym:asym", "both sym and asym", "one of them"),
        ("gptq-int4:damp=0", "damping must be a number from 1e-06 to 1", "1e-06 to 1"),
        ("gptq-int4:damp=nan", "damping must be", "1e-06 to 1"),
        ("gptq-int4:damp=much", "damp is a number", "damp=0.02"),
        ("gptq-int4:sweeps=1.5", "sweeps is a count", "sweeps=2"),
        ("gptq-int4:sweeps=1000", "sweeps must be an integer from 0 to 100, got 1000", "0 to 100"),
        ("gptq-int4:damp=0.1:damp=0.2", "damp more than once", "one of them"),
        ("gptq-int4:actorder:actorder", "order more than once", "one of them"),
        ("gptq-int4:damp", "'damp' is not an option", "'damp='"),
        ("gptq-int4:act-order", "'act-order' is not an option", "'actorder'"),
        ("int4:actorder", "needs a gptq- stage", "options are"),
        ("nf4:damp=0.1", "needs a gptq- stage", "options are"),
        ("gptq-int9", "bits must be an integer from 2 to 8, got 9", "2 to 8"),
        ("gptqint4", "'gptqint4' is not a recipe", "gptq-int4"),
        ("gptq-bf16", "'gptq-bf16' is not a recipe", "int4:g32"),
        ("int4:exp=0.5", "needs an awq- stage", "options are"),
        ("awq-int4:seed=1", "needs a spin- stage", "options are"),
        ("spin-int4:actorder", "needs a gptq- stage", "options are"),
        ("awq-int4:exp", "'exp' is not an option", "'exp='"),
        ("awq-int4:exp=half", "exp is a number", "exp="),
        ("awq-int4:exp=2", "exponent must be a number from 0 to 1", "0 to 1"),
        ("awq-int4:exp=0.5:exp=0.5", "exp more than once", "one of them"),
        ("spin-int4:seed=x", "seed is a count", "seed="),
        ("spin-int4:seed=-1", "seed must be an integer from 0", "0 to"),
        ("awq-awq-int4", "a prefix more than once", "one of them"),
        ("gptq-awq-int4", "'gptq-awq-int4' is not a recipe", "awq-gptq-int4"),
        ("spim-int4", "'spim-int4' is not a recipe", "spin-int4"),
        ("awq-bf16", "'awq-bf16' is not a recipe", "int4:g32"),
        ("int4-calibrated:sym", "only a group can follow the preset 'int4-calibrated'", "awq-int4:g128:exp=0.5"),
        ("int4-calibrated:g32:g64", "only a group can follow", "int4-calibrated:g64"),
        ("int4-opt:", "only a group can follow", "int4-opt:g64"),
        ("int4-opt:g7", "group must be an integer from 8 to 256", "8 to 256"),
        ("int4-calibrate:g32", "is not a recipe", "int4-calibrated"),
        ("trellis", "'trellis' is not trellis:STEP", "trellis:0.001"),
        ("trellis:", "is not trellis:STEP", "trellis:0.001"),
        ("trellis:fine", "is not trellis:STEP", "trellis:0.001"),
        ("trellis:datafree", "is not trellis:STEP", "datafree, states=, rate=, damp="),
        ("trellis:0.01:0.02", "with options, each once", "datafree, states=, rate=, damp="),
        ("trellis:0.01:states", "with options", "states="),
        ("trellis:0.01:states=", "with options", "states="),
        ("trellis:0.01:states=many", "with options", "states="),
        ("trellis:0.01:g32", "with options", "datafree, states=, rate=, damp="),
        ("trellis:0.01:datafree=1", "with options", "datafree"),
        ("trellis:0.01:datafree:datafree", "each once", "datafree"),
        ("trellis:0.01:damp=0.1:damp=0.1", "each once", "damp="),
        ("int4+trellis:0.01:rate", "'int4\\+trellis:0.01:rate' is not trellis:STEP", "rate="),
        ("trellis:0", "step must be a number from 1e-12 to 1e\\+06, got 0.0", "1e-12"),
        ("trellis:nan", "is not trellis:STEP", "trellis:0.001"),
        ("trellis:inf", "step must be a number", "1e-12"),
        ("trellis:-0.1", "step must be a number", "1e-12"),
        ("trellis:0.01:states=3", "states must be one of 1, 4, 8, 16, 32, 64, 128, 256", "256"),
        ("trellis:0.01:states=8.5", "states must be one of", "256"),
        ("trellis:0.01:states=inf", "states must be one of", "256"),
        ("trellis:0.01:rate=3", "rate_weight must be a number from 0 to 2, got 3", "0 to 2"),
        ("trellis:0.01:damp=0", "damping must be a number from 1e-06 to 1", "1e-06"),
        ("gptq-trellis:0.01", "'gptq-trellis:0.01' is not a recipe", "did you mean trellis:0.001"),
        ("treliss:0.01", "'treliss:0.01' is not a recipe", "did you mean trellis:0.001"),
        ("int4:g32:row", "more than once", "one of them"),
        ("int4:search:search", "more than once", "one of them"),
        ("int4+", "'' in recipe 'int4\\+' is not a recipe", "int4:g32"),
        ("int4+dense", "cannot be added", "bf16"),
        ("", "empty", "int4:g32"),
        ('{"id": "uniform/1", "bits": 4', "not valid JSON", "uniform/1"),
        ('{"id": "uniform/1", "bits": 40}', "from 2 to 8, got 40", "2 to 8"),
        ('{"id": "uniform/1", "bits": 4, "groups": 32}', "no field 'groups'", "group"),
        ('{"bits": 4}', "id", "uniform/1"),
        ("{" * 5000, "not valid JSON", "uniform/1"),
        ("int" + "4" * 5000, "is not a recipe", "int4:g32"),
    ],
)
def test_mistakes_are_named(text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse(text)
    assert isinstance(caught.value, ValueError)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    preset = PRESETS[name]
    codec = parse(name)
    assert codec == parse(preset.recipe)
    assert format(codec) == preset.recipe
    assert preset.description


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_another_group(name: str) -> None:
    recipe = format(parse(f"{name}:g72"))
    assert recipe == "+".join(re.sub(r":(g\d+|row)", ":g72", stage) for stage in PRESETS[name].recipe.split("+"))
    assert parse(f"{name}:row") != parse(f"{name}:g8")


# The names and rates that users of the older system know (its table of codecs).
@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        ("int4-g8", 8.0),
        ("int4-g16", 6.0),
        ("int4-g32", 5.0),
        ("int4-g64", 4.5),
        ("int4-g128", 4.25),
        ("int4-opt", 6.0),
        ("int4-residual", 10.0),
        ("int3-g32", 4.0),
        ("nf3", 3.25),
        ("nf4", 4.25),
    ],
)
def test_presets_have_their_rate(name: str, bits_per_weight: float) -> None:
    codec = parse(name)
    assert codec is not None
    bits = codec.estimate_bits((256, 1024))
    assert bits is not None
    assert bits / (256 * 1024) == bits_per_weight


def test_overrides_keep_their_order() -> None:
    assert parse_overrides(["embed*=int8:row", "*.k_proj*= dense", 'lm_head={"id": "uniform/1", "bits": 6}']) == (
        ("embed*", Uniform(8, None, True)),
        ("*.k_proj*", None),
        ("lm_head", Uniform(6, 32)),
    )
    assert parse_overrides([]) == ()


@pytest.mark.parametrize("entry", ["embed*", "=int4", "embed*=", "", "  =  "])
def test_malformed_overrides(entry: str) -> None:
    with pytest.raises(RecipeError, match="does not set a recipe") as caught:
        parse_overrides([entry])
    assert "PATTERN=RECIPE" in str(caught.value.hint)


def test_a_typo_in_an_override_names_the_entry() -> None:
    with pytest.raises(RecipeError, match=r"embed\*=itn8") as caught:
        parse_overrides(["embed*=itn8:row"])
    assert "int8" in str(caught.value.hint)
