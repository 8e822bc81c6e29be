"""``vector/1``: one code for several neighbouring weights of a row, an index into a codebook.

Formula (exact in FP32)::

    w = scale[row]·codebook[code]            or w = codebook[code] where rows have no scale

Bytes, V = ceil(in/dimension) vectors per row, the last one cut off at the row's end::

    scales    FP16  [out]                           only where ``scaled``
    codebook  FP16  [entries, dimension]            of the tensor, or shared by many
    codes     uint8 [out, ceil(V·log2(entries)/8)]  packed, see tenpak.kernels.packing

Bits per weight: ``log2(entries)/dimension`` where the dimension divides the row, ``+ 16/in`` for scales, and
``16·entries·dimension`` bits per tensor, which small tensors cannot afford: 256 entries of 8 weights are 4 KiB. Against
scalar codes of equal rate a codebook gains by the shape of its cells and by following how the weights are distributed,
and rates between and below whole bits exist at all. Above three bits it grows too large for its gain, and too slow.

``shared``: one codebook for all tensors of a plan that have exactly this codec, stored once. It is plain k-means on
their weights, rows divided by their root mean squares, and stays as it is while codes and scales are chosen: it follows
no tensor's own distribution or Hessian, which is what its bytes are traded for.

``weighting="calibrated"`` chooses codes with feedback of errors through the full Hessian, and solves for the codebook
under it (see ``codebook_fit``). Else codebooks are plain k-means (vector quantization: Gray 1984; of weights: Gong et
al. 2014, arXiv 1412.6115), where all vectors count the same, or as much as they are long (``"magnitude"``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Field, require_matrix
from tenpak.codecs.codebook_codec import CodebookCodec
from tenpak.codecs.codebook_fit import Plan
from tenpak.codecs.codebooks import DIMENSIONS, ENTRIES, common
from tenpak.codecs.validation import require_bool, require_choice, require_integer, require_number
from tenpak.errors import RecipeError
from tenpak.kernels.parallel import one_thread

__all__ = ["Vector"]


@dataclass(frozen=True)
class Vector(CodebookCodec):
    """Vector quantization.

    Attributes:
        dimension: weights per vector: 2, 4, 8 or 16.
        entries: of the codebook: a power of two, 16 to 65,536.
        scaled: one scale per row, its root mean square at first; vectors of all rows are then of one size.
        weighting: what counts: ``"equal"``, ``"magnitude"`` or, with statistics, ``"calibrated"``.
        rounds: of codebook, scales and codes after the first codes, 0 to 100; each lowers the loss.
        damping: of the Hessian, relative to its mean diagonal; 1e-6 to 1.
        seed: of k-means, 0 to 2^32 - 1.
        shared: the codebook is that of all tensors with exactly this codec; they are ``scaled``, to be comparable.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "vector/1"
    _books: ClassVar[str] = "codebook"
    _remedy: ClassVar[str] = 'choose the weighting "equal"'

    dimension: int = 4
    entries: int = 256
    scaled: bool = False
    weighting: str = "equal"
    rounds: int = 2
    damping: float = 0.01
    seed: int = 0
    shared: bool = field(default=False, metadata={"optional": True})

    def __post_init__(self) -> None:
        require_choice(self.id, "dimension", self.dimension, DIMENSIONS)
        require_choice(self.id, "entries", self.entries, ENTRIES)
        require_bool(self.id, "scaled", self.scaled)
        require_choice(self.id, "weighting", self.weighting, ("equal", "magnitude", "calibrated"))
        require_integer(self.id, "rounds", self.rounds, 0, 100)
        require_number(self.id, "damping", self.damping, 1e-6, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_integer(self.id, "seed", self.seed, 0, (1 << 32) - 1)
        require_bool(self.id, "shared", self.shared)
        if self.shared and not self.scaled:
            raise RecipeError(
                f"codec {self.id}: a shared codebook is for rows that are scaled, got scaled false",
                hint="set scaled to true: it makes rows of different tensors comparable",
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether it is calibrated."""
        return self.weighting == "calibrated"

    @property
    def uses_curvature(self) -> bool:
        """Whether it is calibrated."""
        return self.weighting == "calibrated"

    @property
    def shared_fields(self) -> tuple[Field, ...]:
        """The codebook, where weights share it."""
        return (Field(self._books, torch.float16, self._books_shape),) if self.shared else ()

    def learn(self, weights: Iterable[Tensor]) -> dict[str, Tensor]:
        """The codebook of these matrices, by k-means, where weights share it."""
        if not self.shared:
            return {}

        def checked(weight: Tensor) -> Tensor:
            require_matrix(weight)
            return weight.detach().to("cpu").float().contiguous()

        generator = torch.Generator().manual_seed(self.seed)
        with one_thread():
            found = common(
                map(checked, weights), self.dimension, self.entries, generator, by_magnitude=self._by_magnitude
            )
        return {self._books: found.half()}

    @property
    def _by_magnitude(self) -> bool:
        return self.weighting == "magnitude"

    @property
    def _plan(self) -> Plan:
        return Plan(self.dimension, self.entries, 1, self.scaled, 1, self.rounds, self.seed)

    @property
    def _books_shape(self) -> tuple[int, ...]:
        return self.entries, self.dimension  # there is one book
