"""The sizes of the reference model: Llama's layout at widths that every codec and file format can hold.

All widths that a product sums over are multiples of 256, the largest group that compressed formats know, so that no row
ends in part of a group. Heads are of 64, two or three queries share a key and a value head, and embeddings are tied: at
this size a second matrix of the vocabulary would hold more than the layers do.

A step reads ``batch`` blocks of ``context`` tokens. Early steps cut each block into shorter sequences (``stages``):
attention over 1024 tokens costs a processor a good part of what a small model's matrices do, and what a model learns
first is local (Li et al., "The Stability-Efficiency Dilemma", arXiv 2108.06084). The tokens of a step stay the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

__all__ = ["RECIPES", "Recipe", "config"]


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Attributes:
        name: also that of the exported folder.
        width: of the residual stream; query heads are of ``head`` and fill it.
        layers: decoder blocks.
        ffn: width inside the feed-forward network.
        vocabulary: tokens, with the 256 bytes and the end of a document.
        head: width of a head.
        key_values: key and value heads of a layer.
        context: tokens of a block of data, and the longest sequence that the model learns.
        stages: (from this share of the training, sequences of so many tokens), the first from 0; each divides a block.
        tokens: of the whole training, where no time is given.
        batch: blocks per step.
        micro: tokens that go through the model at once; gradients of a step's parts are summed.
        matrix_rate: Muon's learning rate, for the matrices of the layers.
        other_rate: AdamW's, for embedding and norms.
        weight_decay: of the matrices, per unit of learning rate.
        warmup: share of the training in which rates rise from zero.
        decay: how rates fall to zero afterwards, ``"linear"`` or ``"cosine"``.
        clip: largest norm of the gradient.
        seed: of the initial weights and of the order of the data.
    """

    name: str
    width: int
    layers: int
    ffn: int
    vocabulary: int
    key_values: int
    tokens: int
    batch: int
    micro: int
    head: int = 64
    context: int = 1024
    stages: tuple[tuple[float, int], ...] = ((0.0, 256), (0.6, 1024))
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    weight_decay: float = 0.05
    warmup: float = 0.02
    decay: str = "linear"
    clip: float = 1.0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as JSON gives them back."""
        fields = dataclasses.asdict(self)
        fields["stages"] = [list(stage) for stage in self.stages]
        return fields


# One pass over the corpus is about 40 M tokens; up to four are nearly as good as fresh text (Muennighoff et al., arXiv
# 2305.16264).
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("ref-8m", 256, 8, 768, 4096, key_values=2, tokens=40_000_000, batch=4, micro=4096),
        Recipe("ref-30m", 512, 8, 1536, 8192, key_values=4, tokens=140_000_000, batch=32, micro=32_768),
        Recipe(
            "ref-110m", 768, 12, 2048, 8192, key_values=4, tokens=140_000_000, batch=64, micro=32_768, decay="cosine"
        ),
    )
}


def config(recipe: Recipe) -> LlamaConfig:
    """The architecture of ``recipe``; ``<|endoftext|>``, token 0, begins and ends a text."""
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // recipe.head,
        num_key_value_heads=recipe.key_values,
        head_dim=recipe.head,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
