"""Modules that synthesize their weights on demand, as many at a time as fit a cache that is bounded in bytes.

A product is made tile by tile of output rows, at most 4 MiB of synthesized weights each, so memory is that of the
cache and of a tile or two, however large the layer is. Patterns are held once for all modules that share a dictionary,
and what they add to a module are codes and scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenpak.codecs import registry
from tenpak.codecs.base import Payload
from tenpak.codecs.block_cache import BlockCache
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.patterns import PatternDictionary
from tenpak.errors import CodecError
from tenpak.kernels.parallel import give_back_memory
from tenpak.pixel.config import PIXELConfig
from tenpak.pixel.matrices import Encoder, naming
from tenpak.pixel.tensors import measured

__all__ = ["PIXELLinear", "PIXELMemory", "PatternAttention", "memory_held", "replace_linear_layers"]

_TILE_BYTES = 4 << 20
_SHARED = "patterns"
_keys = itertools.count()


class _Bytes(nn.Module):
    """Tensors as bytes, so that ``model.to(dtype)`` leaves them as they are; one module may be part of many.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._forms = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous().reshape(-1).view(torch.uint8))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, as views of the bytes."""
        return {name: getattr(self, name).view(dtype).view(shape) for name, (dtype, shape) in self._forms.items()}


class PIXELLinear(nn.Module):
    """A linear layer, or GPT-2's Conv1D, whose weight is synthesized from patterns when it is needed.

    Its input may need a gradient; the weight has none.

    Args:
        payloads: whose sum is the weight ``[out, in]``.
        shared: ``patterns`` of those that are of ``pattern/1``.
        bias: ``[out]``, or None.
        cache: of synthesized weights, which modules may share.
        transposed: show ``weight`` as ``[in, out]``, as Conv1D does.
    """

    like: Tensor

    def __init__(
        self,
        payloads: Sequence[Payload],
        shared: _Bytes,
        bias: Tensor | None,
        cache: BlockCache,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = payloads[0].shape
        self.transposed = transposed
        self.cache = cache
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("like", torch.empty(0, dtype=payloads[0].dtype), persistent=False)
        self.shared = shared
        own = [{name: t for name, t in payload.tensors.items() if name != _SHARED} for payload in payloads]
        self.parts = nn.ModuleList(map(_Bytes, own))
        self._configs = [payload.codec for payload in payloads]
        self._key = next(_keys)
        self.register_load_state_dict_post_hook(_reloaded)  # type: ignore[no-untyped-call]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D,
        dictionary: PatternDictionary,
        *,
        config: PIXELConfig | None = None,
        cache: BlockCache | None = None,
    ) -> Self:
        """A linear layer made of a dictionary's patterns.

        Args:
            linear: nn.Linear or Conv1D, whose weight is finite.
            dictionary: of any size of patterns; it is not held.
            config: terms, scales and residual are used; patterns alone where it is None.
            cache: of synthesized weights; one of 200 MB where it is None.

        Raises:
            CodecError: the weight is not finite, or the dictionary empty.
        """
        config = config or PIXELConfig(residual=None)
        encoder = Encoder(dictionary, config.terms, config.scales_codec, config.rest)
        cache = BlockCache(config.cache_bytes) if cache is None else cache
        return cls._encoded(linear, encoder, _shared(encoder, linear), cache)[0]

    @classmethod
    def _encoded(cls, linear: Any, encoder: Encoder, shared: _Bytes, cache: BlockCache) -> tuple[Self, float]:
        """The module and its relative error."""
        transposed = isinstance(linear, Conv1D)
        weight = linear.weight.detach()
        if weight.is_meta:
            raise CodecError("the weight has no data", hint="load the model before")
        matrix = weight.T.contiguous() if transposed else weight
        payloads = encoder.encode(matrix)
        made = cls(payloads, shared, linear.bias, cache, transposed=transposed).train(linear.training)
        return made, measured(matrix, payloads).error

    @property
    def weight(self) -> Tensor:
        """The weight, synthesized: ``[out, in]``, of a Conv1D ``[in, out]``."""
        tiles = [self._tile(start, self.like.dtype) for start in self._starts()]
        matrix = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return matrix.T if self.transposed else matrix

    def forward(self, input: Tensor) -> Tensor:
        """``input @ W.T + bias`` for ``[..., in]``."""
        misses = self.cache.misses
        products = [nn.functional.linear(input, self._tile(start, input.dtype)) for start in self._starts()]
        if self.cache.misses > misses:
            give_back_memory()  # of what tiles were made of; glibc kept 150 MB of it
        product = products[0] if len(products) == 1 else torch.cat(products, -1)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        names = " + ".join(str(config["id"]) for config in self._configs)
        return f"in_features={self.in_features}, out_features={self.out_features}, {names}"

    def _starts(self) -> range:
        """First rows of the tiles."""
        return range(0, self.out_features, max(1, _TILE_BYTES // (4 * self.in_features)))

    def _tile(self, start: int, dtype: torch.dtype) -> Tensor:
        rows = self._starts().step
        key = (self._key, start, dtype)
        return self.cache.get(key, lambda: self._synthesized(slice(start, start + rows)).to(dtype))

    @torch.no_grad()
    def _synthesized(self, rows: slice) -> Tensor:
        shape = (self.out_features, self.in_features)
        indices = torch.arange(*rows.indices(self.out_features), device=self.like.device)
        total: Tensor | None = None
        for config, part in zip(self._configs, self.parts, strict=True):
            codec = registry.from_json(config)
            assert isinstance(part, _Bytes)
            tensors = part.tensors()
            if isinstance(codec, Pattern) and len(given := codec.shared(self.shared.tensors()[_SHARED], shape)):
                tensors[_SHARED] = given
            # Prepared for this tile only: with large dictionaries it would be the larger part of what is held.
            prepared = codec.prepare(Payload(config, shape, self.like.dtype, tensors))
            values = codec.rows(indices, prepared)
            total = values if total is None else total + values
        assert total is not None  # there is a part at least
        return total

    def _changed(self) -> None:
        """What the cache holds is of other codes."""
        self._key = next(_keys)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._changed()
        return self


def _reloaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, PIXELLinear)
    module._changed()


def _shared(encoder: Encoder, linear: Any) -> _Bytes:
    return _Bytes({_SHARED: encoder.patterns.to(linear.weight.device)})


def replace_linear_layers(
    model: nn.Module,
    dictionary: PatternDictionary,
    *,
    config: PIXELConfig | None = None,
    cache: BlockCache | None = None,
) -> dict[str, float]:
    """Replace the linear layers (and Conv1D) of a module by ``PIXELLinear``, in place; they share patterns and cache.

    Layers whose weight is also an embedding, subclasses that do more than multiply, and what is no module (stacked
    experts) stay.

    Args:
        model: any module that holds linear layers: a transformers model, or the attention of one of its blocks.
        dictionary: of any size of patterns; it is not held, and may change later.
        config: terms, scales and residual are used; patterns alone where it is None.
        cache: of synthesized weights; one of ``config.cache_bytes`` where it is None.

    Returns:
        Path of each layer → relative error of its weight, ‖W - Ŵ‖ / ‖W‖.

    Raises:
        CodecError: there is no linear layer, a weight is not finite (the message names it), or the dictionary is empty.
    """
    config = config or PIXELConfig(residual=None)
    encoder = Encoder(dictionary, config.terms, config.scales_codec, config.rest)
    cache = BlockCache(config.cache_bytes) if cache is None else cache
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {
        name: module
        for name, module in model.named_modules()
        if name and _is_linear(module) and id(module.weight) not in looked_up
    }
    if not found:
        raise CodecError(
            f"{type(model).__name__} holds no linear layer to replace",
            hint="give the module that holds them; PIXELLinear.from_linear converts a single one",
        )
    shared = _shared(encoder, next(iter(found.values())))
    made, errors = {}, {}
    for name, module in found.items():
        with naming(name):
            made[id(module)], errors[name] = PIXELLinear._encoded(module, encoder, shared, cache)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # one may be there twice
            if id(child) in made:
                setattr(parent, attribute, made[id(child)])
    return errors


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else; of a subclass an example tells."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or module.weight.is_meta or set(module.state_dict()) - {"weight", "bias"}:
        return False
    x = torch.linspace(-1, 1, 3 * module.in_features).view(3, -1).to(module.weight)
    try:
        return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), rtol=1e-3, atol=1e-3)
    except Exception:  # its forward may ask for anything
        return False


class PatternAttention(nn.Module):
    """nn.MultiheadAttention whose projections are made of patterns; called in the same way.

    For the attention of a transformers model, call ``replace_linear_layers`` on it.

    Args:
        attention: of which it is made; without ``add_bias_kv`` and ``add_zero_attn``.
        dictionary: of any size of patterns; it is not held.
        config: terms, scales and residual are used; patterns alone where it is None.
        cache: of synthesized weights; one of ``config.cache_bytes`` where it is None.

    Attributes:
        errors: relative errors of ``query``, ``key``, ``value`` and ``output``.

    Raises:
        CodecError: the attention has learned keys, or a weight is not finite.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        dictionary: PatternDictionary,
        *,
        config: PIXELConfig | None = None,
        cache: BlockCache | None = None,
    ) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn:
            raise CodecError(
                "attention with add_bias_kv or add_zero_attn cannot be replaced", hint="make it without them"
            )
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.projections = nn.ModuleDict(_projections(attention))  # in the order of their names below
        self.errors = replace_linear_layers(self.projections, dictionary, config=config, cache=cache)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        turned = self.batch_first and query.ndim == 3
        if turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v, out = (layer for layer in self.projections.values() if isinstance(layer, PIXELLinear))
        output, weights = nn.functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            None,
            None if q.bias is None or k.bias is None or v.bias is None else torch.cat((q.bias, k.bias, v.bias)),
            None,
            None,
            False,
            self.dropout,
            out.weight,
            out.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=q.weight,
            k_proj_weight=k.weight,
            v_proj_weight=v.weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if turned else output), weights


