"""Results that several threads need for a while: made once each, the latest `size` of them kept."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """`make(key)` with a memory. Who asks for what another thread is making waits for it; an error is not kept."""

    def __init__(self, make: Callable[[K], V], size: int):
        self._make, self._size = make, size
        self._results: OrderedDict[K, Future[V]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, key: K) -> V:
        with self._lock:
            future = self._results.get(key)
            mine = future is None
            if future is None:
                future = self._results[key] = Future()
                if len(self._results) > self._size:
                    self._results.popitem(last=False)
            else:
                self._results.move_to_end(key)
        if mine:
            try:
                future.set_result(self._make(key))
            except BaseException as error:
                with self._lock:
                    self._results.pop(key, None)
                future.set_exception(error)
        return future.result()
