"""Keeps many groups going on one engine, a bounded number at a time, and hands each on as soon as it is whole.

One group has one request at a time. There are more groups than the engine has places, so that a queue always waits in
front of it and no place stands empty while an answer is read and the next prompt is built; a group that goes on is
served before one that begins, so its prefix is still in the cache. The corpus is read as groups are taken. SIGINT and
SIGTERM let what is whole be stored and give up the rest; anything that an engine raises but `RequestFailed` ends the
drive.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ipt_jax.corpus.records import SynthGroup
from synth.engine import Engine

GroupInput = TypeVar("GroupInput")  # what becomes a group: texts, or a group without scores
Held = TypeVar("Held", contravariant=True)
Put = Callable[[GroupInput, SynthGroup], None]


class Answers(Protocol[Held]):
    """What makes a group of an item: a chain asks for pairs, a verifier for scores."""

    async def run(self, engine: Engine, item: Held, /) -> SynthGroup: ...


async def run_groups(
    engine: Engine, chain: Answers[GroupInput], groups: Iterator[GroupInput], put: Put[GroupInput]
) -> signal.Signals | None:
    """Answers all groups; the signal that ended it before that, if one did."""
    with signals() as stop:
        return await answer_all(engine, chain, groups, put, stop)


async def answer_all(
    engine: Engine,
    chain: Answers[GroupInput],
    groups: Iterator[GroupInput],
    put: Put[GroupInput],
    stop: asyncio.Future[signal.Signals],
) -> signal.Signals | None:
    tasks = [asyncio.create_task(answer(engine, chain, groups, put)) for _ in range(in_flight(engine.places))]
    done = asyncio.gather(*tasks)
    either: set[asyncio.Future[Any]] = {done, stop}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():  # whatever else is wrong by now: Ctrl-C in a terminal reaches an engine's processes too
            return stop.result()
        done.result()
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(done, *tasks, return_exceptions=True)


def in_flight(places: int) -> int:
    """How many groups there are at once: half as many again as the engine works on, four more at least."""
    return places + max(4, places // 2)


async def answer(
    engine: Engine, chain: Answers[GroupInput], groups: Iterator[GroupInput], put: Put[GroupInput]
) -> None:
    """One group after the other, from an iterator that many share."""
    for group in groups:
        put(group, await chain.run(engine, group))


@contextmanager
def signals() -> Iterator[asyncio.Future[signal.Signals]]:
    """Done when SIGINT or SIGTERM has come. Only a main thread may listen; elsewhere it stays open."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[signal.Signals] = loop.create_future()
    heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for name in heard:
        loop.add_signal_handler(name, set_once, stop, name)
    try:
        yield stop
    finally:
        for name in heard:
            loop.remove_signal_handler(name)


def set_once(stop: asyncio.Future[signal.Signals], name: signal.Signals) -> None:
    if not stop.done():
        stop.set_result(name)
