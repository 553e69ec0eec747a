"""Threads that wait for reads: on a network disk a read costs milliseconds however small, so many run at once."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

THREADS = 32
QUICK_SECONDS = 1e-4  # a read from memory; handing it to a thread costs as much
A = TypeVar("A")
B = TypeVar("B")


def in_threads(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`function` of each item, in order: here as long as it is quick, then in threads. It must not call this one."""
    results: list[B] = []
    began = time.perf_counter()
    for item in items:
        results.append(function(item))
        ended = time.perf_counter()
        if ended - began > QUICK_SECONDS:
            break
        began = ended
    left = items[len(results) :]
    if not left:
        return results
    shares = [left[i::THREADS] for i in range(min(THREADS, len(left)))]
    found = list(_pool().map(lambda share: [function(item) for item in share], shares))
    return results + [found[i % THREADS][i // THREADS] for i in range(len(left))]


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="reads")
