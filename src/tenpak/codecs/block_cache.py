"""A cache of synthesized weights that is bounded in bytes: what was not used for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

from torch import Tensor

__all__ = ["BlockCache"]


class BlockCache:
    """Synthesized weights, of which the least recently used are dropped beyond ``max_bytes``; safe among threads.

    Args:
        max_bytes: that it may hold.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._held: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[BlockCache], tuple[int]]:
        return BlockCache, (self.max_bytes,)  # a copy starts empty: what is held can be made again

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, synthesize: Callable[[], Tensor]) -> Tensor:
        """What is held as ``key``, made by ``synthesize`` where it is not; kept unless it alone is too large."""
        with self._lock:
            if key in self._held:
                self.hits += 1
                self._held.move_to_end(key)
                return self._held[key]
            self.misses += 1
        made = synthesize()  # outside of the lock: others need not wait
        size = made.numel() * made.element_size()
        with self._lock:
            if key not in self._held and size <= self.max_bytes:
                self._held[key] = made
                self.nbytes += size
                while self.nbytes > self.max_bytes:
                    _, dropped = self._held.popitem(last=False)
                    self.nbytes -= dropped.numel() * dropped.element_size()
        return made

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._held.clear()
            self.nbytes = 0
