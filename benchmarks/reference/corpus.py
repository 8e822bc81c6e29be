"""The documents of a corpus of text, one at a time from the compressed file: memory holds one of them, not the corpus.

``<|endoftext|>`` ends a document. The text of WikiText is one document between two of them, so its articles are told
apart by their titles, lines of the form `` = Title = ``; what follows is about one thing, as elsewhere in the corpus.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["END", "documents"]

END = "<|endoftext|>"
_TITLE = re.compile(r" = [^=\n]+ = ?\n")


def documents(path: Path) -> Iterator[str]:
    """The documents of ``path`` (UTF-8, ``.xz`` or plain), stripped, none of them empty.

    Raises:
        OSError: the file cannot be read.
        lzma.LZMAError: it is not, or not to its end, what its name says.
    """
    lines: list[str] = []
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            head, *rest = line.split(END)
            if _TITLE.fullmatch(line):
                yield from _joined(lines)
                lines = [line]
                continue
            lines.append(head)
            for part in rest:
                yield from _joined(lines)
                lines = [part]
    yield from _joined(lines)


def _joined(lines: list[str]) -> Iterator[str]:
    if text := "".join(lines).strip():
        yield text
