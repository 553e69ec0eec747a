"""Results that several threads need for a while: made once each, the `size` made last are kept.

Threads that wait for reads: on a network disk a read costs milliseconds however small, so many run at once.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Generic, TypeVar

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


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SharedCache(Generic[K, V]):
    """`make(key)` with a memory. Who asks for what another thread is making waits for it; an error is not kept."""

    def __init__(self, make: Callable[[K], V], size: int):
        self._make, self._size = make, size
        self._made: dict[K, V] = {}
        self._making: dict[K, Future[V]] = {}
        self._lock = Lock()

    def __call__(self, key: K) -> V:
        with self._lock:
            if key in self._made:
                return self._made[key]
            future, mine = self._making.get(key), key not in self._making
            if future is None:
                future = self._making[key] = Future()
        if mine:
            self._finish(key, future)
        return future.result()

    def many(self, keys: Sequence[K]) -> list[V]:
        """The results of several keys; what is missing is made in threads. `make` must not call this."""
        with self._lock:
            found = {key: self._made[key] for key in keys if key in self._made}
        missing = [key for key in keys if key not in found]
        found.update(zip(missing, in_threads(self, missing), strict=True))
        return [found[key] for key in keys]

    def _finish(self, key: K, future: Future[V]) -> None:
        try:
            made = self._make(key)
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            return
        with self._lock:
            del self._making[key]
            self._made[key] = made
            if len(self._made) > self._size:
                del self._made[next(iter(self._made))]
        future.set_result(made)
