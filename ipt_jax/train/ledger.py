"""The steps of a run between being started and being known: their metrics, tokens and time.

Guarantees that the host does not wait for the step it has just started, that steps are settled in order, each one once,
and that a step whose loss or gradient is not finite raises FloatingPointError with its number, whether it is a logged
step or not. What is settled is what a checkpoint may record.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import msgspec

from ipt_jax.corpus.progress import Progress
from ipt_jax.data.plan import Plan
from ipt_jax.model.flops import model_flops, peak_flops
from ipt_jax.train.checkpoint import Record
from ipt_jax.train.metrics import MetricsLog, check_finite, loss_metrics
from ipt_jax.train.program import Program


class Ledger:
    """`log` is None in all processes but the first."""

    def __init__(self, log: MetricsLog | None, record: Record, program: Program, plan: Plan, log_every: int):
        self.record, self.last = record, (log.last if log else None)
        self._log, self._log_every, self._steps = log, log_every, plan.steps
        self._progress = Progress(plan.tokens, "tokens", "ipt train", done=record.tokens) if log else None
        self._pending: list[tuple[int, Any]] = []
        self._model = program.model
        self._peak_flops = peak_flops(program.mesh.devices.flat[0].device_kind, program.mesh.devices.size)
        self._settled_at, self._waited = time.monotonic(), 0.0

    @classmethod
    def open(cls, run_dir: Path, record: Record, program: Program, plan: Plan, log_every: int) -> Self:
        """The ledger of this process; only the first one writes."""
        log = MetricsLog(run_dir, record.step) if jax.process_index() == 0 else None
        return cls(log, record, program, plan, log_every)

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.__enter__()
        self._settled_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.__exit__(kind, error, trace)
        if self._log:
            self._log.close()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def add(self, step: int, metrics: Any) -> None:
        """Step `step` was started; its metrics are still on the devices."""
        self._pending.append((step, metrics))

    def settle(self, step: int) -> None:
        """Waits for all steps up to `step`, checks them and writes the lines of those that are logged."""
        due = [metrics for number, metrics in self._pending if number <= step]
        if not due:
            return
        fetched = jax.device_get(due)
        now = time.monotonic()
        seconds = (now - self._settled_at) / len(due)
        tokens = sum(int(metrics["tokens"]) for metrics in fetched)
        flops = model_flops(self._model, tokens, sum(float(metrics["pairs"]) for metrics in fetched))
        speed = {
            "tokens_per_second": round(tokens / len(due) / seconds, 1),
            "mfu": flops / len(due) / seconds / self._peak_flops if self._peak_flops else None,
            "step_seconds": seconds,
            "data_seconds": self._waited / len(due),
        }
        for (number, _), metrics in zip(self._pending[: len(due)], fetched, strict=True):
            self._settle_one(number, metrics, speed)
        del self._pending[: len(due)]
        self._settled_at, self._waited = now, 0.0

    def _settle_one(self, step: int, metrics: dict[str, Any], speed: dict[str, float | None]) -> None:
        measured = loss_metrics(metrics)
        check_finite(step, measured)
        tokens = int(metrics["tokens"])
        self.record = msgspec.structs.replace(self.record, step=step, tokens=self.record.tokens + tokens)
        self.last = {"step": step, "tokens": self.record.tokens, **measured, **speed}
        if self._log and (step % self._log_every == 0 or step in (1, self._steps)):
            self._log.write(self.last)
        if self._progress:
            self._progress.advance(tokens, step=step, loss=measured["loss"])
