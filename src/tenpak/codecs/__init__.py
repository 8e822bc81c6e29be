"""Codecs: what turns a weight matrix into a payload and back; ``registry`` finds them by id.

The classes themselves are imported when a configuration or recipe names them.
"""

from __future__ import annotations

from tenpak.codecs.base import Codec, Field, Payload, Statistics
from tenpak.codecs.registry import from_json, get, ids

__all__ = ["Codec", "Field", "Payload", "Statistics", "from_json", "get", "ids"]
