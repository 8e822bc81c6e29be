"""Loading an artifact as a transformers model, and writing a loaded one down again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tenpak.artifact.reader import Artifact, open_artifact
from tenpak.artifact.verify import changed_files
from tenpak.artifact.writer import ArtifactWriter
from tenpak.checkpoint.source import is_artifact, locate
from tenpak.errors import ArtifactError, CorruptArtifactError, TenpakError
from tenpak.nn.modules import CompressedWeight, Runtime
from tenpak.nn.quantizer import TenpakQuantizer

__all__ = ["load", "save"]


def load(
    path: str | Path,
    *,
    runtime: Runtime = "memory",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    verify: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load an artifact as the transformers model it compresses.

    Args:
        path: artifact folder or hub id.
        runtime: ``"memory"`` keeps payloads and decodes a weight whenever it is used; ``"speed"`` decodes once.
        device: where the model goes.
        dtype: dtype of the dense tensors, of decoded weights and activations; ``"auto"``: the checkpoint's own.
        verify: compare every tensor with its hash.
        revision: of the hub repository.
        trust_remote_code: let transformers run model code that comes with the artifact's source.

    Returns:
        The model, in evaluation mode; ``save_pretrained`` writes an artifact again.

    Raises:
        ArtifactError: ``path`` is no artifact.
        CorruptArtifactError: bytes, manifest or configuration are not those of a sound artifact.
        FormatVersionError, UnknownCodecError: this tenpak cannot read it.
    """
    folder = locate(path, revision=revision)
    if not is_artifact(folder):
        raise ArtifactError(f"{path} is not a tenpak artifact", hint="load plain checkpoints with transformers")
    open_artifact(folder)  # refuses a broken one before transformers reads its configuration
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.quantization_config = {**config.quantization_config, "runtime": runtime, "verify": verify}
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except TenpakError:
        raise
    except Exception as error:  # a hostile configuration makes transformers raise anything
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptArtifactError(
            f"transformers cannot load {folder.name}: {message}",
            hint="`tenpak verify` says whether its files are intact",
        ) from error
    return model.to(device)


def save(model: Any, folder: str | Path) -> None:
    """Write a loaded artifact down again: payloads as they are, dense tensors as they are now.

    Raises:
        ArtifactError: the folder cannot be written, or the artifact that the model came from is gone or changed: its
            tokenizer files, and tensors that the model does not use, are copied from it.
    """
    quantizer: TenpakQuantizer = model.hf_quantizer
    artifact = quantizer.artifact
    manifest = artifact.manifest
    changed = [name for name in changed_files(artifact) if name != "config.json"]
    if changed:
        raise ArtifactError(
            f"{', '.join(changed)} in {artifact.folder} is gone or not what was written",
            hint="the tokenizer and other files are copied from there: restore them first",
        )
    payloads = {module.name: module for module in model.modules() if isinstance(module, CompressedWeight)}
    dense = _dense_state(model)
    with ArtifactWriter(Path(folder), overwrite=True) as writer:
        for name, entry in manifest.weights.items():
            moved = [payload.to("cpu") for payload in payloads[name].payloads()]
            writer.add_weight(name, moved, shape=entry.shape, dtype=entry.dtype, transposed=entry.transposed)
        for name, entry_ in manifest.dense.items():
            tensor = dense[name] if name in dense else _carried(artifact, name)
            writer.add_dense(name, tensor.cpu(), entry_.reason)
        copied = [artifact.folder / name for name in manifest.files if name != "config.json"]
        config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
        writer.publish(manifest.model_copy(update={"quality": None}), config, copied=copied)


def _dense_state(model: Any) -> dict[str, Tensor]:
    """The model's own tensors under checkpoint names."""
    held = {path for path, module in model.named_modules() if isinstance(module, CompressedWeight)}
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not any(name.startswith(f"{p}.") for p in held)
    }
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    return dict(revert_weight_conversion(model, state))


def _carried(artifact: Artifact, name: str) -> Tensor:
    try:
        return artifact.read_dense(name)
    except CorruptArtifactError as error:
        raise ArtifactError(
            f"tensor {name!r} is not part of the model, and {artifact.folder} no longer holds it",
            hint="copy the artifact folder instead",
        ) from error
