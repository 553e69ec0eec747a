"""Keeps many groups going on one engine, a bounded number at a time, and hands each on as soon as it is whole.

One group has one request at a time, so as many groups as the engine takes sequences keep it full, and a group that goes
on finds its prefix in the cache. SIGINT and SIGTERM let what is whole be stored and give up the rest; anything that an
engine raises but `RequestFailed` ends the drive.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from ipt_jax.corpus.records import SynthGroup
from synth.engine import Engine

Item = TypeVar("Item")  # what becomes a group: texts, or a group without scores
Held = TypeVar("Held", contravariant=True)
Put = Callable[[Item, SynthGroup], None]
Running = dict[asyncio.Task[SynthGroup], Item]


class Answers(Protocol[Held]):
    """What makes a group of an item: a chain asks for pairs, a verifier for scores."""

    async def run(self, engine: Engine, item: Held, /) -> SynthGroup: ...


async def drive(
    engine: Engine, chain: Answers[Item], groups: Iterator[Item], put: Put[Item], in_flight: int
) -> signal.Signals | None:
    """Answers all groups; the signal that ended it before that, if one did."""
    stop = stop_on_signals()
    running: Running[Item] = {}
    try:
        for group in groups:
            running[asyncio.create_task(chain.run(engine, group))] = group
            while len(running) >= in_flight and not stop.done():
                await settle(running, stop, put)
            if stop.done():
                return stop.result()
        while running and not stop.done():
            await settle(running, stop, put)
        return stop.result() if stop.done() else None
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def settle(running: Running[Item], stop: asyncio.Future[signal.Signals], put: Put[Item]) -> None:
    """Waits until a group is whole, or a signal has come, and hands on what is whole."""
    waiting: set[asyncio.Future[Any]] = {*running, stop}
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in [task for task in running if task in done]:
        group = running.pop(task)
        if stop.done() and task.exception() is not None:  # Ctrl-C in a terminal reaches an engine's processes too
            continue
        put(group, task.result())


def stop_on_signals() -> asyncio.Future[signal.Signals]:
    """Done when SIGINT or SIGTERM has come. Only a main thread may listen; elsewhere it stays open."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[signal.Signals] = loop.create_future()
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, set_once, stop, name)
    return stop


def set_once(stop: asyncio.Future[signal.Signals], name: signal.Signals) -> None:
    if not stop.done():
        stop.set_result(name)
