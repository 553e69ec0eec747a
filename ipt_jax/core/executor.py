"""Runs one function over many units: in a pool of processes on this machine, or as Ray tasks on a cluster.

The function and its items are the same either way, so the results are too. Results come in the order of completion.
Worker processes die with the process that started the pool, however it dies.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Literal, TypeVar

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
    """(index, function(item)) in order of completion. `workers` None means one a core, of the cluster or of this
    machine; 1 on this machine runs in this process."""
    if executor == "ray":
        yield from _run_ray(function, items, workers)
        return
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers <= 1:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy the threads of readers half-alive
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=partial(die_with, os.getpid())) as pool:
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was ended from outside, most often because memory ran out; "
                "run the same command again with fewer workers"
            ) from error
        except BaseException:  # what the workers are at would be thrown away: nobody has to wait for it
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            pool.shutdown(cancel_futures=True)
            raise


def die_with(parent: int) -> None:
    """Ends this worker soon after process `parent` is gone; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)


def _run_ray(
    function: Callable[[WorkItem], Result], items: Sequence[WorkItem], workers: int | None
) -> Iterator[tuple[int, Result]]:
    """The cluster of RAY_ADDRESS, or a Ray of this machine alone. At most four tasks a CPU wait at a time.

    A task whose machine is lost is run again by Ray, elsewhere.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "executor ray: Ray is not installed; run launch/setup.sh ray, or use executor: local"
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=1)(function)
    limit = workers or max(4 * int(ray.cluster_resources().get("CPU", 1)), 1)
    waiting: dict[ray.ObjectRef, int] = {}
    for index, item in enumerate(items):
        waiting[task.remote(item)] = index
        if len(waiting) >= limit:
            yield _next_done(ray, waiting)
    while waiting:
        yield _next_done(ray, waiting)


def _next_done(ray, waiting):  # type: ignore[no-untyped-def]
    (done,), _ = ray.wait(list(waiting), num_returns=1)
    try:
        return waiting.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # the task's own exception, whose message Ray would bury in a traceback
