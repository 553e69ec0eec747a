"""Keeps many groups in flight on one engine, a bounded number at a time, and passes each on when it is complete.

A group has one request at a time. There are more groups than the engine has places, so that requests always wait and no
place is idle while an answer is parsed and the next prompt is built. Later rounds are served before first ones, so
their prefixes are still in the cache. The corpus is read as groups are taken.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ipt_jax.corpus.records import SynthGroup
from synth.engine.base import Engine

GroupInput = TypeVar("GroupInput")  # texts, or a group without scores
Held = TypeVar("Held", contravariant=True)
Put = Callable[[GroupInput, SynthGroup], None]


class Answers(Protocol[Held]):
    """Makes a group of an item: a chain asks for pairs, a verifier for scores."""

    async def run(self, engine: Engine, item: Held, /) -> SynthGroup: ...


async def run_groups(
    engine: Engine, chain: Answers[GroupInput], groups: Iterator[GroupInput], put: Put[GroupInput]
) -> None:
    """Answers all groups. Any exception but `RequestFailed` ends it, and so do SIGINT and SIGTERM.

    They raise KeyboardInterrupt and SystemExit here; complete groups have been put, others are cancelled.
    """

    async def answer() -> None:
        for group in groups:  # one iterator, shared by all tasks
            put(group, await chain.run(engine, group))

    with stop_signal() as stop:
        tasks = [asyncio.create_task(answer()) for _ in range(in_flight(engine.places))]
        done = asyncio.gather(*tasks)
        either: set[asyncio.Future[Any]] = {done, stop}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():  # first: Ctrl-C in a terminal also ends an engine's processes, and requests fail
                raise KeyboardInterrupt if stop.result() == signal.SIGINT else SystemExit(128 + stop.result())
            done.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(done, *tasks, return_exceptions=True)


def in_flight(places: int) -> int:
    """Number of concurrent groups: 1.5 times the engine's places, at least four more."""
    return places + max(4, places // 2)


@contextmanager
def stop_signal() -> Iterator[asyncio.Future[signal.Signals]]:
    """Done after SIGINT or SIGTERM. Outside the main thread no signals arrive, and it stays pending."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[signal.Signals] = loop.create_future()

    def set_once(name: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(name)

    names = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for name in names:
        loop.add_signal_handler(name, set_once, name)
    try:
        yield stop
    finally:
        for name in names:
            loop.remove_signal_handler(name)
