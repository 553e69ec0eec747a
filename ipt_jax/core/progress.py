"""A progress line with rate and ETA, on standard error only.

On a terminal it is one line that repaints itself; anywhere else (a log file, CI, SLURM) it is a plain line at most
every 30 seconds and one at the end, so that logs stay readable. Standard output stays free for `--json`. Safe to
advance from several threads. The rate covers the last minute, so a slow start (compilation, engine start) does not
spoil the ETA, and work that was already done when a run resumes (`done`) does not count as speed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

PLAIN_SECONDS = 30.0
WINDOW_SECONDS = 60.0


def format_duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_field(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Progress:
    """`with Progress(total, "texts", "synth run") as progress: progress.advance(1, pairs=5)`; `total` may be None."""

    def __init__(self, total: int | None, unit: str, label: str, *, done: int = 0) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done = self._first = done
        self._guessed = False
        self._fields: dict[str, object] = {}
        self._lock = threading.Lock()
        self._started = self._last_line = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._started, done)])
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        self._marks = deque([(self._started, self.done)])
        console = Console(file=sys.stderr)
        if console.is_terminal and not console.is_dumb_terminal:
            self._open_live(console)
        return self

    def advance(self, n: int = 1, **fields: object) -> None:
        """`n` more units are done; the fields (loss=…, pairs=…) stand at the end of the line until they change."""
        with self._lock:
            self.done += n
            self._fields.update(fields)
            now = time.monotonic()
            self._mark(now)
            if self._live is not None and self._task is not None:
                self._live.update(self._task, completed=self.done, status=self._status(now))
            elif now - self._last_line >= PLAIN_SECONDS:
                self._last_line = now
                self._write(f"{self.label}: {self._status(now)}")

    def expect(self, total: int) -> None:
        """The total as far as it can be told by now, for work whose amount shows on the way."""
        with self._lock:
            self.total, self._guessed = total, True
            if self._live is not None and self._task is not None:
                self._live.update(self._task, total=total)

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            elapsed = max(time.monotonic() - self._started, 1e-9)
            rate = format_rate((self.done - self._first) / elapsed)
            ending = "stopped after" if error else "in"
            status = f"{self._count()} {ending} {format_duration(elapsed)}, {rate} {self.unit}/s{self._tail()}"
            if self._live is not None and self._task is not None:
                self._live.update(self._task, completed=self.done, status=status)
                self._live.stop()
                self._live = None
            else:
                self._write(f"{self.label}: {status}")

    def _open_live(self, console: Console) -> None:
        # redirect_stdout would send a caller's print() to stderr, and with it the object that --json promises
        self._live = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            redirect_stdout=False,
        )
        self._task = self._live.add_task(
            self.label, total=self.total, completed=self.done, status=self._status(self._started)
        )
        self._live.start()

    def _mark(self, now: float) -> None:
        """One mark a second is enough for a rate; a call for every token must stay cheap."""
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.done))
        while len(self._marks) > 1 and now - self._marks[1][0] >= WINDOW_SECONDS:
            self._marks.popleft()

    def _status(self, now: float) -> str:
        since, before = self._marks[0]
        rate = (self.done - before) / (now - since) if now > since else 0.0
        parts = [self._count()]
        if rate > 0:
            parts.append(f"{format_rate(rate)} {self.unit}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"ETA {format_duration((self.total - self.done) / rate)}")
        return ", ".join(parts) + self._tail()

    def _count(self) -> str:
        if not self.total:
            return f"{self.done:,} {self.unit}"
        share = f"({100 * self.done / self.total:.0f}%)"
        if self._guessed and self.done < self.total:
            return f"{self.done:,} of about {self.total:,} {self.unit} {share}"
        return f"{self.done:,}/{self.total:,} {self.unit} {share}"

    def _tail(self) -> str:
        return "".join(f" {name} {format_field(value)}" for name, value in self._fields.items())

    def _write(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
