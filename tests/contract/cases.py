"""Example configurations of every registered codec: the one table that a new codec adds to.

``rms`` bounds the relative root mean square error on normal weights. A uniform grid of ``2^bits - 1`` steps over at
most 6.6 standard deviations (256 normal values span 5.6 on average) has a rounding error of step/√12. For normalfloat,
sums and codebooks it is about 1.3 times what was measured. A trellis leaves about √(step²/5), a little more where it
saves bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenpak.codecs import registry
from tenpak.codecs.base import Codec, Payload, Statistics


@dataclass(frozen=True)
class Case:
    """A configuration, the limit of its error, and whether encoding is the same on every machine.

    ``portable`` is False where the encoder iterates on floating-point sums, whose last bit depends on the width of the
    machine's vectors: searches and learned levels. Decoding is exact everywhere. ``calibrated`` cases need statistics
    to encode; ``encode`` gives them some. ``constants`` is False where
    a constant row does not stay one on its way to the grid. ``absolute`` is True where the size of the error is set in
    units of the loss, whatever the size of the weight. ``apart`` is False where rows are encoded together, or by what
    is learned from all of them; ``height`` is how many rows a block has.
    """

    name: str
    config: dict[str, Any]
    rms: float
    portable: bool = True
    calibrated: bool = False
    constants: bool = True
    absolute: bool = False
    apart: bool = True
    height: int = 1

    @property
    def codec(self) -> Codec:
        return registry.from_json(self.config)

    def encode(self, weight: Tensor) -> Payload:
        return self.codec.encode(weight, correlated(weight.shape[1]) if self.calibrated else None)


def correlated(columns: int) -> Statistics:
    """Inputs of uneven power whose neighbours correlate by a half: a Hessian [in, in] of condition number below 40."""
    index = torch.arange(columns)
    power = 1 + 0.5 * torch.sin(index * 1.7)
    return Statistics(hessian=0.5 ** (index[:, None] - index).abs() * power[:, None] * power)


def _uniform(name: str, bits: int, group: int | None, symmetric: bool = False, search: bool = False) -> Case:
    config = {"id": "uniform/1", "bits": bits, "group": group, "symmetric": symmetric, "search": search}
    # One scale per row of up to a few hundred weights, or the shorter side of a symmetric grid, costs some more.
    return Case(name, config, 6.6 / 12**0.5 / (2**bits - 1) * (1.2 if symmetric else 1.0), portable=not search)


def _normalfloat(name: str, bits: int, group: int | None, levels: str, rms: float) -> Case:
    config = {"id": "normalfloat/1", "bits": bits, "group": group, "levels": levels}
    return Case(name, config, rms, portable=levels == "normal", apart=levels == "normal")


def _gptq(case: Case, **options: Any) -> Case:
    """The case with ``gptq``, whose error in the weight itself is larger: it keeps that of the output small."""
    rounding = {"name": "gptq", "damping": 0.01, "order": "natural", "sweeps": 0, **options}
    name = "-".join([case.name, "gptq", *(str(value) for value in options.values())])
    config = {**case.config, "rounding": rounding}
    return replace(case, name=name, config=config, rms=1.4 * case.rms, portable=False, calibrated=True)


def _channelscaled(case: Case, exponent: float | None) -> Case:
    """The case with scaled channels. The weight's error is larger: inputs of little power carry more of it."""
    config = {"id": "channelscaled/1", "inner": case.config, "exponent": exponent}
    name = f"{case.name}-{'searched' if exponent is None else exponent}"
    rms = 1.6 * case.rms
    return replace(case, name=name, config=config, rms=rms, portable=False, calibrated=True, constants=False)


def _rotated(case: Case, seed: int) -> Case:
    """The case with rotated inputs: what is normal stays so."""
    config = {"id": "rotated/1", "inner": case.config, "seed": seed}
    return replace(case, name=f"{case.name}-{seed}", config=config, constants=False)


def _entropycoded(case: Case) -> Case:
    """The case with its payload coded: what it decodes to is the same."""
    return replace(case, config={"id": "entropycoded/1", "inner": case.config})


