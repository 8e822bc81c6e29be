"""What a size means: the one definition of bits per weight and of "times smaller".

Every byte of the weight files counts, headers included; FP32 is 4 bytes × parameters, tied weights once.
"""

from __future__ import annotations

__all__ = ["Sizes"]


class Sizes:
    """Ratios of whatever knows its bytes, its checkpoint's bytes and its parameters."""

    bytes: int
    checkpoint_bytes: int
    parameters: int

    @property
    def bpw(self) -> float:
        """Bits per weight over everything: 8 × bytes of the weight files ÷ parameters."""
        return 8 * self.bytes / self.parameters

    @property
    def ratio_fp32(self) -> float:
        """How many times smaller than FP32."""
        return 4 * self.parameters / self.bytes

    @property
    def ratio_checkpoint(self) -> float:
        """How many times smaller than the checkpoint's own weight files."""
        return self.checkpoint_bytes / self.bytes
