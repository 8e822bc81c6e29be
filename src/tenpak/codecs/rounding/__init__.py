"""Roundings: how an encoder chooses codes and group parameters, apart from the bytes that they are stored in.

A codec with a grid says what its levels are (``Grids``, ``Levels``); a rounding decides which level each weight takes.
Any rounding works with any such codec and writes the same payload fields, so ``decode`` never looks at it. It is a
field of the codec all the same: an artifact says how it was made.

In JSON a rounding is ``{"name": "gptq", "damping": 0.01, ...}``, or just its name for its default options. A codec that
rounds to nearest has no such entry at all, which is how codecs were written before there was a choice.
"""

from __future__ import annotations

from tenpak.codecs.rounding.base import Column, Grids, Levels, Rounded, Rounding
from tenpak.codecs.rounding.gptq import Gptq
from tenpak.codecs.rounding.names import from_json, require_rounding
from tenpak.codecs.rounding.nearest import Nearest

__all__ = ["Column", "Gptq", "Grids", "Levels", "Nearest", "Rounded", "Rounding", "from_json", "require_rounding"]
