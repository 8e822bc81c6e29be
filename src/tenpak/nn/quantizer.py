"""How ``AutoModelForCausalLM.from_pretrained`` loads an artifact: a quantizer of transformers, registered by name.

This module is imported while transformers is still being imported, so it imports nothing of it but base classes; the
work is in ``tenpak.nn.install``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch

    from tenpak.artifact.reader import Artifact

__all__ = ["TenpakConfig", "TenpakQuantizer"]


@register_quantization_config("tenpak")
class TenpakConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The ``quantization_config`` of an artifact.

    Args:
        format_version: version of the artifact's format; the manifest's is what counts.
        runtime: ``"memory"`` decodes weights on demand, ``"speed"`` keeps them decoded. Not stored.
        verify: compare every tensor with its hash while loading. Not stored.
    """

    def __init__(self, format_version: int = 0, runtime: str = "memory", verify: bool = True, **unknown: Any) -> None:
        self.quant_method = "tenpak"
        self.format_version = format_version
        self.runtime = runtime
        self.verify = verify
        if runtime not in ("memory", "speed"):
            raise ValueError(f"runtime is 'memory' or 'speed', not {runtime!r}")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": "tenpak", "format_version": self.format_version}


@register_quantizer("tenpak")
class TenpakQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Installs an artifact's payloads into the model that transformers is loading."""

    requires_calibration = True  # a plain checkpoint is compressed by tenpak.compress, never while loading
    artifact: Artifact

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        from tenpak.nn.install import install_artifact

        self.artifact = install_artifact(model, checkpoint_files, dtype, verify=self.quantization_config.verify)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from tenpak.nn.install import settle

        settle(model, self.quantization_config.runtime)
