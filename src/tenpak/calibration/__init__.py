"""Calibration: the text that a model is measured on, as tokens and windows."""

from __future__ import annotations

from tenpak.calibration.text import Window, context_length, load_text, sample_text, tokenize, windows

__all__ = ["Window", "context_length", "load_text", "sample_text", "tokenize", "windows"]
