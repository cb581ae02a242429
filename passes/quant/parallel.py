"""Work on every core, results in order.

Kernels are single-threaded and release the GIL; whoever has many pieces of work spreads the pieces. So results do not
depend on the number of cores, nothing spins at a barrier while the disk is waited for, and the pieces stay in the cache.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, as `map` gives it; two items a core are under way at a time, so `items` may be long."""
    cores = core_count()
    under_way: deque[Future[R]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) >= 2 * cores:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
