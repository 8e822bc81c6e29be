"""Which part of which block a matrix is: queries, keys, values, the attention's output, into or out of the MLP.

The last component of a parameter's path is read in pieces, so that ``q_proj``, ``wq``, ``query``, ``q_a_proj`` and
``query_key_value`` need no table of families; what its name does not tell, its neighbours and its shape do::

    q, k, v    a piece of the name says so, and only one of them
    qkv        several of them in one tensor, of which none can be addressed: GPT-2, NeoX, Falcon, Phi-3, MLA's ``kv_b``
    o          another matrix beside q, k, v or qkv
    up, down   by name, or [n, hidden] and [hidden, n] in a module all of whose matrices have hidden on one side
    other      everything else: routers, state space layers

The hidden size is the side that most matrices of the blocks have.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tenpak.checkpoint.structure import Weight

__all__ = ["Part", "Place", "places"]

Part = Literal["q", "k", "v", "qkv", "o", "up", "down", "other"]

_BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")
_WORDS: dict[Part, frozenset[str]] = {
    "q": frozenset({"q", "wq", "query"}),
    "k": frozenset({"k", "wk", "key"}),
    "v": frozenset({"v", "wv", "value"}),
}
_FUSED = {"qkv", "wqkv", "kv", "wkv", "qk", "attn"}
_UP = {"up_proj", "gate_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1", "w3", "lin1"}
_DOWN = {"down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "lin2"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_ENDS = 2  # boundary blocks at either end


@dataclass(frozen=True)
class Place:
    """Where in the model a matrix is.

    Attributes:
        part: of its block.
        block: number of the block, from 0.
        blocks: how many there are.
    """

    part: Part
    block: int
    blocks: int

    @property
    def boundary(self) -> bool:
        """Whether the block is one of the first or last two; of fewer where the model has less than five."""
        ends = min(_ENDS, (self.blocks - 1) // 2)
        return self.block < ends or self.block >= self.blocks - ends


def places(weights: Sequence[Weight]) -> dict[str, Place]:
    """The place of every matrix and expert that is in a block, by the tensor's name."""
    inside: dict[str, tuple[str, str, str]] = {}  # name → block, module within it, last component
    for weight in weights:
        found = _BLOCK.match(weight.parameter.removesuffix(".weight"))
        if found and weight.kind in ("matrix", "expert"):
            module, _, last = found[2].rpartition(".")
            inside[weight.name] = found[1], module, last
    blocks = {block: number for number, block in enumerate(dict.fromkeys(block for block, _, _ in inside.values()))}
    shapes = {weight.name: weight.matrix_shape for weight in weights if weight.name in inside}
    hidden = _hidden(list(shapes.values()))
    modules: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, (block, module, _) in inside.items():
        modules[block, module].append(name)
    parts: dict[str, Part] = {}
    for names in modules.values():
        parts |= _parts({name: inside[name][2] for name in names}, shapes, hidden)
    return {name: Place(parts[name], blocks[block], len(blocks)) for name, (block, _, _) in inside.items()}


def _hidden(shapes: Sequence[tuple[int, int]]) -> int:
    """The side that most matrices have, the larger of two that are as frequent; 0 where there are none."""
    sides = Counter(side for shape in shapes for side in shape)
    return max(sides, key=lambda side: (sides[side], side), default=0)


def _parts(names: dict[str, str], shapes: dict[str, tuple[int, int]], hidden: int) -> dict[str, Part]:
    """The parts of the tensors of one module, given the last component of each one's path."""
    parts = {name: _by_name(last) for name, last in names.items()}
    attention = any(part in ("q", "k", "v", "qkv") for part in parts.values())
    plain = all(hidden in shapes[name] for name in names)
    found: dict[str, Part] = {}
    for name, part in parts.items():
        if part is None and attention:
            part = "o"
        elif part is None and plain:
            part = _by_shape(*shapes[name], hidden)
        found[name] = part or "other"
    return found


def _by_name(last: str) -> Part | None:
    """What the last component of a path says; None where nothing."""
    pieces = set(re.split(r"[_\d]+", last.lower()))
    if pieces & _FUSED:
        return "qkv"
    said: list[Part] = [part for part, words in _WORDS.items() if pieces & words]
    if said:
        return said[0] if len(said) == 1 else "qkv"
    if last in _ROUTERS:
        return "other"
    return "up" if last in _UP else "down" if last in _DOWN else None


def _by_shape(rows: int, columns: int, hidden: int) -> Part | None:
    if rows == columns:
        return None
    return "up" if columns == hidden else "down"
