"""``additive/1``: a sum of entries of several codebooks for neighbouring weights of a row.

Formula (FP32, added in the order of books, then one product)::

    w = scale[row]·(codebook_0[code_0] + codebook_1[code_1] + …)

Bytes, V = ceil(in/dimension) vectors per row, the last one cut off at the row's end::

    scales     FP16  [out]
    codebooks  FP16  [books, entries, dimension]
    codes      uint8 [out, ceil(V·books·log2(entries)/8)]   packed; the codes of a vector one after the other

Bits per weight: ``books·log2(entries)/dimension`` where the dimension divides the row, ``+ 16/in``, and
``16·books·entries·dimension`` bits per tensor. Two books of 256 entries reach 65,536 sums for the bytes of 512
entries, so it goes on where one codebook would grow too large; choosing the codes is what it costs (a beam search), and
sums are not free to lie where one codebook's entries could.

Additive quantization: Babenko and Lempitsky 2014; of language models: Egiazarian et al. 2024, AQLM, arXiv 2401.06118.
Here codes are first chosen with feedback of errors through the full Hessian, vector by vector, and only then improved
by sweeps over all vectors, and codebooks are solved for by conjugate gradients; see ``codebook_fit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tenpak.codecs.codebook_codec import CodebookCodec
from tenpak.codecs.codebook_fit import Plan
from tenpak.codecs.codebooks import DIMENSIONS, ENTRIES
from tenpak.codecs.validation import require_bool, require_choice, require_integer, require_number

__all__ = ["Additive"]


@dataclass(frozen=True)
class Additive(CodebookCodec):
    """Additive quantization.

    Attributes:
        books: number of codebooks, 1 to 4.
        dimension: weights per vector: 2, 4, 8 or 16.
        entries: of each codebook: a power of two, 16 to 65,536.
        calibrated: use Hessian and output curvature; otherwise all inputs and outputs count the same.
        beam: sums that the search for codes goes on with, 1 to 64.
        rounds: of codebooks, scales and codes after the first codes, 0 to 100; each lowers the loss.
        damping: of the Hessian, relative to its mean diagonal; 1e-6 to 1.
        seed: of k-means, 0 to 2^32 - 1.

    Raises:
        RecipeError: a field is of the wrong type or out of range.
    """

    id: ClassVar[str] = "additive/1"
    _books: ClassVar[str] = "codebooks"
    _remedy: ClassVar[str] = "set calibrated to false"

    books: int = 2
    dimension: int = 8
    entries: int = 256
    calibrated: bool = True
    beam: int = 8
    rounds: int = 6
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer(self.id, "books", self.books, 1, 4)
        require_choice(self.id, "dimension", self.dimension, DIMENSIONS)
        require_choice(self.id, "entries", self.entries, ENTRIES)
        require_bool(self.id, "calibrated", self.calibrated)
        require_integer(self.id, "beam", self.beam, 1, 64)
        require_integer(self.id, "rounds", self.rounds, 0, 100)
        require_number(self.id, "damping", self.damping, 1e-6, 1.0)
        object.__setattr__(self, "damping", float(self.damping))
        require_integer(self.id, "seed", self.seed, 0, (1 << 32) - 1)

    @property
    def needs_statistics(self) -> bool:
        """Whether it is calibrated."""
        return self.calibrated

    @property
    def uses_curvature(self) -> bool:
        """Whether it is calibrated."""
        return self.calibrated

    @property
    def _plan(self) -> Plan:
        return Plan(self.dimension, self.entries, self.books, True, self.beam, self.rounds, self.seed)
