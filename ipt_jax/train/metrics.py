"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the ledger of steps that are not yet fetched.

Guarantees: metrics.jsonl has each step at most once, also after a kill and a resume, since lines after the step that a
run resumes from are removed first. A last line that a kill or a power cut damaged is removed and reported; any other
damaged line is a UserError with its number. The host does not wait for the step it has just started. Steps are settled
in order, each one once; a spike of the loss and a step that is not finite are reported. A checkpoint records settled
steps only.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import msgspec
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ipt_jax.config import TrainSettings
from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole
from ipt_jax.core.manifest import flatten
from ipt_jax.core.progress import Progress
from ipt_jax.corpus.records import KINDS
from ipt_jax.data.plan import Plan
from ipt_jax.model.flops import model_flops, peak_flops
from ipt_jax.train.bad_steps import LossWindow
from ipt_jax.train.checkpoint import CheckpointRecord
from ipt_jax.train.run_info import first_start, report, write_best
from ipt_jax.train.step import Program

FULL = (errno.ENOSPC, errno.EDQUOT)


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run, from `step` on. A full disk delays lines, it loses none."""

    def __init__(self, run_dir: Path, step: int, wandb_project: str | None = None):
        self._path = run_dir / "metrics.jsonl"
        lines, cut = read_lines(self._path)
        if cut:
            report(f"{self._path}: its last line is damaged (a kill or a power cut): {cut:,} bytes are removed")
        kept = [line for line in lines if line["step"] <= step]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.last: dict[str, Any] | None = kept[-1] if kept else None
        self.started = first_start(run_dir)
        self._run_dir, self.best = run_dir, min((found for line in kept if (found := best_of(line))), default=None)
        if self.best:
            write_best(run_dir, *self.best)
        self._file = self._path.open("ab", buffering=0)
        self._held = b""  # lines that the disk had no room for
        self._events = run_dir / "tensorboard"
        self._board: Board | None = Board(self._events, step)
        self._wandb = WandbRun(wandb_project, run_dir) if wandb_project else None

    def write(self, line: dict[str, Any]) -> None:
        """One logged step; on disk when this returns, as far as a killed process is concerned."""
        self.last = line
        found = best_of(line)
        if found and (self.best is None or found < self.best):
            self.best = found
            write_best(self._run_dir, *found)
        if self._wandb is not None:
            self._wandb.write(line)
        first = not self._held
        self._held += (json.dumps(line) + "\n").encode()
        try:
            self._write_held()
            self._board = self._board or Board(self._events, line["step"] - 1)
            self._board.write(line)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._board = None  # its file may end in pieces; the next line begins another
            if first:
                report(f"{self._path}: cannot be written ({error.strerror}); its lines are written when there is space")

    def _write_held(self) -> None:
        """Atomic: after an error, no part of the lines is in the file."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._held) != len(self._held):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
        self._held = b""

    def close(self) -> None:
        """Raises OSError when lines are left that the disk has no room for."""
        try:
            if self._held:
                self._write_held()
        finally:
            self._file.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.close()


def best_of(line: dict[str, Any]) -> tuple[float, int] | None:
    """(held-out loss, step) of a logged step that was validated."""
    loss = (line.get("validation") or {}).get("loss")
    return None if loss is None else (loss, line["step"])


class Board:
    """TensorBoard events, written in this thread: in its own, tensorboardX loses the errors of a full disk."""

    def __init__(self, directory: Path, step: int):
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tensorboardX would import it, for seconds
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if sys.modules["torch"] is None:
            del sys.modules["torch"]
        directory.mkdir(exist_ok=True)
        self._events, self._event = EventsWriter(str(directory / "events")), Event
        start = SessionLog(status=SessionLog.START)  # makes TensorBoard forget what an earlier session wrote beyond it
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, line: dict[str, Any]) -> None:
        event = self._event(wall_time=time.time(), step=line["step"])
        for name, value in _numbers(line).items():
            if name != "step":
                event.summary.value.add(tag=name, simple_value=value)
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandbRun:
    """The same metrics at Weights & Biases. An error of wandb is reported once and never ends the training.

    The run's id is kept in `run_dir`, so that a resume continues it. Steps that are trained again have equal values.
    """

    def __init__(self, project: str, run_dir: Path):
        self._off, kept = False, run_dir / "wandb_id"
        known = kept.read_text() if kept.is_file() else None
        recipe = json.loads((run_dir / "run.json").read_bytes())["recipe"]
        self._run = self._try(
            importlib.import_module("wandb").init, project=project, name=run_dir.name, dir=str(run_dir), id=known,
            resume="allow" if known else None, config=recipe, settings={"console": "off"},
        )  # fmt: skip
        if not self._off:
            kept.write_text(self._run.id)
            self._try(self._run.define_metric, "*", step_metric="step")  # its own count of steps cannot go back

    def write(self, line: dict[str, Any]) -> None:
        if not self._off:
            self._try(self._run.log, _numbers(line))

    def close(self) -> None:
        if not self._off:
            self._try(self._run.finish)

    def _try(self, call: Callable[..., Any], *arguments: Any, **fields: Any) -> Any:
        try:
            return call(*arguments, **fields)
        except Exception as error:  # of whatever kind: its login, its network, its version
            self._off = True
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            report(f"warning: train.wandb: no more metrics are sent ({reason}); WANDB_MODE=offline needs no network")
            return None


