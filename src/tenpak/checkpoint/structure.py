"""How a checkpoint's tensors become a model's parameters: which are matrices, embeddings, heads, experts, tied.

The model class is built without memory (on the meta device), and transformers' own renaming rules say which parameter
each tensor ends up in. So a family needs no line here: what counts is the module that owns the parameter (nn.Linear,
GPT-2's Conv1D, nn.Embedding, stacked experts). This is the one place that knows about orientation, stacking and tying;
codecs see plain matrices ``[out, in]``.

A checkpoint may hold experts one by one (``experts.3.w1.weight``) where the model stacks them into one parameter
``[experts, rows, columns]``; ``slot`` then says which expert and which part of its rows the tensor is.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from tenpak.checkpoint.header import TensorInfo
from tenpak.errors import CheckpointError, MissingTensorError

__all__ = ["Kind", "Weight", "bind", "build_meta_model", "check_coverage"]

Kind = Literal["matrix", "embedding", "head", "expert", "dense"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint and its place in the model.

    Attributes:
        name: its name in the checkpoint.
        dtype: safetensors name of its dtype.
        shape: as stored.
        kind: what it is to the planner; everything but ``"dense"`` can be compressed.
        parameter: path of the model parameter that it fills, or a part of; empty where the model has none.
        transposed: stored ``[in, out]`` (per expert, where stacked) instead of ``[out, in]``.
        slot: (expert, part) for a tensor that fills a part of a stacked parameter; parts are stacked along the rows.
        tied_to: name of the tensor that the model ties this one to, where the checkpoint holds both.
        reason: why a dense tensor cannot be compressed.
        restructured: the parameter is made from it in a way that only transformers knows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    parameter: str
    transposed: bool = False
    slot: tuple[int, int] | None = None
    tied_to: str | None = None
    reason: str = ""
    restructured: bool = False

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def matrices(self) -> int:
        """How many matrices the tensor holds: the number of experts where they are stacked, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out, in)`` of each of its matrices."""
        first, second = self.shape[-2:]
        return (second, first) if self.transposed else (first, second)

    def unstacked(self, tensor: Tensor) -> list[Tensor]:
        """The matrices ``[out, in]`` of its ``tensor``, which is of its shape; views."""
        matrices = tensor.unbind(0) if tensor.ndim == 3 else (tensor,)
        return [matrix.T if self.transposed else matrix for matrix in matrices]


def build_meta_model(folder: Path, *, trust_remote_code: bool = False, buffers: bool = False) -> Any:
    """The model class of a folder, without weights; with ``buffers`` those that the class computes itself are real.

    Raises:
        CheckpointError: not a decoder-only language model that transformers can build.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a bad config
        hint = "pass --trust-remote-code if you trust its code" if "trust_remote_code" in str(error) else None
        raise CheckpointError(
            f"transformers cannot read the configuration of {folder.name}: {str(error).splitlines()[0]}", hint=hint
        ) from error
    name = type(config).__name__.removesuffix("Config")
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    decoder = remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    # BERT and its kin have a causal class too, but a checkpoint of theirs is an encoder unless it says is_decoder.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    if getattr(config, "is_encoder_decoder", False) or not decoder or encoder:
        raise CheckpointError(
            f"{folder.name} is a {name} model, not a decoder-only language model",
            hint="tenpak compresses models that AutoModelForCausalLM loads",
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # an artifact: its skeleton is that of the original
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config may describe an impossible model in any number of ways
        raise CheckpointError(
            f"transformers cannot build {folder.name}: {str(error).splitlines()[0]}",
            hint="check config.json against the family's documentation",
        ) from error


def bind(model: Any, tensors: Mapping[str, TensorInfo]) -> tuple[Weight, ...]:
    """Find every tensor's place in the model; ``model`` may be on the meta device.

    Raises:
        CheckpointError: a tensor has another shape than its parameter.
    """
    parameters: dict[str, torch.Tensor] = model.state_dict()
    weights = [
        _place(model, parameters, name, tensors[name], target, converter, part)
        for name, target, converter, part in _targets(model, parameters, tensors)
    ]
    return tuple(_mark_tied(model, _number_experts(parameters, weights)))


def check_coverage(model: Any, weights: tuple[Weight, ...]) -> None:
    """Require that every parameter of the model is filled by some tensor or tied to one that is.

    Raises:
        MissingTensorError: names the parameters that nothing fills.
    """
    filled = {weight.parameter for weight in weights}
    tied: dict[str, str] = model.all_tied_weights_keys
    for target, source in tied.items():
        if source in filled or target in filled:
            filled |= {source, target}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name in model.state_dict()
        if name not in filled and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        raise MissingTensorError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:5])}"
            + (", …" if len(missing) > 5 else ""),
            hint="a shard may be missing, or the checkpoint may belong to another architecture",
        )


