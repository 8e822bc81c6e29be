"""``vector/1``: one code for several neighbouring weights of a row, an index into a codebook per tensor.

Formula (exact in FP32)::

    w = scale[row]·codebook[code]            or w = codebook[code] where rows have no scale

Bytes, V = ceil(in/dimension) vectors per row, the last one cut off at the row's end::

    scales    FP16  [out]                           only where ``scaled``
    codebook  FP16  [entries, dimension]
    codes     uint8 [out, ceil(V·log2(entries)/8)]  packed, see tenpak.kernels.packing

Bits per weight: ``log2(entries)/dimension`` where the dimension divides the row, ``+ 16/in`` for scales, and
``16·entries·dimension`` bits per tensor, which small tensors cannot afford: 256 entries of 8 weights are 4 KiB. Against
scalar codes of equal rate a codebook gains by the shape of its cells and by following how the weights are distributed,
and rates between and below whole bits exist at all. Above three bits it grows too large for its gain, and too slow.

``weighting="calibrated"`` chooses codes with feedback of errors through the full Hessian, and solves for the codebook
under it (see ``codebook_fit``). Else codebooks are plain k-means (vector quantization: Gray 1984; of weights: Gong et
al. 2014, arXiv 1412.6115), where all vectors count the same, or as much as they are long (``"magnitude"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.codebook_fit import Plan, fit
from tenpak.codecs.codebooks import DIMENSIONS, ENTRIES, expand, packed, vector_count
from tenpak.codecs.fields_tuning import TunableFields
from tenpak.codecs.grouping import row_tiles
from tenpak.codecs.validation import require_bool, require_choice, require_integer, require_number
from tenpak.errors import MissingStatisticsError
from tenpak.kernels import packed_size, unpack
from tenpak.kernels.parallel import one_thread

__all__ = ["Vector"]


@dataclass(frozen=True)
class Vector(Codec):
    """Vector quantization.

    Attributes:
        dimension: weights per vector: 2, 4, 8 or 16.
        entries: of the codebook: a power of two, 16 to 65,536.
        scaled: one scale per row, its root mean square at first; vectors of all rows are then of one size.
        weighting: what counts: ``"equal"``, ``"magnitude"`` or, with statistics, ``"calibrated"``.
        rounds: of codebook, scales and codes after the first codes, 0 to 100; each lowers the loss.
        damping: of the Hessian, relative to its mean diagonal; 1e-6 to 1.
        seed: of k-means, 0 to 2^32 - 1.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "vector/1"

    dimension: int = 4
    entries: int = 256
    scaled: bool = False
    weighting: str = "equal"
    rounds: int = 2
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice(self.id, "dimension", self.dimension, DIMENSIONS)
        require_choice(self.id, "entries", self.entries, ENTRIES)
        require_bool(self.id, "scaled", self.scaled)
        require_choice(self.id, "weighting", self.weighting, ("equal", "magnitude", "calibrated"))
        require_integer(self.id, "rounds", self.rounds, 0, 100)
        require_number(self.id, "damping", self.damping, 1e-6, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_integer(self.id, "seed", self.seed, 0, (1 << 32) - 1)

    @property
    def needs_statistics(self) -> bool:
        """Whether it is calibrated."""
        return self.weighting == "calibrated"

    @property
    def uses_curvature(self) -> bool:
        """Whether it is calibrated."""
        return self.weighting == "calibrated"

    @property
    def _bits(self) -> int:
        """Of a code."""
        return self.entries.bit_length() - 1

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """Scales where rows have them, codebook, codes."""
        rows, columns = shape
        count = vector_count(columns, self.dimension)
        return (
            *((Field("scales", torch.float16, (rows,)),) if self.scaled else ()),
            Field("codebook", torch.float16, (self.entries, self.dimension)),
            Field("codes", torch.uint8, (rows, packed_size(count, self._bits))),
        )

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Encode ``weight``, a finite floating-point matrix ``[out, in]``; on the CPU, in one thread.

        Beyond the weight it takes an FP32 copy and, calibrated, some six FP32 copies of the Hessian.

        Raises:
            MissingStatisticsError: it is calibrated and there is no Hessian.
            CodecError: the weight is not a finite floating-point matrix, exceeds FP16's range, or the statistics do
                not fit it.
            SingularHessianError: the Hessian is indefinite.
        """
        require_matrix(weight)
        if self.needs_statistics and (statistics is None or statistics.metric is None):
            raise MissingStatisticsError(
                f"codec {self.id} needs the Hessian E[x xᵀ] of the weight's inputs, and there is none",
                hint='calibrate on text (--calibration TEXT), or choose the weighting "equal"',
            )
        plan = Plan(self.dimension, self.entries, 1, self.scaled, 1, self.rounds, self.seed)
        known = statistics if self.needs_statistics else None
        with one_thread():
            target = weight.detach().to("cpu").float().contiguous()
            fitted = fit(target, plan, self.damping, known, self.weighting == "magnitude")
            codes = packed(fitted.codes.squeeze(-1), self._bits)
        tensors = {"scales": fitted.scales} if self.scaled else {}
        tensors |= {"codebook": fitted.codebooks[0].clone(), "codes": codes}
        return self.payload(weight, {name: tensor.to(weight.device) for name, tensor in tensors.items()})

    def decode(self, payload: Payload) -> Tensor:
        """The reconstructed weight, FP32 ``[out, in]``."""
        tensors = self.checked(payload)
        weight = torch.empty(payload.shape, dtype=torch.float32, device=tensors["codes"].device)
        for tile in row_tiles(*payload.shape):
            scales = tensors["scales"][tile] if self.scaled else None
            self._expand(tensors["codes"][tile], scales, tensors["codebook"], weight[tile])
        return weight

    def rows(self, indices: Tensor, prepared: Payload) -> Tensor:
        """Rows ``indices`` of the decoded weight, FP32 ``[*indices.shape, in]``; only they are decoded."""
        tensors = self.checked(prepared)
        flat = indices.reshape(-1)
        weight = torch.empty((flat.numel(), prepared.shape[1]), dtype=torch.float32, device=tensors["codes"].device)
        scales = tensors["scales"][flat] if self.scaled else None
        self._expand(tensors["codes"][flat], scales, tensors["codebook"], weight)
        return weight.view(*indices.shape, prepared.shape[1])

    def tunable(self, payload: Payload) -> TunableFields:
        """The codebook is continuous, and scales where rows have them."""
        tensors, (rows, columns) = self.checked(payload), payload.shape
        codes = unpack(tensors["codes"], self._bits, vector_count(columns, self.dimension)).int()

        def weight(values: Mapping[str, Tensor]) -> Tensor:
            vectors = values["codebook"].index_select(0, codes.flatten()).view(rows, -1)[:, :columns]
            return vectors * values["scales"].unsqueeze(1) if self.scaled else vectors

        units = {"scales": tensors["scales"].float().abs()} if self.scaled else {}
        return TunableFields(payload, {**units, "codebook": tensors["codebook"].float().square().mean().sqrt()}, weight)

    def _expand(self, stream: Tensor, scales: Tensor | None, codebook: Tensor, out: Tensor) -> None:
        """Decode rows into ``out``, FP32 ``[rows, in]``."""
        rows, columns = out.shape
        count = vector_count(columns, self.dimension)
        codes = unpack(stream, self._bits, count).unsqueeze(-1)
        out.copy_(expand(codes, [codebook.float()]).view(rows, count * self.dimension)[:, :columns])
        if scales is not None:
            out.mul_(scales.float().unsqueeze(1))
