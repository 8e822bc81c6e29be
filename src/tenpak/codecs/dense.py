"""``dense/1``: the weight itself, in FP32, BF16 or FP16.

Bytes: ``values``, ``[out, in]`` of the configured dtype. Bits per weight: 32 or 16. Conversion rounds to nearest even,
and is exact where the source has the configured dtype or a narrower one. The dtype is always spelled out, so the size
follows from the shape; leaving a tensor exactly as it was is not a codec but a decision of the plan (the recipe
``dense``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tenpak.codecs.base import Codec, Field, Payload, Statistics, require_matrix
from tenpak.codecs.validation import require_choice
from tenpak.errors import CodecError

__all__ = ["Dense"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Dense(Codec):
    """A weight stored in a floating-point dtype.

    Attributes:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        RecipeError: another dtype.
    """

    id: ClassVar[str] = "dense/1"

    dtype: str

    def __post_init__(self) -> None:
        require_choice(self.id, "dtype", self.dtype, tuple(_DTYPES))

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """The values."""
        return (Field("values", _DTYPES[self.dtype], shape),)

    def encode(self, weight: Tensor, statistics: Statistics | None = None) -> Payload:
        """Convert ``weight``; the values share its memory where nothing changes.

        Raises:
            CodecError: the weight is not a finite floating-point matrix, or a value exceeds the dtype's range.
        """
        require_matrix(weight)
        values = weight.detach().to(_DTYPES[self.dtype]).contiguous()
        low, high = torch.aminmax(values)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CodecError(
                f"a value of the weight exceeds the range of {self.dtype} in {self.id}",
                hint="store this tensor as float32, or leave it dense (--set 'NAME=dense')",
            )
        return self.payload(weight, {"values": values})

    def decode(self, payload: Payload) -> Tensor:
        """The values as FP32 ``[out, in]``."""
        return self.checked(payload)["values"].float()

    def rows(self, indices: Tensor, prepared: Payload) -> Tensor:
        """Rows ``indices`` of the values, FP32 ``[*indices.shape, in]``."""
        return self.checked(prepared)["values"][indices].float()