def _sparse24(values: Case, importance: str, sweeps: int = 4) -> Case:
    """Two of four normal weights hold 0.868 of their squares; compensated, the weight itself is further off."""
    config = {"id": "sparse24/1", "values": values.config, "importance": importance, "damping": 0.01, "sweeps": sweeps}
    calibrated = importance != "magnitude"
    rms = 0.5 + values.rms if importance == "sparsegpt" else 0.39 + values.rms
    portable = values.portable and not calibrated
    name = f"{values.name}-{importance}-{sweeps}"
    return Case(name, config, rms, portable, calibrated, constants=False, apart=values.apart)


def _sparse(share: float, values: Case, importance: str, left: float) -> Case:
    """``left`` is the norm of the weights that are not kept, of normal ones, and a little."""
    config = {"id": "sparse/1", "share": share, "values": values.config, "importance": importance}
    calibrated = importance != "magnitude"
    name = f"{share}-{values.name}-{importance}"
    portable = values.portable and not calibrated
    return Case(name, config, left + values.rms, portable, calibrated, constants=False, apart=values.apart)


def _pattern(size: int, learned: int, terms: int, rms: float, scales: Case, **options: Any) -> Case:
    """Normal weights have no structure to find: at least one weight of a block is kept, and little more."""
    config = {"id": "pattern/1", "size": size, "learned": learned, "base": None, "terms": terms}
    config |= {"scales": scales.config, "calibrated": False, "seed": 0, **options}
    name = "-".join([f"{size}x{size}", f"{learned}", f"{terms}", scales.name, *map(str, options.values())])
    calibrated = bool(options.get("calibrated"))
    return Case(name, config, rms, False, calibrated, constants=terms == 1, apart=False, height=size)


def _trellis(step: float, states: int, calibrated: bool, **options: float) -> Case:
    """Calibrated the weight's error is larger: inputs of little power carry more of it.

    What a level costs, which its choice depends on, is fitted to the whole weight.
    """
    config = {"id": "trellis/1", "step": step, "states": states, "calibrated": calibrated}
    config |= {"rate_weight": 0.3, "damping": 0.01, **options}
    name = "-".join(["calibrated" if calibrated else "datafree", f"{states}", f"{step}", *map(str, options.values())])
    rms = step / 0.02 * (0.3 if states == 1 else 0.55) * (1.7 if calibrated else 1)
    return Case(name, config, rms, not calibrated, calibrated, constants=False, absolute=True, apart=False)


def _lowrank(name: str, rms: float, factor: dict[str, Any], *, calibrated: bool = False, **options: Any) -> Case:
    """Normal weights have no low rank: what is left of one of rank r is a share of its energy."""
    config = {"id": "lowrank/1", "kind": "plain", "factor": factor, "damping": 0.01, **options}
    return Case(name, config, rms, False, calibrated, constants=factor["id"] == "dense/1", apart=False)


def _vector(
    dimension: int, entries: int, scaled: bool, weighting: str, rms: float, rounds: int = 2, shared: bool = False
) -> Case:
    config = {"id": "vector/1", "dimension": dimension, "entries": entries, "scaled": scaled, "weighting": weighting}
    config |= {"rounds": rounds, "damping": 0.01, "seed": 0, **({"shared": True} if shared else {})}
    name = f"{dimension}x{entries}{'-scaled' * scaled}{'-shared' * shared}-{weighting}"
    return Case(name, config, rms, portable=False, calibrated=weighting == "calibrated", apart=False)


def _additive(books: int, dimension: int, entries: int, calibrated: bool, rms: float, beam: int = 4) -> Case:
    config = {"id": "additive/1", "books": books, "dimension": dimension, "entries": entries, "calibrated": calibrated}
    config |= {"beam": beam, "rounds": 3, "damping": 0.01, "seed": 1}
    name = f"{books}x{dimension}x{entries}-{'calibrated' if calibrated else 'datafree'}"
    return Case(name, config, rms, portable=False, calibrated=calibrated, apart=False)


