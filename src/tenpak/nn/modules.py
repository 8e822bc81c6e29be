"""Modules that hold a payload instead of a weight.

A module keeps its class's behaviour: nn.Linear, Conv1D or nn.Embedding is put *below* the model's own subclass in the
method resolution order, so Gemma's scaled embedding or OPT's shifted positions call our look-up where they call
``super().forward``. Whatever reads ``module.weight`` gets the decoded weight.

``runtime="memory"`` decodes on demand and forgets; ``"speed"`` keeps the decoded weight beside the payload.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from tenpak.artifact.blob import matrix_shape, split
from tenpak.artifact.schema import WeightEntry
from tenpak.codecs import registry
from tenpak.codecs.base import Payload, Tunable

__all__ = [
    "CompressedConv1D",
    "CompressedEmbedding",
    "CompressedLinear",
    "CompressedWeight",
    "Runtime",
    "SharedTensor",
    "StackedWeight",
    "install",
]

Runtime = Literal["memory", "speed"]


class SharedTensor:
    """A tensor that payloads of several weights share, in memory once on each device where one of them is.

    It is no buffer: each weight's module would move it by itself, and cast it with the model.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {tensor.device: tensor}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


class CompressedWeight(nn.Module):
    """The payloads of one compressed tensor, on whatever device and in whatever dtype the model is.

    Args:
        name: the tensor's name in the checkpoint.
        entry: what the manifest says of it.
        blob: its payload bytes, uint8 ``[n]``.
        dtype: dtype in which decoded weights enter products; follows ``model.to(dtype)``.
        shared: what its payloads share with those of other weights, by field.
    """

    codes: Tensor
    like: Tensor

    def __init__(
        self,
        name: str,
        entry: WeightEntry,
        blob: Tensor,
        dtype: torch.dtype,
        shared: Mapping[str, SharedTensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.entry = entry
        self.codec = registry.from_json(entry.codec)
        # A plain attribute until the model is loaded: transformers re-creates buffers that it did not load itself.
        self._pending: Tensor | None = blob
        self._shared = dict(shared or {})
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self._prepared: list[Any] | None = None
        self._kept: list[Tensor] | None = None
        self._is_hf_initialized = True

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the payload a buffer, after the model has been loaded around it."""
        if self._pending is not None:
            self.register_buffer("codes", self._pending.to(device))
            self.like = torch.empty(0, dtype=dtype, device=device)
            self._pending = None

    @property
    def blob(self) -> Tensor:
        """The payload bytes, uint8 ``[n]``."""
        return self.codes if self._pending is None else self._pending

    def payloads(self) -> list[Payload]:
        """The payloads, one per matrix, as views of the bytes."""
        return split(self.blob, self.entry, {name: one.on(self.blob.device) for name, one in self._shared.items()})

    def keep(self) -> None:
        """Decode once and keep the weights."""
        with torch.inference_mode(False), torch.no_grad():  # what stays must be of use in every mode
            self._kept = [self.codec.decode(payload).to(self.like.dtype) for payload in self.payloads()]

    def forget(self) -> None:
        """Drop what ``keep`` kept."""
        self._kept = None

    def matrix(self, index: int = 0) -> Tensor:
        """Matrix ``index`` decoded, ``[out, in]``, in the model's dtype; without data while the model is loaded."""
        if self._pending is not None:  # transformers initialises modules whose other tensors it has loaded
            return torch.empty(matrix_shape(self.entry), dtype=self.like.dtype, device="meta")
        if self._kept is not None:
            return self._kept[index]
        return self.codec.decode(self.payloads()[index]).to(self.like.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` of shape ``[..., in]``."""
        if self._kept is not None:
            return nn.functional.linear(x, self._kept[0].to(x.dtype))
        return self.codec.matmul(x, self._runtime()[0])

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` of the weight, ``[*indices.shape, in]``, in the model's dtype."""
        if self._kept is not None:
            return self._kept[0][indices]
        return self.codec.rows(indices, self._runtime()[0]).to(self.like.dtype)

    def _runtime(self) -> list[Any]:
        if self._prepared is None:
            with torch.inference_mode(False), torch.no_grad():  # as in ``keep``
                self._prepared = [self.codec.prepare(payload) for payload in self.payloads()]
        return self._prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepared = None  # views of the bytes where they were
        if self._kept is not None:
            self._kept = [fn(kept) for kept in self._kept]
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.name}, {self.entry.codec['id']}, {self.entry.bits / torch.Size(self.entry.shape).numel():.3g} bpw"
        )


class CompressedLinear(nn.Linear):
    """nn.Linear whose weight is a payload."""

    payload: CompressedWeight | Tunable

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in the base class
        return self.payload.matrix()

    def forward(self, input: Tensor) -> Tensor:
        product = self.payload.matmul(input)
        return product if self.bias is None else product + self.bias


class CompressedConv1D(Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """GPT-2's Conv1D, a linear layer whose weight is stored ``[in, out]``, with a payload."""

    payload: CompressedWeight | Tunable
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        return self.payload.matrix().T

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.payload.matmul(x) + self.bias
        return product


class CompressedEmbedding(nn.Embedding):
    """nn.Embedding whose weight is a payload; looks up rows without decoding the others."""

    payload: CompressedWeight | Tunable

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in the base class
        return self.payload.matrix()

    def forward(self, input: Tensor) -> Tensor:
        return self.payload.rows(input)


class StackedWeight(nn.Module):
    """Experts' weights ``[experts, rows, columns]`` as payloads; indexing with an expert decodes that one.

    transformers' eager experts index the stack expert by expert. A family that multiplies with the whole stack gets it
    decoded, through ``__torch_function__``.

    Args:
        parts: for each expert, the matrices that make up its rows, as (compressed tensor, index of the matrix).
        transposed: the model keeps each expert as ``[in, out]``.
    """

    def __init__(self, parts: Sequence[Sequence[tuple[CompressedWeight, int]]], *, transposed: bool) -> None:
        super().__init__()
        self.payloads = nn.ModuleList(dict.fromkeys(weight for expert in parts for weight, _ in expert))
        order: dict[nn.Module, int] = {weight: number for number, weight in enumerate(self.payloads)}
        self._parts = [[(order[weight], index) for weight, index in expert] for expert in parts]
        self._transposed = transposed
        self._is_hf_initialized = True

    def weights(self) -> list[CompressedWeight]:
        """The compressed tensors that the experts are made of."""
        return list(self.payloads)  # type: ignore[arg-type]  # ModuleList does not know what it holds

    def expert(self, index: int) -> Tensor:
        """One expert's weight, decoded, in the model's orientation and dtype."""
        weights = self.weights()
        matrices = [weights[number].matrix(matrix) for number, matrix in self._parts[index]]
        if self._transposed:
            matrices = [matrix.T for matrix in matrices]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    def dense(self) -> Tensor:
        """The whole stack, decoded."""
        return torch.stack([self.expert(index) for index in range(len(self._parts))])

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool):
            return self.expert(int(index))
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights()[0].like.dtype

    @property
    def device(self) -> torch.device:
        return self.weights()[0].like.device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.dense(), name)  # shape, transpose, …: what a plain tensor would answer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.dense() if isinstance(value, cls) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def install(module: nn.Module, payload: CompressedWeight | Tunable) -> None:
    """Replace the weight of a linear, Conv1D or embedding module by a payload, keeping everything else of it."""
    del module._parameters["weight"]
    module.__class__ = _compressed_class(type(module))  # type: ignore[arg-type]  # mypy takes classes for unhashable
    module.add_module("payload", payload)


@functools.cache
def _compressed_class(original: type[nn.Module]) -> type[nn.Module]:
    for plain, compressed in (
        (nn.Linear, CompressedLinear),
        (Conv1D, CompressedConv1D),
        (nn.Embedding, CompressedEmbedding),
    ):
        if original is plain:
            return compressed
        if issubclass(original, plain):
            return type(f"Compressed{original.__name__}", (original, compressed), {})
    raise TypeError(f"{original.__name__} is no linear layer or embedding")