def _targets(
    model: Any, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, str, Any, int]]:
    """(name, parameter, converter or None, index of its source pattern), names in natural order."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:  # saved under the model's own names
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        converter = by_pattern.get(pattern) if pattern is not None else None
        part = converter.source_patterns.index(pattern) if converter is not None else 0
        yield name, target, converter, part


def _place(
    model: Any,
    parameters: Mapping[str, torch.Tensor],
    name: str,
    info: TensorInfo,
    target: str,
    converter: Any,
    part: int,
) -> Weight:
    def dense(reason: str, parameter: str = target, restructured: bool = False) -> Weight:
        return Weight(name, info.dtype, info.shape, "dense", parameter, reason=reason, restructured=restructured)

    if target not in parameters:
        return dense(f"{type(model).__name__} does not use it", "")
    owner = model.get_submodule(target.rpartition(".")[0])
    transposed = bool(getattr(owner, "is_transposed", False))
    if converter is not None:
        if not _is_expert_merge(converter):
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            return dense(f"transformers restructures it while loading ({steps})", restructured=True)
        if len(info.shape) != 2 or not _is_float(info):
            return dense(f"a {len(info.shape)}-D {info.dtype} part of experts")
        # The expert number is filled in when all of them are known.
        return Weight(name, info.dtype, info.shape, "expert", target, transposed, slot=(-1, part))
    expected = tuple(parameters[target].shape)
    if expected != info.shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(info.shape)}, the model expects {list(expected)}",
            hint="config.json and weights belong to different models",
        )
    if target not in dict(model.named_parameters(remove_duplicate=False)):
        return dense("a buffer")
    if not _is_float(info):
        return dense(f"stored as {info.dtype}")
    if 0 in info.shape:
        return dense("empty")
    is_weight = target.endswith(".weight") and len(info.shape) == 2
    if is_weight and isinstance(owner, nn.Embedding):
        return Weight(name, info.dtype, info.shape, "embedding", target)
    if is_weight and isinstance(owner, nn.Linear):
        kind: Kind = "head" if owner is model.get_output_embeddings() else "matrix"
        return Weight(name, info.dtype, info.shape, kind, target)
    if is_weight and isinstance(owner, Conv1D):
        return Weight(name, info.dtype, info.shape, "matrix", target, transposed=True)
    if len(info.shape) == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
        return Weight(name, info.dtype, info.shape, "expert", target, transposed)
    if len(info.shape) < 2:
        return dense("1-D" if info.shape else "a scalar")
    return dense(f"a {len(info.shape)}-D parameter of {type(owner).__name__}, which is no linear layer or embedding")


def _is_float(info: TensorInfo) -> bool:
    return info.dtype in {"F64", "F32", "F16", "BF16"}


def _is_expert_merge(converter: Any) -> bool:
    """Stacking of experts along a new first dimension, optionally after concatenating parts of each along its rows."""
    steps = converter.operations
    return (
        len(converter.target_patterns) == 1
        and 1 <= len(steps) <= 2
        and isinstance(steps[0], MergeModulelist)
        and steps[0].dim == 0
        and (
            (len(steps) == 1 and len(converter.source_patterns) == 1)
            or (len(steps) == 2 and isinstance(steps[1], Concatenate) and steps[1].dim == 1)
        )
    )


def _number_experts(parameters: Mapping[str, torch.Tensor], weights: list[Weight]) -> list[Weight]:
    """Fill in expert numbers: transformers stacks the tensors of one pattern in natural order of their names."""
    counts: dict[tuple[str, int], int] = defaultdict(int)
    numbered = []
    for weight in weights:
        if weight.slot is not None:
            part = weight.slot[1]
            key = (weight.parameter, part)
            weight = replace(weight, slot=(counts[key], part))
            counts[key] += 1
        numbered.append(weight)
    rows: dict[tuple[str, int], int] = defaultdict(int)
    for weight in numbered:
        if weight.slot is not None:
            rows[weight.parameter, weight.slot[0]] += weight.shape[0]
    for (parameter, expert), total in rows.items():
        experts, expected = parameters[parameter].shape[:2]
        if total != expected or expert >= experts:
            raise CheckpointError(
                f"the tensors of expert {expert} do not add up to {parameter} {list(parameters[parameter].shape)}",
                hint="a shard may be missing, or config.json belongs to another model",
            )
    for parameter in {parameter for parameter, _ in rows}:
        if sum(p == parameter for p, _ in rows) != parameters[parameter].shape[0]:
            raise MissingTensorError(f"experts of {parameter} are missing", hint="a shard may be missing")
    return numbered


def _mark_tied(model: Any, weights: list[Weight]) -> Iterator[Weight]:
    tied: dict[str, str] = model.all_tied_weights_keys
    by_parameter = {weight.parameter: weight.name for weight in weights if weight.parameter}
    for weight in weights:
        source = by_parameter.get(tied.get(weight.parameter, ""))
        yield replace(weight, tied_to=source) if source else weight
