"""A progress line with rate and ETA, on standard error only.

On a terminal it is one line that repaints itself. Elsewhere (a log file, CI, SLURM) it is a plain line at most every
30 seconds and one at the end. Several threads may advance it. The rate covers the last minute, so a slow start
(compilation, engine start) does not distort the ETA. Work done before a resume (`done`) does not count as speed.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

PLAIN_SECONDS = 30.0
WINDOW_SECONDS = 60.0


def format_duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    rounded = int(seconds + 0.5)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if rounded >= size:
            return f"{rounded // size} {unit} {rounded % size // smaller:02d} {smaller_unit}"
    return f"{rounded} s"


def format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_field(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Progress:
    """`with Progress(total, "texts", "synth run") as progress: progress.advance(1, pairs=5)`; `total` may be None."""

    def __init__(self, total: float | None, unit: str, label: str, *, done: float = 0) -> None:
        self._unit, self._label, self._first = unit, label, done
        self._ending = ""
        console = Console(file=sys.stderr)
        # redirect_stdout would move a caller's print() to stderr, and with it the object that --json promises
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _StatusColumn(self),
            console=console,
            disable=not console.is_terminal or console.is_dumb_terminal,
            redirect_stdout=False,
            speed_estimate_period=WINDOW_SECONDS,
            get_time=time.monotonic,
        )
        self._bar.add_task(label, start=False, total=total, completed=done)  # type: ignore[arg-type]  # floats work
        (self._task,) = self._bar.tasks

    @property
    def done(self) -> float:
        return self._task.completed

    def __enter__(self) -> Progress:
        self._last_line = time.monotonic()
        self._bar.start_task(self._task.id)
        self._bar.start()
        return self

    def advance(self, n: float = 1, **fields: Any) -> None:
        """Counts `n` more units. The fields (loss=…, pairs=…) are shown at the end of the line until they change."""
        self._bar.update(self._task.id, advance=n, **fields)
        if self._bar.disable and time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._print_status()

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = "stopped after" if error else "in"
        self._bar.stop()
        if self._bar.disable:
            self._print_status()

    def status(self) -> str:
        """`950/1,000 texts (95%), 1.5 texts/s, ETA 33 s pairs 1,234`"""
        total, done = self._task.total, self._task.completed
        elapsed = max(self._task.elapsed or 0.0, 1e-9)
        rate = (done - self._first) / elapsed
        line = f"{done:,.0f}/{total:,.0f} {self._unit} ({100 * done / total:.0f}%)" if total else ""
        line = line or f"{done:,.0f} {self._unit}"
        if self._ending:
            line += f" {self._ending} {format_duration(elapsed)}, {format_rate(rate)} {self._unit}/s"
        elif (rate := self._task.speed or rate) > 0:
            line += f", {format_rate(rate)} {self._unit}/s"
            if total and done < total:
                line += f", ETA {format_duration((total - done) / rate)}"
        return line + "".join(f" {name} {format_field(value)}" for name, value in self._task.fields.items())

    def _print_status(self) -> None:
        print(f"{self._label}: {self.status()}", file=sys.stderr, flush=True)


class _StatusColumn(ProgressColumn):
    def __init__(self, progress: Progress) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.status())