def _projections(attention: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """The projections as linear layers."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.detach().chunk(3)
    else:
        weights = tuple(w.detach() for w in (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight))
    bias = attention.in_proj_bias
    biases = (None, None, None) if bias is None else bias.detach().chunk(3)
    named: dict[str, nn.Module] = {}
    for name, weight, its_bias in zip(("query", "key", "value"), weights, biases, strict=True):
        named[name] = linear = nn.Linear(weight.shape[1], weight.shape[0], bias=its_bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if its_bias is not None:
            linear.bias = nn.Parameter(its_bias)
    out = attention.out_proj
    named["output"] = linear = nn.Linear(out.in_features, out.out_features, bias=out.bias is not None, device="meta")
    linear.weight, linear.bias = out.weight, out.bias
    return named


@dataclass(frozen=True)
class PIXELMemory:
    """What the ``PIXELLinear`` modules of a model hold, in bytes; what they share is counted once.

    Attributes:
        patterns: of their dictionaries.
        codes: codes, scales and what follows patterns.
        cache: synthesized weights just now.
        cache_limit: that these may take.
    """

    patterns: int
    codes: int
    cache: int
    cache_limit: int

    @property
    def total(self) -> int:
        """All that is held just now."""
        return self.patterns + self.codes + self.cache


def memory_held(model: nn.Module) -> PIXELMemory:
    """What the ``PIXELLinear`` modules of a model hold."""
    layers = [module for module in model.modules() if isinstance(module, PIXELLinear)]
    caches = {id(layer.cache): layer.cache for layer in layers}
    dictionaries = {id(layer.shared): layer.shared for layer in layers}
    return PIXELMemory(
        sum(buffer.nbytes for shared in dictionaries.values() for buffer in shared.buffers()),
        sum(buffer.nbytes for layer in layers for buffer in layer.parts.buffers()),
        sum(cache.nbytes for cache in caches.values()),
        sum(cache.max_bytes for cache in caches.values()),
    )
