"""Ends an engine's processes when the process that started them is gone, however it went.

vLLM's own processes can outlive a killed parent, with their memory and their GPU. `Watchdog` runs this script as a
process of its own: it waits until the pipe from the parent closes, then kills every process whose environment holds the
parent's mark. Linux only (it reads /proc); elsewhere it does nothing. It imports nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "IPT_ENGINE_MARK"
PROCESSES = Path("/proc")


class Watchdog:
    """From here on every process that this one starts by exec is marked, and ends with it or with `close`."""

    def __init__(self) -> None:
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        command = [sys.executable, "-S", __file__, mark]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        os.environ[VARIABLE] = mark

    def close(self) -> None:
        del os.environ[VARIABLE]
        self._process.communicate()


def end_marked(mark: str) -> int:
    """Kills the processes that carry the mark; returns their number."""
    wanted = f"{VARIABLE}={mark}".encode()
    ended = 0
    for process in PROCESSES.glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
                ended += 1
        except OSError:  # gone meanwhile, or another user's
            continue
    return ended


def watch(mark: str) -> None:
    sys.stdin.buffer.read()
    while end_marked(mark):  # one may have been about to start another
        time.sleep(0.1)


if __name__ == "__main__":
    watch(sys.argv[1])
