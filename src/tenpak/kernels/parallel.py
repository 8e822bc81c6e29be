"""Work on several items at a time, one thread each, with results in order.

One torch thread an item: what is computed cannot depend on the number of workers, and threads need not wait for each
other at every operation, which costs most where other programs use the same cores.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

__all__ = ["each", "give_back_memory", "one_thread", "ordered_map", "worker_count"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each worker holds an item and its result; more of them would rarely be faster and always be larger.
_MAX_WORKERS = 4


def worker_count() -> int:
    """How many items are worked on at a time: torch's threads, at most four."""
    return min(torch.get_num_threads(), _MAX_WORKERS)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums that several share are added in an order that depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map``, with a few items ahead of the one whose result is taken; an error ends it when its turn comes.

    Until it ends, the thread that takes the results computes with one thread as well: more would take the workers'
    cores and, where others use these too, wait for them at every operation. Workers compute in its inference and
    gradient mode, which torch keeps for each thread: what it made under ``torch.inference_mode`` nobody else may fill.
    """
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def worked(item: Item) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(item)

    rest = iter(items)
    pending: deque[Future[Result]] = deque()
    workers, threads = worker_count(), torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            pending.extend(pool.submit(worked, item) for item in islice(rest, workers))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(worked, item) for item in islice(rest, 1))
                yield result
        finally:
            torch.set_num_threads(threads)
            pool.shutdown(wait=True, cancel_futures=True)
            give_back_memory()


def each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """All results of ``ordered_map``, without its cost where there is nothing to share."""
    if len(items) > 1 and worker_count() > 1:
        return list(ordered_map(work, items))
    with one_thread():
        return [work(item) for item in items]


def give_back_memory() -> None:
    """Return what has been freed to the system: glibc keeps it in an arena for each thread, more with every pass."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """The C library, where it can trim its heaps (glibc)."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


_LIBC = _libc()
