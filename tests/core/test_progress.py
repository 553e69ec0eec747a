"""The progress line: on standard error only, readable in a log, right after a resume, safe under threads."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ipt_jax.core import progress as module
from ipt_jax.core.progress import Progress, format_duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return clock


def test_a_log_gets_a_line_every_thirty_seconds_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(100, "steps", "train") as progress:
        for _ in range(100):
            clock.now += 1.0
            progress.advance(1, loss=2.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "train: 30/100 steps (30%), 1 steps/s, ETA 1 min 10 s loss 2.5",
        "train: 60/100 steps (60%), 1 steps/s, ETA 40 s loss 2.5",
        "train: 90/100 steps (90%), 1 steps/s, ETA 10 s loss 2.5",
        "train: 100/100 steps (100%) in 1 min 40 s, 1 steps/s loss 2.5",
    ]


def test_a_resumed_run_does_not_count_old_work_as_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, "steps", "train", done=900) as progress:
        clock.now += 50.0
        progress.advance(50)
    assert capsys.readouterr().err.splitlines() == [
        "train: 950/1,000 steps (95%), 1 steps/s, ETA 50 s",
        "train: 950/1,000 steps (95%) in 50 s, 1 steps/s",
    ]


def test_the_rate_forgets_a_slow_start(clock: Clock) -> None:
    with Progress(None, "tokens", "run") as progress:
        clock.now += 600.0
        progress.advance(1)
        for _ in range(120):
            clock.now += 1.0
            progress.advance(5)
        assert "5 tokens/s" in progress.status()


def test_an_unknown_total_and_a_failure(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Progress(None, "texts", "synth run") as progress:
        clock.now += 4.0
        progress.advance(8, pairs=1234)
        raise KeyError
    assert capsys.readouterr().err == "synth run: 8 texts stopped after 4 s, 2 texts/s pairs 1,234\n"


def test_a_terminal_gets_one_repainted_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(3, "texts", "[bold]label") as progress:
        progress.advance(3, pairs=7)
        print("{}")
    assert capsys.readouterr().out == "{}\n"
    assert "[bold]label" in terminal.getvalue()
    assert "3/3 texts (100%)" in terminal.getvalue() and "pairs 7" in terminal.getvalue()


def test_threads_lose_no_count() -> None:
    with Progress(None, "items", "threads") as progress, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [progress.advance(1) for _ in range(500)], range(8)))
    assert progress.done == 4000


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (100_000, "1 d 03 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
