"""Threads that wait for reads: on a network disk a read costs milliseconds however small, so many run at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

THREADS = 16
A = TypeVar("A")
B = TypeVar("B")


def in_threads(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`function` of each item, in order; a thread takes every sixteenth. `function` must not call this one."""
    if len(items) == 1:
        return [function(items[0])]
    shares = [items[i::THREADS] for i in range(min(THREADS, len(items)))]
    results: list[B | None] = [None] * len(items)
    for i, found in enumerate(_pool().map(lambda share: [function(item) for item in share], shares)):
        results[i::THREADS] = found
    return results  # type: ignore[return-value]  # every place is filled


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="reads")
