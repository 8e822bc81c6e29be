"""``GPTQStyleCompressor``: a model in memory, rounded column by column with feedback, block after block.

Blocks are compressed in order, each on copies of its own, for the inputs that the compressed blocks before it give
(Frantar et al. 2023, GPTQ). Within a block weights follow each other in the order of their use, those with the same
input together, so every Hessian is that of the inputs which the weight will see. ``tenpak compress`` does the same from
a checkpoint on disk, one block in memory at a time, and more: curvature, correction towards the original's outputs,
experts that are stacked, trellis codes. This is for a model that is at hand, and leaves it as it was.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenpak.calibration.calls import hidden_of, replaced
from tenpak.calibration.observe import Observer
from tenpak.calibration.skeleton import find_blocks
from tenpak.calibration.sums import BatchSums, Sums
from tenpak.codecs.base import Statistics
from tenpak.codecs.rounding import Gptq, Nearest
from tenpak.codecs.uniform import Uniform
from tenpak.errors import CalibrationError, CodecError
from tenpak.pixel.matrices import naming
from tenpak.pixel.tensors import CompressedTensor, CompressedTensors, measured

__all__ = ["GPTQStyleCompressor"]

_BATCH = 2048  # tokens at a time
_WINDOWS, _LENGTH = 64, 128  # of the text that a model writes itself

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class GPTQStyleCompressor:
    """Quantizes the linear layers of a model's blocks, with compensation of errors.

    Args:
        bits: per weight, 2 to 8.
        group: weights per scale and offset, 8 to 256, or None for one per row.
        search: look for the grids of least error.
        damping: of the Hessian, relative to its mean diagonal.
        sweeps: of coordinate descent after the columns are rounded.

    Raises:
        RecipeError: a value is out of range.
    """

    def __init__(
        self, bits: int = 4, group: int | None = 128, *, search: bool = True, damping: float = 0.01, sweeps: int = 0
    ) -> None:
        self.codec = Uniform(bits, group, search=search, rounding=Gptq(damping=damping, sweeps=sweeps))

    def compress_model_sequential(
        self, model: Any, tokens: Tensor | None = None, *, seed: int = 0
    ) -> CompressedTensors:
        """Compress a model's blocks one after another; the model itself is not changed.

        Embeddings, norms, biases, the head, and experts that are stacked in one parameter stay dense; they are part
        of the result, and of its ratio.

        Args:
            model: a transformers language model, or any whose blocks are a module list and whose input are tokens.
            tokens: int64 ``[windows, length]``, to calibrate on; where it is None the model writes 64 × 128 tokens
                itself, which takes a model that can ``generate``.
            seed: of what it writes.

        Returns:
            Compressed tensors, named as the model's parameters.

        Raises:
            CalibrationError: the tokens cannot be used, hidden states are not finite, or the model has no blocks.
            CodecError: a weight cannot be encoded; the message names it.
        """
        _require_model(model)
        with _evaluating(model):
            tokens = _written(model, seed) if tokens is None else _checked(model, tokens)
            path, blocks = find_blocks(model)
            batches = torch.split(tokens, max(1, _BATCH // tokens.shape[1]))
            calls = [_calls(model, blocks, batch) for batch in batches]
            states = [hidden_of(*of_batch[0]) for of_batch in calls]
            weights: dict[str, CompressedTensor] = {}
            seen: set[int] = set()
            for index, block in enumerate(blocks):
                walk = _Block(self.codec, copy.deepcopy(block), [of_batch[index] for of_batch in calls], states)
                names = [name for name, module in _linear(block).items() if id(module.weight) not in seen]
                seen.update(id(module.weight) for module in _linear(block).values())
                for name, weight in walk.compress(names).items():
                    weights[f"{path}.{index}.{name}.weight"] = weight
                states = walk.outputs(index)
        return CompressedTensors(weights, _others(model, weights))

    @staticmethod
    def apply_compressed_weights(model: nn.Module, compressed: CompressedTensors) -> None:
        """Give a model of the same class and sizes the weights that were compressed, decoded, in place.

        Raises:
            CodecError: the model lacks one of the tensors, or has it in another shape; nothing is changed then.
            InvalidPayloadError: a payload is damaged.
        """
        state = model.state_dict(keep_vars=True)
        tensors = compressed.decompress()
        for name, tensor in tensors.items():
            if name not in state:
                near = difflib.get_close_matches(name, state, n=2)
                raise CodecError(
                    f"{type(model).__name__} has no tensor {name!r}",
                    hint=f"near ones are {' and '.join(near)}" if near else "use a model of the class compressed",
                )
            if state[name].shape != tensor.shape:
                raise CodecError(
                    f"{name} is {tuple(tensor.shape)}, the model has {tuple(state[name].shape)}",
                    hint="use a model of the same sizes",
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                if state[name].data_ptr() != tensor.data_ptr():
                    state[name].copy_(tensor)


class _Block:
    """A copy of a block on its way to its compressed form.

    Args:
        codec: of its weights.
        block: the copy.
        calls: how the model calls it, a call per batch.
        states: its inputs, in place of those.
    """

    def __init__(self, codec: Uniform, block: nn.Module, calls: list[_Call], states: list[Tensor]) -> None:
        self.codec, self.block = codec, block
        self.calls = [replaced(*call, hidden) for call, hidden in zip(calls, states, strict=True)]

    def compress(self, names: list[str]) -> dict[str, CompressedTensor]:
        """Compress these linear layers, and let the block have what they became."""
        modules = _linear(self.block)
        waiting = {name: modules[name] for name in names}
        first = self._sums(waiting, self.calls[:1])
        steps = [[path for path, _ in keys] for _, keys in first.groups()]
        if rest := sorted(set(waiting).difference(*steps)):  # experts that the first batch has no token for
            steps.append(rest)
        made = {}
        for step in steps:
            known = self._sums({name: waiting[name] for name in step}, self.calls).statistics()
            for name in step:
                made[name] = self._encoded(name, waiting[name], known.get((name, 0)))
        return made

    def outputs(self, index: int) -> list[Tensor]:
        """What the block returns now."""
        outputs = [self._run(call) for call in self.calls]
        if not all(bool(output.isfinite().all()) for output in outputs):
            raise CalibrationError(
                f"hidden states after block {index} are not finite", hint="use the model in float32 or bfloat16"
            )
        return outputs

    def _encoded(self, name: str, module: Any, known: Statistics | None) -> CompressedTensor:
        transposed = isinstance(module, Conv1D)
        weight = module.weight.detach()
        matrix = weight.T.contiguous() if transposed else weight
        # To nearest where no text came.
        codec = self.codec if known is not None else replace(self.codec, rounding=Nearest())
        with naming(name):
            payload = codec.encode(matrix, known)
        made = measured(matrix, (payload,), shape=tuple(weight.shape), transposed=transposed)
        with torch.no_grad():
            weight.copy_(made.decode())
        return made

    def _sums(self, modules: Mapping[str, Any], calls: list[_Call]) -> Sums:
        weights = {name: module.weight for name, module in modules.items()}
        total = Sums()
        for call in calls:
            batch = BatchSums()
            with Observer(weights, batch.see):
                self._run(call)
            total.add(batch.sums)
        return total

    def _run(self, call: _Call) -> Tensor:
        args, kwargs = replaced(*call, hidden_of(*call).clone())  # a block may work in place
        output = self.block(*args, **kwargs)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found


def _linear(block: nn.Module) -> dict[str, Any]:
    """Linear layers by their path in the block."""
    found = block.named_modules()
    return {name: module for name, module in found if isinstance(module, nn.Linear | Conv1D)}


def _calls(model: Any, blocks: list[nn.Module], batch: Tensor) -> list[_Call]:
    """How the model calls each of its blocks for a batch; only the first has its hidden states."""
    calls: dict[int, _Call] = {}

    def watch(index: int) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = hidden_of(args, kwargs)
            calls[index] = (args, kwargs) if index == 0 else replaced(args, kwargs, hidden[:0])

        return see

    hooks = [block.register_forward_pre_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    body = getattr(model, "base_model", model)  # without the head, whose logits nobody wants
    takes = inspect.signature(body.forward).parameters
    try:
        options = {"use_cache": False, "attention_mask": torch.ones_like(batch)}
        body(batch, **{name: value for name, value in options.items() if name in takes})
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) < len(blocks):
        raise CalibrationError(
            f"{type(model).__name__} does not call all of its {len(blocks)} blocks",
            hint="compress its checkpoint with tenpak.compress",
        )
    return [calls[index] for index in range(len(blocks))]


def _others(model: nn.Module, weights: Mapping[str, CompressedTensor]) -> dict[str, Tensor]:
    """The tensors of a model that were not compressed, tied ones once."""
    state = model.state_dict()
    held = {state[name].data_ptr() for name in weights}
    others = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in held or tensor.numel() == 0:
            held.add(tensor.data_ptr())
            others[name] = tensor
    return others


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _require_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or any(parameter.is_meta for parameter in model.parameters()):
        raise CalibrationError(
            f"{type(model).__name__} is no model with weights",
            hint="load it: transformers.AutoModelForCausalLM.from_pretrained(MODEL)",
        )


def _checked(model: Any, tokens: Tensor) -> Tensor:
    """Tokens that the model can read, where it is.

    Raises:
        CalibrationError: they are none.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
        raise CalibrationError(
            "calibration tokens are a tensor int64 [windows, length] with something in it",
            hint="e.g. torch.tensor(tokenizer(text)['input_ids'])[: 64 * 128].view(64, 128)",
        )
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    known = getattr(embedding, "num_embeddings", None)
    if int(tokens.min()) < 0 or (known is not None and int(tokens.max()) >= known):
        raise CalibrationError(
            f"there are tokens outside of the model's vocabulary of {known}", hint="use the model's own tokenizer"
        )
    return tokens.to(next(model.parameters()).device)


def _written(model: Any, seed: int) -> Tensor:
    """Text that the model writes itself, int64 ``[windows, length]``.

    Raises:
        CalibrationError: it cannot write.
    """
    if not hasattr(model, "generate"):
        raise CalibrationError(
            f"{type(model).__name__} cannot write text to calibrate on", hint="give tokens, int64 [windows, length]"
        )
    config = model.config
    length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
    first = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    device = next(model.parameters()).device
    start = torch.full((_WINDOWS, 1), first, dtype=torch.int64, device=device)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        written: Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=first,
        )
    return written