def check_wandb(project: str | None) -> None:
    """Raises UserError when a run cannot log to `project`."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb is {project!r}, but the package wandb is not installed; run pip install wandb, or set "
            "train.wandb to null"
        )


def _numbers(line: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a logged step, by name."""
    return {
        name: value
        for name, value in flatten(line, "/").items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics file, and the bytes of a damaged last one that are left out."""
    if not path.is_file():
        return [], 0
    *ended, torn = path.read_bytes().split(b"\n")
    lines = [_parse(line) for line in ended]
    cut = len(torn)
    if lines and lines[-1] is None:
        lines.pop()
        cut += len(ended[-1]) + 1
    if None in lines:
        raise UserError(
            f"{path}, line {lines.index(None) + 1}: is damaged; remove this line, then rerun the same command to resume"
        )
    return [line for line in lines if line is not None], cut


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's fields; None for one that is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def last_line(run_dir: Path) -> dict[str, Any] | None:
    """The last logged step of a run."""
    lines, _ = read_lines(run_dir / "metrics.jsonl")
    return lines[-1] if lines else None


def loss_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Loss, loss by document kind and gradient norms of one step, from its sums on the host. None: not finite, or no
    targets."""
    losses, targets = metrics["loss_sums"].astype(float), metrics["targets"].astype(float)
    return {
        "loss": _finite(losses.sum() / targets.sum()) if targets.sum() else None,
        "loss_by_kind": {
            kind: _finite(losses[code] / targets[code]) for code, kind in enumerate(KINDS, start=1) if targets[code]
        },
        "grad_norm": _finite(metrics["grad_norm"]),
        "grad_norms": {group: _finite(norm) for group, norm in metrics["grad_norms"].items()},
        "learning_rate": float(metrics["learning_rate"]),
    }


def peak_memory_bytes() -> int | None:
    """The most bytes that a device of this process has held at once; None where the backend does not count, as CPUs."""
    statistics = (device.memory_stats() or {} for device in jax.local_devices())
    return max((one["peak_bytes_in_use"] for one in statistics if "peak_bytes_in_use" in one), default=None)


def measures(validation: dict[str, Any]) -> dict[str, float]:
    """The losses that `train.keep_best` may name: loss, answers, and the kinds."""
    named = {"loss": validation["loss"], "answers": validation["answer_loss"], **validation["loss_by_kind"]}
    return {name: value for name, value in named.items() if value is not None}


def held_out_words(validation: dict[str, Any]) -> str:
    """`loss 2.5000 (raw 2.7000, augmented 2.1000, answers 1.9000) in 3.2 s`"""
    named = {name: f"{value:.4f}" for name, value in measures(validation).items()}
    total = named.pop("loss", "is not finite")
    parts = ", ".join(f"{name} {value}" for name, value in named.items())
    return f"loss {total} ({parts}) in {validation['seconds']:.1f} s"


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


class Ledger:
    """`log` is None in all processes but the first."""

    def __init__(
        self, log: MetricsLog | None, record: CheckpointRecord, program: Program, plan: Plan, settings: TrainSettings,
        steps: int,
    ):  # fmt: skip
        self.bad: list[int] = []  # the last settled steps, where they were not finite; kept when they are too many
        self.record, self.last = record, (log.last if log else None)
        self._bad_steps = self.last.get("bad_steps", 0) if self.last else 0
        self._max_bad, self._window = settings.max_bad_steps, LossWindow(record.losses, lag=settings.log_every + 1)
        self._skips_spikes, self._whole = settings.on_spike == "skip", NamedSharding(program.mesh, PartitionSpec())
        self._limit: tuple[int | None, tuple[jax.Array, ...]] = None, ()
        self._log, self._log_every, self._steps = log, settings.log_every, steps
        total = sum(plan.taken(steps).values())
        self._progress = Progress(total, "tokens", "ipt train", done=record.tokens) if log else None
        self._pending: list[tuple[int, Any]] = []
        self._model = program.model
        self._peak_flops = peak_flops(program.mesh.devices.flat[0].device_kind, program.mesh.devices.size)
        self._settled_at, self._waited = time.monotonic(), 0.0
        self._started = log.started if log else time.time()
        self._train_seconds = float(self.last.get("train_seconds", 0.0)) if self.last else 0.0
        self._validated: dict[int, dict[str, Any]] = {}

    @classmethod
    def open(
        cls, run_dir: Path, record: CheckpointRecord, program: Program, plan: Plan, settings: TrainSettings, steps: int
    ) -> Self:
        """The ledger of this process, for a run of `steps`; only the first one writes."""
        log = MetricsLog(run_dir, record.step, settings.wandb) if jax.process_index() == 0 else None
        return cls(log, record, program, plan, settings, steps)

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

    def loss_limit(self, step: int) -> tuple[jax.Array, ...]:
        """The limit above which step `step` is skipped, as the step's argument; none where spikes are trained on.

        It follows from the losses up to the last one that is surely settled, so it is the same after a resume.
        """
        settled = (step - 1) // self._log_every * self._log_every - 1
        if self._skips_spikes and settled != self._limit[0]:
            limit = np.float32(self._window.limit(settled))
            self._limit = settled, (jax.make_array_from_callback((), self._whole, lambda _: limit),)
        return self._limit[1]

    def add(self, step: int, metrics: Any) -> None:
        """Step `step` was started; its metrics are still on the devices."""
        self._pending.append((step, metrics))

    def validated(self, step: int, measured: dict[str, Any]) -> None:
        """The validation of the parameters after `step`, which is not settled yet. Its time counts to no step."""
        self._validated[step] = measured
        self._settled_at += measured["seconds"]
        if self._log:
            report(f"step {step}: held-out {held_out_words(measured)}")

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
            "peak_memory_bytes": peak_memory_bytes(),
        }
        for (number, _), metrics in zip(self._pending[: len(due)], fetched, strict=True):
            self._settle_one(number, metrics, speed)
        del self._pending[: len(due)]
        self.record = msgspec.structs.replace(self.record, losses=list(self._window.losses))
        self._settled_at, self._waited = now, 0.0

    def _settle_one(self, step: int, metrics: dict[str, Any], speed: dict[str, float | None]) -> None:
        measured = loss_metrics(metrics)
        tokens = int(metrics["tokens"])
        self.record = msgspec.structs.replace(self.record, step=step, tokens=self.record.tokens + tokens, measures={})
        self._train_seconds += (speed["step_seconds"] or 0.0) if metrics["applied"] else 0.0
        unix_seconds = time.time()
        self.last = {
            "step": step, "tokens": self.record.tokens, **measured, **speed, "train_seconds": self._train_seconds,
            "goodput": min(self._train_seconds / max(unix_seconds - self._started, 1e-9), 1.0),
            "unix_seconds": unix_seconds,
        }  # fmt: skip
        self._check(step, measured, has_targets=bool(metrics["targets"].sum()), applied=bool(metrics["applied"]))
        if self._bad_steps:
            self.last["bad_steps"] = self._bad_steps
        held_out = self._validated.pop(step, None)
        if held_out:
            self.last["validation"] = held_out
            self.record = msgspec.structs.replace(self.record, measures=measures(held_out))
        if self._log and (held_out or step % self._log_every == 0 or step in (1, self._steps)):
            self._log.write(self.last)
        if self._progress:
            self._progress.advance(tokens, step=step, loss=measured["loss"])

    def _check(self, step: int, measured: dict[str, Any], *, has_targets: bool, applied: bool) -> None:
        """Reports spikes and skipped updates."""
        spike = self._window.add(step, measured["loss"]) if applied else None
        if spike and self._log:
            report(spike)
        if applied or not has_targets:
            if applied and len(self.bad) < self._max_bad:
                self.bad = []
            return
        self.bad.append(step)
        self._bad_steps += 1
        name = "loss" if measured["loss"] is None else "gradient norm"
        fault = f"the {name} is not finite"
        if measured["loss"] is not None and measured["grad_norm"] is not None:
            fault = f"loss {measured['loss']:.3f} is a spike (train.on_spike)"
        if self._log:
            report(f"warning: step {step}: {fault}; its update is skipped")