_INT4 = {"id": "uniform/1", "bits": 4, "group": 16, "symmetric": False, "search": False}
_INT2 = {**_INT4, "bits": 2}
_GPTQ = {"name": "gptq", "damping": 0.01, "order": "natural", "sweeps": 0}
_NF4 = {"id": "normalfloat/1", "bits": 4, "group": 16, "levels": "learned"}
_INT8 = {"id": "uniform/1", "bits": 8, "group": None, "symmetric": True, "search": False}
_FP32 = {"id": "dense/1", "dtype": "float32"}
_LOW = {"id": "lowrank/1", "rank": 3, "kind": "whitened", "factor": _INT8, "damping": 0.01}

_FP16 = Case("float16", {"id": "dense/1", "dtype": "float16"}, 2**-11)
_SUM = Case("int4+int2", {"id": "residual/1", "base": _INT4, "rest": _INT2}, 0.027)

CASES: dict[str, tuple[Case, ...]] = {
    "additive/1": (
        _additive(1, 8, 128, False, 0.75),
        _additive(2, 8, 64, True, 0.65),
        _additive(3, 4, 32, False, 0.14),
        _additive(4, 4, 16, True, 0.25, beam=1),
    ),
    "channelscaled/1": (
        _channelscaled(_uniform("int4-g32", 4, 32), None),
        _channelscaled(_uniform("int3-g128-sym", 3, 128, symmetric=True), 0.5),
        _channelscaled(_gptq(_normalfloat("nf4-row-learned", 4, None, "learned", 0.12)), 0.25),
        _channelscaled(_rotated(_SUM, 1), None),
    ),
    "dense/1": (
        Case("float32", {"id": "dense/1", "dtype": "float32"}, 0.0),
        Case("bfloat16", {"id": "dense/1", "dtype": "bfloat16"}, 2**-8),
        _FP16,
    ),
    "entropycoded/1": (
        _entropycoded(_uniform("int4-g32", 4, 32)),
        _entropycoded(_uniform("int8-row-sym", 8, None, symmetric=True)),
        _entropycoded(_gptq(_uniform("int3-g9-sym", 3, 9, symmetric=True), order="activation", sweeps=1)),
        _entropycoded(_normalfloat("nf2-g8-learned", 2, 8, "learned", 0.52)),
        _entropycoded(_channelscaled(_rotated(_SUM, 1), 0.5)),
        _entropycoded(Case("bfloat16", {"id": "dense/1", "dtype": "bfloat16"}, 2**-8)),
    ),
    "lowrank/1": (
        _lowrank("plain-full-float32", 1e-5, _FP32, rank=64),
        _lowrank("magnitude-5-float16", 0.95, _FP16.config, rank=5, kind="magnitude"),
        _lowrank("energy-int8", 0.35, _INT8, energy=0.9),
        _lowrank("activation-10bpw-float16", 0.85, _FP16.config, bpw=10.0, kind="activation", calibrated=True),
        _lowrank("error-int4", 0.5, _INT4, error=0.3, kind="whitened", calibrated=True),
        _lowrank(
            "whitened-12-gptq-normed",
            1.2,
            {**_INT4, "rounding": _GPTQ},
            rank=12,
            kind="whitened",
            norm_correction=True,
            calibrated=True,
        ),
    ),
    "normalfloat/1": (
        _normalfloat("nf2-g8", 2, 8, "normal", 0.52),
        _normalfloat("nf3-g32-learned", 3, 32, "learned", 0.22),
        _normalfloat("nf4-g64", 4, 64, "normal", 0.12),
        _normalfloat("nf4-row-learned", 4, None, "learned", 0.12),
        _gptq(_normalfloat("nf4-g64-learned", 4, 64, "learned", 0.12)),
    ),
    "pattern/1": (
        _pattern(4, 0, 1, 0.9, _FP16),
        _pattern(4, 20, 1, 0.85, _FP16, seed=3),
        _pattern(2, 16, 2, 0.4, _uniform("int8-row-sym", 8, None, symmetric=True)),
        _pattern(8, 4, 3, 0.92, _FP16, base=100, calibrated=True),
        _pattern(5, 300, 2, 0.8, _FP16, base=0),
    ),
    "residual/1": (
        _SUM,
        Case(
            "int2+nf4+int2",
            {"id": "residual/1", "base": _INT2, "rest": {"id": "residual/1", "base": _NF4, "rest": _INT2}},
            0.009,
            portable=False,
            apart=False,
        ),
        Case(
            "int4+int2-gptq",
            {"id": "residual/1", "base": {**_INT4, "rounding": _GPTQ}, "rest": {**_INT2, "rounding": _GPTQ}},
            0.04,
            portable=False,
            calibrated=True,
        ),
        Case(
            "caldera",
            {"id": "residual/1", "base": _LOW, "rest": {**_INT2, "rounding": _GPTQ}, "iterations": 3},
            0.6,
            portable=False,
            calibrated=True,
            constants=False,
            apart=False,
        ),
    ),
    "rotated/1": (
        _rotated(_uniform("int4-g32", 4, 32), 0),
        _rotated(_normalfloat("nf3-g64", 3, 64, "normal", 0.22), 7),
        _rotated(_gptq(_uniform("int4-g128", 4, 128)), 1),
        _rotated(_channelscaled(_rotated(_uniform("int5-row", 5, None), 2), 0.5), 3),
    ),
    "sparse/1": (
        _sparse(0.25, _FP16, "magnitude", 0.54),
        _sparse(0.05, _uniform("int8-row-sym", 8, None, symmetric=True), "magnitude", 0.87),
        _sparse(0.3, _uniform("int4-g32", 4, 32), "wanda", 0.52),
        _sparse(0.5, _normalfloat("nf4-g64-learned", 4, 64, "learned", 0.12), "wanda", 0.32),
        _sparse(0.1, _SUM, "magnitude", 0.77),
        _sparse(1e-6, Case("float32", _FP32, 0.0), "magnitude", 1.0),
    ),
    "sparse24/1": (
        _sparse24(_FP16, "magnitude"),
        _sparse24(_uniform("int4-g32", 4, 32), "wanda"),
        _sparse24(_FP16, "sparsegpt"),
        _sparse24(_uniform("int8-row-sym", 8, None, symmetric=True), "sparsegpt", sweeps=0),
        _sparse24(_uniform("int3-g9", 3, 9), "sparsegpt"),
        _sparse24(_normalfloat("nf4-g64-learned", 4, 64, "learned", 0.12), "sparsegpt", sweeps=1),
        _sparse24(_SUM, "magnitude"),
    ),
    "trellis/1": (
        _trellis(0.012, 1, calibrated=False),
        _trellis(0.004, 8, calibrated=False, rate_weight=0.0),
        _trellis(0.004, 256, calibrated=False),
        _trellis(0.004, 1, calibrated=True),
        _trellis(0.012, 8, calibrated=True, rate_weight=0.5, damping=0.1),
        _trellis(0.012, 256, calibrated=True),
    ),
    "uniform/1": (
        _uniform("int2-g8-search", 2, 8, search=True),
        _uniform("int3-g32", 3, 32),
        _uniform("int4-g32", 4, 32),
        _uniform("int4-g128-sym-search", 4, 128, symmetric=True, search=True),
        _uniform("int5-g9", 5, 9),
        _uniform("int6-row", 6, None),
        _uniform("int7-g256-sym", 7, 256, symmetric=True),
        _uniform("int8-row-sym", 8, None, symmetric=True),
        _gptq(_uniform("int4-g32", 4, 32)),
        _gptq(_uniform("int3-g9-sym", 3, 9, symmetric=True), order="activation", sweeps=1),
    ),
    "vector/1": (
        _vector(4, 256, False, "equal", 0.4),
        _vector(8, 16, True, "magnitude", 0.9, rounds=0),
        _vector(2, 512, False, "calibrated", 0.1),
        _vector(16, 64, True, "calibrated", 0.9),
        _vector(4, 64, True, "equal", 0.6, shared=True),
        _vector(8, 16, True, "calibrated", 0.95, shared=True),
    ),
}


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal weights of standard deviation 0.02, FP32 ``[rows, columns]``."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def golden_weight() -> Tensor:
    """The weight of the golden files, FP32 ``[6, 45]``: no group divides it; a zero, a constant and an outlier row."""
    index = torch.arange(6 * 45)
    # Integers, so that it does not depend on a generator: a scramble of -500 … 500 in 1/8192.
    weight = (((index * 7919 + index * index * 31) % 1001) - 500).float().view(6, 45) / 8192
    weight[1] = 0
    weight[2] = 0.25
    weight[3, 7] = 3.0
    return weight
