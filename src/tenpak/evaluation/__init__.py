"""Evaluation: what compression cost, measured on the model that was loaded back.

``tenpak.evaluation.memory`` is imported on its own: it also runs as a program.
"""

from __future__ import annotations

from tenpak.evaluation.fidelity import Fidelity, fidelity
from tenpak.evaluation.perplexity import Perplexity, perplexity
from tenpak.evaluation.statistics import bootstrap

__all__ = ["Fidelity", "Perplexity", "bootstrap", "fidelity", "perplexity"]
