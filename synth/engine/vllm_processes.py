"""vLLM's processes: their log, their start, the cause of their death, and their end with this process.

Guaranteed: what vLLM and its libraries print goes to a log file, not over the progress bar. A start that fails is one
line with the cause and the log's name. Ctrl-C during the start ends this process within seconds. No process of vLLM
outlives this one. Linux only: processes are found by their environment in /proc.
"""

import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

MARK = "IPT_ENGINE_MARK"  # environment variable by which the watchdog knows an engine's processes
GRACE_SECONDS = 2.0  # after Ctrl-C, for vLLM's own cleanup
STOPPED = b"stopped; rerun the same command to resume\n"
# '(EngineCore pid=7) ERROR 11-28 10:00:00 [core.py:1] ' before each line of a logged traceback
COLOR = re.compile(r"\x1b\[[\d;]*m")
LOG_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\))?\s?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failed)\b")
CAUSE_LETTERS = 300


class Watchdog:
    """Kills the processes that this one has started since, when this one dies or on `close`.

    vLLM's processes can outlive a killed parent, with their memory and their GPU. The watchdog is a process that waits
    until the pipe from its parent closes.
    """

    def __init__(self) -> None:
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        program = f"{inspect.getsource(kill_at_end_of_input)}\nkill_at_end_of_input({MARK!r}, {mark!r})"
        command = [sys.executable, "-S", "-c", program]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        os.environ[MARK] = mark

    def kill(self) -> None:
        """Starts killing; processes that are started later are killed too, until none is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        os.environ.pop(MARK, None)


def kill_at_end_of_input(name: str, value: str) -> None:
    """The watchdog's program: kills every process with this environment variable. Runs alone, so it imports here."""
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    sys.stdin.buffer.read()
    mark = f"{name}={value}".encode()
    found = True
    while found:  # a process may be starting another
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    found = True
            except OSError:  # ended meanwhile, or another user's
                continue
        time.sleep(0.1 * found)


class EngineLog:
    """The file that holds what vLLM prints, in the directory for temporary files. It is kept."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        self.path, self.file = Path(name), os.fdopen(handle, "a", buffering=1, encoding="utf-8", errors="replace")

    @contextmanager
    def starting(self, watchdog: Watchdog) -> Iterator[None]:
        """Inside the block, stdout and stderr of this process and of those it starts go to the log.

        Ctrl-C kills vLLM's processes and raises KeyboardInterrupt. If the block and the exit of this process take
        longer than GRACE_SECONDS then, the process ends at once with exit code 130: vLLM may wait for dead processes.
        """
        kept = [os.dup(1), os.dup(2)]
        flush()

        def give_up() -> None:
            os.write(kept[1], STOPPED)
            os._exit(130)

        def stop(number: int, frame: FrameType | None) -> None:
            watchdog.kill()
            deadline = threading.Timer(GRACE_SECONDS, give_up)
            deadline.daemon = True
            deadline.start()
            raise KeyboardInterrupt

        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, stop) if here else None
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)
        interrupted = False
        try:
            yield
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            if not interrupted:  # else the deadline prints to it
                os.close(kept[1])
            os.close(kept[0])
            if here:
                signal.signal(signal.SIGINT, before)

    def cause(self) -> str:
        """The first error that the log's tracebacks end with, on one line; '' if it holds none."""
        return root_cause(self.path.read_text(encoding="utf-8", errors="replace"))


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def root_cause(log: str) -> str:
    """'…Traceback…\\n(EngineCore pid=7) ERROR … ValueError: too long\\n…' -> 'ValueError: too long'

    The first traceback is the deepest process's: those of the processes that wait for it follow.
    """
    lines = [LOG_PREFIX.sub("", COLOR.sub("", line)).rstrip() for line in log.splitlines()]
    begins = (place for place, line in enumerate(lines) if line.endswith("Traceback (most recent call last):"))
    first = next(begins, len(lines))
    raised = next((place for place in range(first, len(lines)) if RAISED.match(lines[place])), None)
    if raised is None:
        return ""
    said = lines[raised]
    if said.endswith(":") and raised + 1 < len(lines):
        said += " " + lines[raised + 1].strip()
    return said[:CAUSE_LETTERS]
