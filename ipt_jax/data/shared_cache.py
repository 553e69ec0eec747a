"""Results that threads share, and threads that wait for reads.

On a network disk a read costs milliseconds, however small it is, so many reads run at once.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any, Generic, TypeVar

THREADS = 32
QUICK_SECONDS = 1e-4  # a read from memory; passing it to a thread costs as much
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Item = TypeVar("Item")


def in_threads(function: Callable[[Item], V], items: Sequence[Item]) -> list[V]:
    """`function` of each item, in order: in this thread until one is slow, then in threads. It must not call this."""
    results: list[V] = []
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


class _Slot:
    __slots__ = ("lock", "made", "value")

    def __init__(self, key: Hashable):
        self.lock, self.made = Lock(), False
        self.value: Any = None


class SharedCache(Generic[K, V]):
    """`make(key)`, kept for the `size` keys used last. Threads that ask for one key share one call of `make`. An error
    is not cached."""

    def __init__(self, make: Callable[[K], V], size: int):
        self._make, self._slots = make, lru_cache(size)(_Slot)

    def __call__(self, key: K) -> V:
        slot = self._slots(key)
        if not slot.made:
            with slot.lock:
                if not slot.made:
                    slot.value = self._make(key)
                    slot.made = True
        return slot.value

    def many(self, keys: Sequence[K]) -> list[V]:
        """The results of several keys, made in threads. `make` must not call this."""
        return in_threads(self, keys)
