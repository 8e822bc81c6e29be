"""Recipe strings: what they mean, that they round-trip, and what typos are told."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenpak.codecs.additive import Additive
from tenpak.codecs.base import Codec
from tenpak.codecs.channelscaled import ChannelScaled
from tenpak.codecs.dense import Dense
from tenpak.codecs.entropycoded import EntropyCoded
from tenpak.codecs.lowrank import LowRank
from tenpak.codecs.normalfloat import NormalFloat
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.residual import Residual
from tenpak.codecs.rotated import Rotated
from tenpak.codecs.rounding import Gptq, Nearest
from tenpak.codecs.sparse import Sparse
from tenpak.codecs.sparse24 import Sparse24
from tenpak.codecs.trellis import Trellis
from tenpak.codecs.uniform import Uniform
from tenpak.codecs.vector import Vector
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
        ("ec-int4:g32", EntropyCoded(Uniform(4, 32))),
        (" EC-int4 + nf2 ", EntropyCoded(Residual(Uniform(4), NormalFloat(2)))),
        ("int4:search+int2:search ~ 5", Residual(Uniform(4, search=True), Uniform(2, search=True), 5)),
        ("ec-int4+nf2+fp16~1", EntropyCoded(Residual(Uniform(4), Residual(NormalFloat(2), Dense("float16")), 1))),
        ("int4-residual~2", Residual(Uniform(4, 16), Uniform(2, 16), 2)),
        ("sparse24-int4", Sparse24(Uniform(4, 128))),
        ("sparse24-wanda-nf4:g64:learned", Sparse24(NormalFloat(4, 64, "learned"), "wanda")),
        ("sparse24-gptq-int3:row:damp=0.1:sweeps=0", Sparse24(Uniform(3, None, True), "sparsegpt", 0.1, 0)),
        ("sparse24-gptq-bf16:sweeps=1", Sparse24(Dense("bfloat16"), "sparsegpt", sweeps=1)),
        ("sparse5%-int8:row", Sparse(0.05, Uniform(8, None, True))),
        ("Sparse7%-NF4", Sparse(0.07, NormalFloat(4, 128))),
        ("sparse12.5%-wanda-int4:g32:search", Sparse(0.125, Uniform(4, 32, search=True), "wanda")),
        ("sparse0.0001%-bf16", Sparse(1e-6, Dense("bfloat16"))),
        ("vq4x256+sparse50%-int8", Residual(Vector(), Sparse(0.5, Uniform(8, 128)))),
        ("lowrank32", LowRank(32, factor=Uniform(8, None, True))),
        ("mag-lowrank8:fp16", LowRank(8, kind="magnitude", factor=Dense("float16"))),
        ("plain-lowrank:bpw=2:int4", LowRank(bpw=2.0, kind="plain", factor=Uniform(4, 32))),
        ("act-lowrank:energy=.9:fp32", LowRank(energy=0.9, kind="activation", factor=Dense("float32"))),
        (
            "lowrank:error=0.1:damp=0.1:norm",
            LowRank(error=0.1, factor=Uniform(8, None, True), damping=0.1, norm_correction=True),
        ),
        ("pattern4", Pattern(4)),
        ("pattern8x0:terms=3:base=9:scales=int8", Pattern(8, 0, 9, 3, Uniform(8, None, True))),
        ("pattern2x9:calibrated:seed=5:scales=int4", Pattern(2, 9, scales=Uniform(4, 32), calibrated=True, seed=5)),
        ("vq4x256", Vector(4, 256)),
        ("vq8x1024:row:magnitude:rounds=0", Vector(8, 1024, True, "magnitude", 0)),
        ("gptq-vq2x16:row:damp=0.1:seed=1", Vector(2, 16, True, "calibrated", damping=0.1, seed=1)),
        ("vq8x256:shared", Vector(8, 256, scaled=True, shared=True)),
        ("gptq-vq8x256:row:seed=1:shared", Vector(8, 256, True, "calibrated", seed=1, shared=True)),
        ("aq2x8x256", Additive()),
        ("aq1x4x16:datafree:beam=1:rounds=0:seed=2", Additive(1, 4, 16, False, 1, 0, seed=2)),
        ("caldera:g64", parse("lowrank8:int4+gptq-int2:g64:search~10")),
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
        (EntropyCoded(Residual(Uniform(4, 16), Dense("float16"), 3)), "ec-int4:g16+fp16~3"),
        (Residual(Vector(), Residual(Additive(), Uniform(4))), "vq4x256+aq2x8x256+int4:g32"),
        (Sparse24(Uniform(4), "sparsegpt", sweeps=1), "sparse24-gptq-int4:g32:sweeps=1"),
        (Sparse(0.07, Uniform(8, None, True)), "sparse7%-int8:row"),
        (Sparse(0.1 + 0.2, Dense("float16"), "wanda"), "sparse30.000000000000004%-wanda-fp16"),
        (Sparse(1e-06, NormalFloat(4)), "sparse0.0001%-nf4:g64"),
        (
            Sparse(0.05, Vector()),
            '{"id":"sparse/1","share":0.05,"values":{"id":"vector/1","dimension":4,"entries":256,"scaled":false,'
            '"weighting":"equal","rounds":2,"damping":0.01,"seed":0},"importance":"magnitude"}',
        ),
        (LowRank(bpw=2.5, kind="plain"), "plain-lowrank:bpw=2.5:fp16"),
        (LowRank(32, factor=Uniform(8, None, True), norm_correction=True), "lowrank32:norm"),
        (Pattern(4, terms=2, base=0), "pattern4x224:terms=2:base=0"),
        (Vector(8, 16, True, "calibrated"), "gptq-vq8x16:row"),
        (Vector(8, 16, True, "magnitude", seed=2, shared=True), "vq8x16:shared:magnitude:seed=2"),
        (Additive(3, calibrated=False), "aq3x8x256:datafree"),
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
parts = st.sampled_from([Dense("float16"), Uniform(8, None, True), Uniform(4, 32), Uniform(4, 16), Dense("float32")])
dampings, counts = st.floats(1e-6, 1), st.integers(0, 100)
dimensions, entries = st.sampled_from([2, 4, 8, 16]), st.sampled_from([2**k for k in range(4, 17)])
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(["plain", "magnitude", "activation", "whitened"])
ranks = st.one_of(
    st.fixed_dictionaries({"rank": st.integers(1, 8192)}),
    st.fixed_dictionaries({"bpw": st.floats(1e-3, 64)}),
    st.fixed_dictionaries({"energy": st.floats(1e-6, 1)}),
    st.fixed_dictionaries({"error": st.floats(1e-4, 1)}),
)
nearest = st.one_of(
    st.builds(Uniform, st.integers(2, 8), groups, st.booleans(), st.booleans()),
    st.builds(NormalFloat, st.integers(2, 4), groups, st.sampled_from(["normal", "learned"])),
    st.builds(Dense, st.sampled_from(["float32", "bfloat16", "float16"])),
)
stages = st.one_of(
    stages,
    st.builds(Sparse24, nearest, st.sampled_from(["magnitude", "wanda", "sparsegpt"])),
    st.builds(Sparse24, nearest, st.just("sparsegpt"), dampings, counts),
    st.builds(Sparse, st.floats(1e-6, 0.5), nearest, st.sampled_from(["magnitude", "wanda"])),
    st.builds(
        lambda rank, kind, factor, damping, norm: LowRank(
            **rank, kind=kind, factor=factor, damping=damping, norm_correction=norm
        ),
        *(ranks, kinds, parts, st.floats(0, 1), st.booleans()),
    ),
    st.builds(
        Pattern,
        *(st.integers(2, 32), st.integers(1, 999), st.none() | st.integers(0, 8), st.integers(1, 8)),
        *(parts, st.booleans(), seeds),
    ),
    st.builds(
        Vector,
        *(dimensions, entries, st.booleans(), st.sampled_from(["equal", "magnitude", "calibrated"])),
        *(counts, dampings, seeds),
    ),
    st.builds(
        Additive,
        *(st.integers(1, 4), dimensions, entries, st.booleans(), st.integers(1, 64), counts, dampings, seeds),
    ),
)
exponents = st.none() | st.floats(0, 1)
codecs = st.recursive(
    stages,
    lambda inner: st.one_of(
        st.builds(Residual, inner, inner, st.integers(0, 20)),
        st.builds(ChannelScaled, inner, exponents),
        st.builds(Rotated, inner, seeds),
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
@given(codecs | prefixed | stages, st.booleans())
def test_format_round_trips(codec: Codec, coded: bool) -> None:
    if coded and codec.fields((1, 1)) is not None:
        codec = EntropyCoded(codec)
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
stage_text = st.builds(
    lambda prefix, heads, words, suffix: prefix + "+".join([*heads[:-1], ":".join([heads[-1], *words])]) + suffix,
    st.sampled_from(["", "ec-", "plain-", "gptq-"]),
    st.lists(
        st.sampled_from(
            [
                *("sparse24-int4", "sparse24-gptq-fp16", "sparse5%-int4", "sparse100%-wanda-fp16", "sparse0.0%-nf4"),
                *("lowrank", "lowrank4", "pattern4x2", "vq4x16", "aq1x8x32", "int4"),
            ]
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(
        st.sampled_from(
            [
                "g32",
                "row",
                "bpw=2",
                "error=1",
                "damp=0.1",
                "int4",
                "fp16",
                "norm",
                "terms=2",
                "base=",
                "scales=int8",
                "magnitude",
                "rounds=1",
                "seed=3",
                "datafree",
                "beam=2",
                "calibrated",
                "sweeps=1",
            ]
        ),
        max_size=3,
    ),
    st.sampled_from(["", "~", "~3", "~x", "~99"]),
)
preset_text = st.builds(lambda name, words: ":".join([name, *words]), st.sampled_from(sorted(PRESETS)), option_words)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(
    st.text(max_size=30)
    | st.text(alphabet='intfgrow0123456789:+{}" -', max_size=20)
    | prefix_text
    | preset_text
    | trellis_text
    | stage_text
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
        ("trellis:0.01:0.02", "'0.02' is not an option", "datafree, states=, rate=, damp="),
        ("trellis:0.01:states", "'states' is not an option", "states="),
        ("trellis:0.01:states=", "states is a count", "states="),
        ("trellis:0.01:states=many", "states is a count", "states="),
        ("trellis:0.01:g32", "'g32' is not an option", "datafree, states=, rate=, damp="),
        ("trellis:0.01:datafree=1", "'datafree=1' is not an option", "datafree"),
        ("trellis:0.01:datafree:datafree", "datafree more than once", "one of them"),
        ("trellis:0.01:damp=0.1:damp=0.1", "damp more than once", "one of them"),
        ("int4+trellis:0.01:rate", "'rate' is not an option here, in recipe 'int4\\+trellis", "rate="),
        ("trellis:0", "step must be a number from 1e-12 to 1e\\+06, got 0.0", "1e-12"),
        ("trellis:nan", "is not trellis:STEP", "trellis:0.001"),
        ("trellis:inf", "step must be a number", "1e-12"),
        ("trellis:-0.1", "step must be a number", "1e-12"),
        ("trellis:0.01:states=3", "states must be one of 1, 4, 8, 16, 32, 64, 128, 256", "256"),
        ("trellis:0.01:states=8.5", "states is a count", "states=2"),
        ("trellis:0.01:states=inf", "states is a count", "states=2"),
        ("trellis:0.01:rate=3", "rate_weight must be a number from 0 to 2, got 3", "0 to 2"),
        ("trellis:0.01:damp=0", "damping must be a number from 1e-06 to 1", "1e-06"),
        ("gptq-trellis:0.01", "'gptq-trellis:0.01' is not a recipe", "did you mean trellis:0.001"),
        ("treliss:0.01", "'treliss:0.01' is not a recipe", "did you mean trellis:0.001"),
        ("int4:g32:row", "more than once", "one of them"),
        ("int4:search:search", "more than once", "one of them"),
        ("int4+", "'' in recipe 'int4\\+' is not a recipe", "int4:g32"),
        ("int4+dense", "cannot be coded or added", "bf16"),
        ("fp16:g32", "'g32' is not an option", "there are none"),
        ("ec-", "'' in recipe 'ec-' is not a recipe", "int4:g32"),
        ("ec-dense", "cannot be coded or added", "bf16"),
        ("ec-trellis:0.01", "inner must have a fixed rate", "as it is"),
        ("int4+ec-int2", "'ec-' codes a whole recipe", "did you mean ec-int4+int2?"),
        ("ec-ec-int4", "'ec-' codes a whole recipe", "did you mean ec-int4?"),
        ("int4~3", "has one stage", "int4:g16+int2:g16~3"),
        ("int4~3+int2", "followed by a count", "int4:g16+int2:g16~3"),
        ("int4+int2~", "followed by a count", "int4:g16+int2:g16~3"),
        ("int4+int2~21", "iterations must be an integer from 0 to 20, got 21", "0 to 20"),
        ("sparse24-gptq-int4:actorder", "'actorder' is not an option", "sweeps="),
        ("sparse24-int4:damp=0.1", "needs a sparse24-gptq- stage", "search"),
        ("sparse24-fp16:g32", "'g32' is not an option", "there are none"),
        ("sparse24-wanda-int9", "bits must be an integer from 2 to 8", "2 to 8"),
        ("sparse-int4", "'sparse-int4' is not a recipe", "sparse24-int4"),
        ("sparse5-int8", "'sparse5-int8' is not a recipe", "sparse5%-int8"),
        ("sparse60%-int8", "share must be a number from 1e-06 to 0.5, got 0.6", "1e-06 to 0.5"),
        ("sparse0%-int8", "share must be a number from 1e-06 to 0.5, got 0.0", "1e-06 to 0.5"),
        ("sparse5%-int9", "bits must be an integer from 2 to 8", "2 to 8"),
        ("sparse5%-gptq-int8", "'sparse5%-gptq-int8' is not a recipe", "sparse5%-int8"),
        ("sparse5%-int8:damp=0.1", "'damp=0.1' is not an option", "search"),
        ("sparse5%-fp16:row", "'row' is not an option", "there are none"),
        ("lowrank", "exactly one of a rank, bpw=, energy= and error=", "lowrank:bpw=2"),
        ("lowrank8:bpw=2", "exactly one of a rank, bpw=, energy= and error=", "lowrank32"),
        ("lowrank0", "rank must be an integer from 1 to 8192, got 0", "1 to 8192"),
        ("lowrank8:int4:fp16", "both fp16 and int4", "one of them"),
        ("lowrank8:int3", "'int3' is not an option", "did you mean 'int"),
        ("lowrnk8", "'lowrnk8' is not a recipe", "lowrank32"),
        ("low-lowrank8", "'low-lowrank8' is not a recipe", "lowrank32"),
        ("pattern4:scales=int3", "'int3' is no codec for scales", "int4"),
        ("pattern1", "size must be an integer from 2 to 32, got 1", "2 to 32"),
        ("pattern4:term=2", "'term=2' is not an option", "'terms='"),
        ("vq3x256", "dimension must be one of 2, 4, 8, 16", "2, 4, 8, 16"),
        ("gptq-vq4x256:magnitude", "both gptq- and magnitude", "one of them"),
        ("vq4", "'vq4' is not a recipe", "vq4x256"),
        ("aq9x8x256", "books must be an integer from 1 to 4, got 9", "1 to 4"),
        ("aq2x8x256:beam=wide", "beam is a count", "beam=2"),
        ("pq:g64", "the preset 'pq' has no groups", "vq8x256"),
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


GROUPED = [name for name, preset in PRESETS.items() if re.search(r":(g\d+|row)", preset.recipe)]


@pytest.mark.parametrize("name", GROUPED)
def test_a_preset_takes_another_group(name: str) -> None:
    recipe = format(parse(f"{name}:g72"))
    assert recipe == re.sub(r":(g\d+|row)", ":g72", PRESETS[name].recipe)
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
        ("pq", 1.125),
        ("pocketllm-v1", 6.125),
        ("pocketllm-v2", 8.0625),
        ("sparse24-int4", 2.125 + 0.6484375),
        ("vq-calibrated", 2.0625),
        ("aqlm", 2.265625),
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
