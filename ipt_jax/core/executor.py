"""Runs one function over many items: in a pool of processes on this machine, or as Ray tasks on a cluster.

Function, items and results are the same in both. Results come in the order of completion. Worker processes end when
the process that started the pool ends, for any reason.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from ipt_jax.core.errors import UserError

WorkItem = TypeVar("WorkItem")
Result = TypeVar("Result")
ExecutorName = Literal["local", "ray"]


def run_units(
    function: Callable[[WorkItem], Result],
    items: Sequence[WorkItem],
    *,
    workers: int | None = None,
    executor: ExecutorName = "local",
) -> Iterator[tuple[int, Result]]:
    """(index, function(item)) in the order of completion.

    `workers`: None means one per core of this machine, or four tasks per CPU of the cluster. With 1 the function runs
    in this process.
    """
    if executor == "ray":
        yield from _run_ray(function, items, workers)
        return
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers <= 1:
        yield from enumerate(map(function, items))
        return
    context = multiprocessing.get_context("forkserver")  # a fork would copy the locks of reader threads
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most often because memory ran out; rerun with fewer workers"
            ) from error
        except BaseException:  # the results of running workers would be discarded: do not wait for them
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Kills this worker when its parent process ends. Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def connect_ray() -> Any:
    """The package `ray`, connected to the cluster at RAY_ADDRESS or started on this machine."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "executor ray: Ray is not installed; run launch/setup.sh ray, or set executor: local"
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray


def _run_ray(
    function: Callable[[WorkItem], Result], items: Sequence[WorkItem], workers: int | None
) -> Iterator[tuple[int, Result]]:
    """Ray reruns the tasks of a lost machine."""
    ray = connect_ray()
    task = ray.remote(num_cpus=1)(lambda item: function(item))  # Ray takes no partial
    limit = workers or max(4 * int(ray.cluster_resources().get("CPU", 1)), 1)
    running: dict[Any, int] = {}
    left = enumerate(items)
    while True:
        while len(running) < limit and (following := next(left, None)) is not None:
            running[task.remote(following[1])] = following[0]
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        try:
            yield running.pop(done), ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the task's own exception; Ray's message is a traceback
