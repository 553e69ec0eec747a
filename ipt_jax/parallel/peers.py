"""The other processes of a run. When one of them ends, this one prints a line that names it and exits with code 1.

Guarantees: within 60 s of the end of a process (killed, failed, returned early, its host lost), each other one ends.
JAX alone would hang in a collective, or abort in C++ with a stack trace when the first process is gone.

Each process writes a beat to the key-value store of `jax.distributed` and reads those of the others. C++ messages on
stderr pass through a pipe: when JAX's own service reports a lost process, the line here replaces its message.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name; Orbax uses this one

from ipt_jax.core.errors import UserError

BEAT_SECONDS = 3.0
SILENT_SECONDS = 45.0  # without a beat, a process is lost
FAILING_SECONDS = 12.0  # the same, after a collective has failed
GRACE_SECONDS = 10.0  # after the end of a peer, in which a cause that all share is reported by each process itself
LOST = re.compile(rb"^(W\d{4} .*preemption_sync_manager|[EF]\d{4} .*(coordination|distributed service))")
PREFIX = "ipt/beat/"


@contextlib.contextmanager
def watch_peers() -> Iterator[None]:
    """Ends this process when another one ends, until the block is left. Reports to the others how it is left."""
    if (distributed.global_state.num_processes or 1) == 1:  # jax.process_count would start the backends
        yield
        return
    peers = Peers()
    with _own_stderr(peers.lost):
        peers.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError):  # a collective fails before its dead peer is known
                peers.silent_seconds = FAILING_SECONDS
                time.sleep(FAILING_SECONDS + GRACE_SECONDS)
            peers.leave(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            code = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1
            atexit.register(os._exit, int(code or 0))  # JAX's own exit waits for the others
            raise
        peers.leave(None)


class Peers:
    """What is known of the other processes. Runs in a thread of its own."""

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self._me, self._number = distributed.global_state.process_id, distributed.global_state.num_processes
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}  # the last beat of each, and when it was new
        self._beat: dict[str, Any] = {"host": socket.gethostname(), "count": 0, "ended": False, "why": None}
        self._ending, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch_peers", daemon=True)
        self._began, self.silent_seconds = time.monotonic(), SILENT_SECONDS

    def start(self) -> None:
        self._write()
        self._thread.start()

    def leave(self, why: str | None) -> None:
        """Says that this process ends, and why if it failed. The first one then waits for the others: with it ends the
        store, and with that every process that is left."""
        self._stopped.set()
        self._thread.join(BEAT_SECONDS)  # it writes beats, too
        self._beat |= {"ended": True, "why": why}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone
            self._write()
            deadline = time.monotonic() + GRACE_SECONDS + 2 * BEAT_SECONDS
            while why and self._me == 0 and not self._alone() and time.monotonic() < deadline:
                time.sleep(0.2)
            if why and self._me == 0:
                time.sleep(1.0)  # they print their errors

    def lost(self) -> None:
        """Ends this process after JAX's service said that one is lost: the one that is silent, else the first."""
        now = time.monotonic()
        others = [one for one in range(self._number) if one != self._me]
        silent = [one for one in others if now - self._seen.get(one, ({}, now))[1] > SILENT_SECONDS / 2]
        self._end((silent or others)[0])

    def _run(self) -> None:
        answered = self._began
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._write()
                self._read()
                answered = time.monotonic()
            except jax.errors.JaxRuntimeError:  # with the first process, the store is gone
                if time.monotonic() - answered > FAILING_SECONDS and not self._stopped.is_set():
                    self._end(0)
                continue
            now = time.monotonic()
            for one in set(range(self._number)) - {self._me}:
                beat, since = self._seen.get(one, ({}, self._began))
                allowed = GRACE_SECONDS if beat.get("why") else self.silent_seconds
                if now - since > allowed and not self._stopped.is_set():
                    self._end(one)

    def _write(self) -> None:
        self._beat["count"] += 1
        self._client.key_value_set(f"{PREFIX}{self._me}", json.dumps(self._beat), allow_overwrite=True)

    def _read(self) -> None:
        for key, value in self._client.key_value_dir_get(PREFIX):
            one, beat = int(key.rpartition("/")[2]), json.loads(value)
            if one not in self._seen or self._seen[one][0] != beat:
                self._seen[one] = beat, time.monotonic()

    def _alone(self) -> bool:
        self._read()
        return all(beat["ended"] for one, (beat, _) in self._seen.items() if one != self._me)

    def _end(self, one: int) -> None:
        """Prints a line and exits: the main thread may be inside a collective that never returns."""
        beat = self._seen.get(one, ({}, 0.0))[0]
        host = f" ({beat['host']})" if beat else ""
        what = f"ended: {beat['why']}" if beat.get("why") else "ended early" if beat.get("ended") else "is gone"
        line = f"error: process {one}{host} {what}; rerun the same command on all hosts to resume\n"
        with self._ending:  # one thread prints
            os.write(sys.stderr.fileno(), line.encode())
            os._exit(1)


@contextlib.contextmanager
def _own_stderr(lost: Any) -> Iterator[None]:
    """Python writes to stderr as before. What C++ writes there passes through a thread, which calls `lost` instead
    of printing the report of a lost process. That is followed by abort(), which waits here for the thread."""
    real, python = os.dup(2), sys.stderr
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = os.fdopen(real, "w", buffering=1, errors="backslashreplace", closefd=False)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))  # sleeps SIGABRT = 6 seconds

    def forward() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                if LOST.search(line):
                    lost()
                os.write(real, line)

    thread = threading.Thread(target=forward, name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, None)
        sys.stderr.flush()
        sys.stderr = python
        os.dup2(real, 2)  # closes the pipe, unless a child of this process still has it
        thread.join(1.0)
