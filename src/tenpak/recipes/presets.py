"""Recipes with names: what users of the older systems know, and what the literature does."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A recipe with a name.

    Attributes:
        recipe: the recipe string it stands for.
        description: one line for lists.
    """

    recipe: str
    description: str


PRESETS: dict[str, Preset] = {
    "int4-g8": Preset("int4:g8", "4 bits, FP16 scale and offset for every 8 weights: closest of the int4 family"),
    "int4-g16": Preset("int4:g16", "4 bits, scale and offset for every 16 weights"),
    "int4-g32": Preset("int4:g32", "4 bits, scale and offset for every 32 weights: the default"),
    "int4-g64": Preset("int4:g64", "4 bits, scale and offset for every 64 weights"),
    "int4-g128": Preset("int4:g128", "4 bits, scale and offset for every 128 weights: smallest of the int4 family"),
    "int4-opt": Preset("int4:g16:search", "int4-g16 with scale and offset refined to the least squared error"),
    "int4-residual": Preset("int4:g16+int2:g16", "int4-g16, and 2 bits on what it leaves"),
    "int3-g32": Preset("int3:g32", "3 bits, scale and offset for every 32 weights"),
    "nf3": Preset("nf3:g64", "3 bits on normal quantiles, one scale for every 64 weights"),
    "nf4": Preset("nf4:g64", "4 bits on normal quantiles, one scale for every 64 weights (as in QLoRA)"),
    "nf3-learned": Preset("nf3:g64:learned", "nf3 with levels learned for each tensor (Lloyd-Max)"),
    "nf4-learned": Preset("nf4:g64:learned", "nf4 with levels learned for each tensor (Lloyd-Max)"),
    "gptq-int4": Preset("gptq-int4:g128", "int4-g128 that makes up for rounding errors (GPTQ); needs calibration"),
    "gptq-int3": Preset("gptq-int3:g128", "3 bits, scale and offset for every 128 weights, GPTQ; needs calibration"),
    "gptq-style": Preset(
        "gptq-int4:g128", "gptq-int4 by another name: errors of a column are made up for by later ones"
    ),
    "awq-int4": Preset("awq-int4:g128", "int4-g128, channels scaled by activity, exponent searched; needs calibration"),
    "int4-calibrated": Preset("awq-int4:g128:exp=0.5", "int4-g128, channels scaled by activity^0.5; needs calibration"),
    "int3-calibrated": Preset("awq-int3:g128:exp=0.5", "3 bits, channels scaled by activity^0.5; needs calibration"),
    "spin-int4": Preset("spin-int4:g128", "int4-g128 of inputs rotated by random signs and a Hadamard matrix"),
    "int8": Preset("int8:row", "8 bits, one symmetric scale per row: what embeddings and heads take by default"),
    "sparse24-int4": Preset("sparse24-int4:g128", "two of every four weights by magnitude, these in int4-g128"),
    "sparse24-gptq-int4": Preset(
        "sparse24-gptq-int4:g128",
        "two of every four weights, the others making up for them (SparseGPT); needs calibration",
    ),
    "pq": Preset("vq8x256", "a codebook of 256 for every 8 weights, plain k-means: 1 bit, a baseline"),
    "pq-residual": Preset("vq8x256+int4:g16", "pq, and int4-g16 on what it leaves"),
    "pocketllm-v1": Preset("vq8x256+int4:g32", "pq, and int4-g32 on what it leaves"),
    "pocketllm-v2": Preset("vq4x256+int4:g16:search~3", "vectors of 4 and int4-g16, refined in turn"),
    "vq-calibrated": Preset(
        "gptq-vq4x256", "2 bits: a codebook of 256 for every 4 weights with feedback of errors; needs calibration"
    ),
    "aqlm": Preset("aq2x8x256", "2 bits: sums of two codebooks of 256 for every 8 weights (AQLM); needs calibration"),
    "aqlm-1": Preset("aq1x8x256", "1 bit: one codebook of 256 for every 8 weights, scaled; needs calibration"),
    "caldera": Preset(
        "lowrank8:int4+gptq-int2:g128:search~10",
        "rank 8 and 2 bits, refined in turn (CALDERA): below 3 bits; needs calibration",
    ),
    "caldera-aqlm": Preset("lowrank8:int4+aq2x8x256~3", "caldera with two codebooks for its 2 bits; needs calibration"),
    "tenpak-x": Preset(
        "mag-lowrank32:fp16+vq4x256:magnitude+int4:g32",
        "rank 32 and a codebook, both weighted by magnitude, and int4-g32 on what they leave",
    ),
    "tenpak-x-v2": Preset(
        "mag-lowrank64:fp16+vq4x256:magnitude",
        "tenpak-x of rank 64 without the last stage: much worse, and smaller only for large matrices",
    ),
    "tenpak-x-v2-sparse25": Preset(
        "mag-lowrank64:fp16+vq4x256:magnitude+sparse25%-int8:row",
        "tenpak-x-v2, and a quarter of what it leaves in INT8",
    ),
    "tenpak-x-v2-sparse5": Preset(
        "mag-lowrank64:fp16+vq4x256:magnitude+sparse5%-int8:row",
        "tenpak-x-v2, and a twentieth of what it leaves in INT8",
    ),
    "svd": Preset("plain-lowrank:bpw=8.0:fp16", "the truncated SVD in 8 bits per weight: a baseline"),
    "svd-calibrated": Preset(
        "act-lowrank:bpw=6.4:fp16", "the truncated SVD weighted by activations, 6.4 bits per weight; needs calibration"
    ),
    "svd-int8": Preset(
        "plain-lowrank128:norm", "rank 128, INT8 factors, norm restored: for K projections of large models, by --set"
    ),
    "lowrank-calibrated": Preset(
        "lowrank:error=0.1:int4", "the least rank whose output is 10 % off, INT4 factors; needs calibration"
    ),
    "pixel": Preset("pattern4x224:terms=2", "4x4 blocks as sums of two patterns, made and found: a baseline"),
    "pixel-residual": Preset("pattern4x0+int3:g32", "4x4 blocks as made patterns, and int3-g32 on what they leave"),
    "pixel-svd": Preset(
        "plain-lowrank:energy=0.5:fp16+pattern4x224", "half of the energy by the SVD, patterns on what it leaves"
    ),
}
