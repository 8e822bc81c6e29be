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

from dataclasses import dataclass
from typing import ClassVar

from tenpak.codecs.codebook_codec import CodebookCodec
from tenpak.codecs.codebook_fit import Plan
from tenpak.codecs.codebooks import DIMENSIONS, ENTRIES
from tenpak.codecs.validation import require_bool, require_choice, require_integer, require_number

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
    def _by_magnitude(self) -> bool:
        return self.weighting == "magnitude"

    @property
    def _plan(self) -> Plan:
        return Plan(self.dimension, self.entries, 1, self.scaled, 1, self.rounds, self.seed)

    @property
    def _books_shape(self) -> tuple[int, ...]:
        return self.entries, self.dimension  # there is one book
