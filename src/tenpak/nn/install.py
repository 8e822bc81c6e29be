"""Installing an artifact into a model that transformers is loading.

Before transformers loads anything, the artifact is opened, its tensors are checked to fill the model exactly, and
modules are installed that already hold their payloads. transformers then loads what is dense, with its own renaming
rules, and ties and places the model as always.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from tenpak.artifact.reader import Artifact, open_artifact
from tenpak.artifact.schema import CODES_SUFFIX, MANIFEST_NAME, DenseEntry, WeightEntry
from tenpak.checkpoint.header import TensorInfo
from tenpak.checkpoint.structure import Weight, bind, check_coverage
from tenpak.errors import CheckpointError, CorruptArtifactError
from tenpak.nn.modules import CompressedWeight, Runtime, SharedTensor, StackedWeight, install

__all__ = ["install_artifact", "settle"]


def install_artifact(
    model: Any, checkpoint_files: list[str] | None, dtype: torch.dtype | None, *, verify: bool
) -> Artifact:
    """Open the artifact whose weight files these are and install its payloads into ``model`` (on the meta device).

    Raises:
        ArtifactError: the artifact is broken, or does not fill the model exactly.
    """
    artifact = open_artifact(_folder(model, checkpoint_files))
    weights = bind_artifact(model, artifact)
    held = _install_all(model, artifact, weights, dtype or torch.get_default_dtype(), verify=verify)
    if verify:
        for name in artifact.manifest.dense:
            artifact.read_dense(name)
    # What transformers would tie is already one payload.
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in held or source in held:
            del model.all_tied_weights_keys[target]
    unused = [re.escape(weight.name) for weight in weights if not weight.parameter]
    shared = [f"^{re.escape(name)}$" for name in artifact.manifest.shared]
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), f"{CODES_SUFFIX}$", *shared, *unused]
    model._keys_to_ignore_on_load_unexpected = _Patterns(ignored)
    return artifact


def settle(model: Any, runtime: Runtime) -> None:
    """Move payloads to where transformers put the model, decode them for good if asked, and teach the model to save."""
    from tenpak.nn.load import save  # load imports this module

    dtype = model.dtype if model.dtype.is_floating_point else torch.get_default_dtype()
    for module, path in list(_compressed_weights(model)):
        module.settle(_device(model, path), dtype)
        if runtime == "speed":
            module.keep()
    if runtime == "speed":
        for owner in list(model.modules()):
            _unstack(owner)
    model.save_pretrained = _Saver(model, save)


class _Patterns(list[str]):
    """Patterns that early releases of transformers 5 add to a list, and later ones unite with a set."""

    def __or__(self, other: set[str]) -> set[str]:
        return {*self, *other}


class _Saver:
    """``model.save_pretrained`` of a loaded artifact: writes an artifact again. Copies with the model."""

    def __init__(self, model: Any, save: Any) -> None:
        self.model, self.save = model, save

    def __call__(self, save_directory: str | Path, **_: Any) -> None:
        self.save(self.model, save_directory)


def bind_artifact(model: Any, artifact: Artifact) -> tuple[Weight, ...]:
    """Match an artifact's tensors with a model's parameters.

    Raises:
        CorruptArtifactError: they do not fill the model exactly.
    """
    manifest = artifact.manifest
    entries: list[tuple[str, WeightEntry | DenseEntry]] = [*manifest.weights.items(), *manifest.dense.items()]
    described = {name: TensorInfo(entry.dtype, entry.shape, artifact.folder, 0, 0) for name, entry in entries}
    try:
        weights = bind(model, described)
        check_coverage(model, weights)
    except CheckpointError as error:
        raise CorruptArtifactError(str(error), hint="config.json and weights of the artifact disagree") from error
    for weight in weights:
        if weight.name in manifest.weights and weight.kind == "dense":
            raise CorruptArtifactError(
                f"{weight.name!r} is compressed, but the model cannot use it so: {weight.reason}"
            )
    return weights


def _install_all(
    model: Any, artifact: Artifact, weights: tuple[Weight, ...], dtype: torch.dtype, *, verify: bool
) -> set[str]:
    """Install every compressed tensor; returns the parameters that are gone."""
    stacks: dict[str, dict[tuple[int, int], tuple[CompressedWeight, int]]] = defaultdict(dict)
    transposed: dict[str, bool] = {}
    tied = _tied_parameters(model, {weight.parameter for weight in weights if weight.parameter})
    held: set[str] = set()
    shared = {name: SharedTensor(artifact.read_shared(name, verify=verify)) for name in artifact.manifest.shared}
    for weight in weights:
        entry = artifact.manifest.weights.get(weight.name)
        if entry is None:
            continue
        blob = artifact.read_blob(weight.name, verify=verify)
        parts = {field: shared[stored] for field, stored in entry.shared.items()}
        payload = CompressedWeight(weight.name, entry, blob, dtype, parts)
        if weight.kind == "expert":
            transposed[weight.parameter] = weight.transposed
            for index in range(weight.matrices):
                stacks[weight.parameter][weight.slot or (index, 0)] = (payload, index)
            continue
        for parameter in (weight.parameter, *tied.get(weight.parameter, ())):
            install(model.get_submodule(parameter.rpartition(".")[0]), payload)
            held.add(parameter)
    for parameter, slots in stacks.items():
        _install_stack(model, parameter, slots, transposed=transposed[parameter])
        held.add(parameter)
    return held


def _install_stack(
    model: Any, parameter: str, slots: dict[tuple[int, int], tuple[CompressedWeight, int]], *, transposed: bool
) -> None:
    owner_path, _, attribute = parameter.rpartition(".")
    owner = model.get_submodule(owner_path)
    experts = 1 + max(expert for expert, _ in slots)
    parts = 1 + max(part for _, part in slots)
    if len(slots) != experts * parts:
        raise CorruptArtifactError(
            f"some experts of {parameter} are compressed and others are not", hint="compress all of them, or none"
        )
    stack = StackedWeight([[slots[e, p] for p in range(parts)] for e in range(experts)], transposed=transposed)
    del owner._parameters[attribute]
    owner.add_module(attribute, stack)
    if hasattr(owner, "config"):
        owner.config._experts_implementation = "eager"  # the one that asks for experts one by one


def _unstack(owner: nn.Module) -> None:
    """Put decoded stacks in place of payloads, which stay beside them."""
    for name, child in list(owner.named_children()):
        if isinstance(child, StackedWeight):
            stack = child.dense()
            for weight in child.weights():
                weight.forget()
            delattr(owner, name)
            owner.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            owner.add_module(f"{name}_payload", child)


def _tied_parameters(model: Any, filled: set[str]) -> dict[str, list[str]]:
    """Parameter with a tensor of its own → parameters tied to it that have none."""
    shared: dict[str, list[str]] = defaultdict(list)
    for target, source in model.all_tied_weights_keys.items():
        if source in filled and target not in filled:
            shared[source].append(target)
        elif target in filled and source not in filled:
            shared[target].append(source)
    return shared


def _compressed_weights(model: nn.Module) -> Iterator[tuple[CompressedWeight, str]]:
    for path, module in model.named_modules():
        if isinstance(module, CompressedWeight):
            yield module, path


def _device(model: Any, path: str) -> torch.device:
    """Where transformers put the part of the model at ``path``."""
    device_map = getattr(model, "hf_device_map", None) or {}
    for prefix in sorted(device_map, key=len, reverse=True):
        if not prefix or path == prefix or path.startswith(f"{prefix}."):
            return torch.device(device_map[prefix])
    return torch.device(next((p.device for p in model.parameters() if p.device.type != "meta"), "cpu"))


def _folder(model: Any, checkpoint_files: list[str] | None) -> Path:
    """The artifact's folder; for a hub id, after fetching the manifest beside the weights."""
    if not checkpoint_files:
        raise CorruptArtifactError("an artifact can only be loaded from its files")
    folder = Path(checkpoint_files[0]).parent
    if not (folder / MANIFEST_NAME).is_file() and not Path(str(model.config.name_or_path)).is_dir():
        cached_file(model.config.name_or_path, MANIFEST_NAME, _commit_hash=getattr(model.config, "_commit_hash", None))
    return folder
