"""Diagnostics: not only how far an artifact is from its original, but where that comes from.

``diagnosis`` has the one entry; ``activations``, ``weights`` (with ``spectrum``), ``bill``, ``decoding`` and
``generation`` look at one thing each, on the models and the text that ``pair`` holds; ``verdict`` puts it into words.
"""

from __future__ import annotations

from tenpak.evaluation.diagnostics.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
