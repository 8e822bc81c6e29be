"""Bytes by tensor, within blocks: the treemap of an artifact and the legend of its codecs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tenpak.report.card import size
from tenpak.report.contents import Contents, Stored, short_kinds
from tenpak.report.figure import COLOURS, PATTERNS, Figure, pattern, plain

__all__ = ["Legend", "legend", "treemap"]

_MOST_TILES = 1500  # more tensors than this are drawn by block and kind


@dataclass(frozen=True)
class Legend:
    """A codec with the number of its colour and pattern."""

    name: str
    number: int


def legend(contents: Contents) -> tuple[Legend, ...]:
    """Codecs with their colours and patterns, then what is no tensor."""
    names = [*contents.codecs, "headers"]
    return tuple(Legend(name, min(number, COLOURS - 1)) for number, name in enumerate(names))


def treemap(contents: Contents) -> Figure:
    """Bytes by tensor within blocks, headers included; areas are bytes, colours and patterns are codecs."""
    numbers = {entry.name: entry.number for entry in legend(contents)}
    root = contents.manifest.source.name
    tiles = _Tiles(root, contents.report.bytes)
    blocks: dict[int | None, list[_Tile]] = defaultdict(list)
    for tile in _tile_list(contents.tensors.values()):
        blocks[tile.block].append(tile)
    for block, found in blocks.items():
        parent = "" if block is None else f"b{block}"
        if block is not None:
            tiles.add(parent, f"block {block}", "", sum(tile.bytes for tile in found), "@box", "")
        for tile in found:
            number = numbers[tile.codec]
            tiles.add(f"t{tile.name}", tile.label, parent, tile.bytes, f"@c{number}", PATTERNS[number], tile)
    headers = contents.report.bytes - sum(tensor.bytes for tensor in contents.tensors.values())
    number = numbers["headers"]
    tiles.add("headers", "headers", "", headers, f"@c{number}", PATTERNS[number])
    biggest = max(contents.tensors.values(), key=lambda tensor: tensor.bytes, default=None)
    summary = f"{len(contents.tensors)} tensors in {size(contents.report.bytes)} of weight files."
    if biggest is not None:
        summary += f" The largest is {biggest.name} with {biggest.bytes / contents.report.bytes:.1%}."
    layout = {"margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "uniformtext": {"minsize": 9, "mode": "hide"}}
    return Figure("treemap", "Bytes by tensor", summary, [tiles.trace()], layout, 560)


@dataclass(frozen=True)
class _Tile:
    name: str
    label: str
    block: int | None
    codec: str
    bytes: int
    numel: int


def _tile_list(tensors: Iterable[Stored]) -> list[_Tile]:
    found = list(tensors)
    short = short_kinds(tensor.place.part for tensor in found)
    if len(found) <= _MOST_TILES:
        return [_Tile(t.name, _label(t, short), t.place.block, t.codec, t.bytes, t.numel) for t in found]
    groups: dict[tuple[int | None, str, str], list[Stored]] = defaultdict(list)
    for tensor in found:
        groups[tensor.place.block, tensor.place.part, tensor.codec].append(tensor)
    return [
        _Tile(
            first.name if len(group) == 1 else f"{len(group)} tensors like {first.name}",
            short[part] if len(group) == 1 else f"{short[part]} ({len(group)})",
            block,
            codec,
            sum(tensor.bytes for tensor in group),
            sum(tensor.numel for tensor in group),
        )
        for (block, part, codec), group in groups.items()
        for first in group[:1]
    ]


def _label(tensor: Stored, short: Mapping[str, str]) -> str:
    """The short name of its kind, with its number where it is one of several experts."""
    numbers = [piece for piece in tensor.name.split(".") if piece.isdecimal()]
    return short[tensor.place.part] + (f" {numbers[-1]}" if "*" in tensor.place.part and numbers else "")


class _Tiles:
    """The columns of a treemap, which plotly wants as lists."""

    def __init__(self, root: str, total: int) -> None:
        self.total = total
        self.columns: dict[str, list[Any]] = {
            "ids": ["root"], "labels": [plain(root)], "parents": [""], "values": [total], "text": [size(total)],
            "customdata": [f"{plain(root)}<br>{total:,} bytes"],
        }  # fmt: skip
        self.colours: list[str] = ["@box"]
        self.patterns: list[str] = [""]

    def add(
        self, key: str, label: str, parent: str, nbytes: int, colour: str, pattern: str, tile: _Tile | None = None
    ) -> None:
        told = f"{plain(tile.name if tile else label)}<br>{nbytes:,} bytes, {nbytes / self.total:.2%}"
        shown = size(nbytes)
        if tile is not None:
            told += f"<br>{8 * nbytes / max(tile.numel, 1):.3f} bits per weight, {plain(tile.codec)}"
        row = (plain(f"/{key}"), plain(label), f"/{parent}" if parent else "root", nbytes, shown, told)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.colours.append(colour)
        self.patterns.append(pattern)

    def trace(self) -> dict[str, Any]:
        return {
            "type": "treemap",
            **self.columns,
            "branchvalues": "total",
            "textinfo": "label+text",
            "hovertemplate": "%{customdata}<extra></extra>",
            "marker": {
                "colors": self.colours,
                "line": {"color": "@surface", "width": 1},
                "pad": {"t": 20, "l": 3, "r": 3, "b": 3},
                "pattern": pattern(self.patterns, self.colours),
            },
            "tiling": {"pad": 1},
            "pathbar": {"visible": True, "side": "top", "thickness": 22},
            "root": {"color": "@box"},
            "sort": True,
        }
