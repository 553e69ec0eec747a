"""Checkpoints in RUN/checkpoints/STEP, written asynchronously by Orbax.

Guarantees: a directory gets a step's number when all of its bytes are on disk and listed in its `digests.json`; a save
that fails is reported at once, is removed, and costs no earlier checkpoint. The last K are kept, one every N steps or
hours, and the best by a validation measure, by Orbax's policies. A step's directory holds the arrays (`params`,
`optimizer`), `record` (step, tokens, settings of the run) and `model.json`, and can be read without the run.
Does not guarantee: where the first process cannot make the folders of a save, the others wait five minutes for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from ipt_jax.config import TrainSettings
from ipt_jax.core.checkpoint_digests import numbered, write_digests
from ipt_jax.core.checkpoint_path import LiteralPath
from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.files import sync_directory
from ipt_jax.model.config import ModelConfig
from ipt_jax.train.run_info import report
from ipt_jax.train.state import TrainState

SAVING, REMOVING = ".saving", ".removing"  # what follows a step's number before and after its time
FULL = "No space left on device"
MEETING_SECONDS = 20 * 60  # from the end of a process's writing to that of the slowest one


class CheckpointRecord(msgspec.Struct):
    """What a checkpoint knows of its run and its weights. A resume requires equal `made_with`."""

    step: int
    tokens: int  # trained on so far, padding not counted
    plan_fingerprint: str
    made_with: dict[str, Any]
    digests: bool = False  # whether digests.json has to be there: checkpoints of earlier versions have none
    measures: dict[str, float] = {}  # of the weights of this step, such as validation losses
    unix_seconds: float = 0.0  # when it was saved
    losses: list[tuple[int, float]] = []  # (step, loss) of the steps before, which say what a spike is


@dataclass(frozen=True)
class Saved:
    """A checkpoint, as Orbax's policies see it."""

    step: int
    time: datetime
    metrics: dict[str, float] | None

    @classmethod
    def read(cls, directory: Path, measure: str | None) -> Self:
        """`metrics` is None where the checkpoint has no `measure`."""
        try:
            record = msgspec.json.decode((directory / "record" / "record.json").read_bytes(), type=CheckpointRecord)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):  # foreign or damaged; `resume` names it
            record = CheckpointRecord(int(directory.name), 0, "", {})
        time = datetime.fromtimestamp(record.unix_seconds, UTC)
        return cls(int(directory.name), time, record.measures if measure in record.measures else None)


class RecordHandler(ocp.JsonCheckpointHandler):
    """Saves the record, and `model.json` into the step's directory before that gets its final name."""

    def __init__(self, model: ModelConfig):
        super().__init__(filename="record.json")
        self._model = model

    def finalize(self, directory: epath.Path) -> None:
        if jax.process_index() == 0:
            (directory.parent / "model.json").write_text(self._model.model_dump_json(indent=1))


@ocp.args.register_with_handler(RecordHandler, for_save=True)
@dataclass
class RecordSave(ocp.args.JsonSave):
    """Orbax finds a handler by the class of its arguments."""


@ocp.args.register_with_handler(RecordHandler, for_restore=True)
@dataclass
class RecordRestore(ocp.args.JsonRestore):
    """Asked for by Orbax; the record is read without it."""


class PeerFailure(OSError):
    """Another process could not write its part of a checkpoint, and reports why."""


class Meeting:
    """The barriers of a save by several processes. One whose write failed joins the next: no other waits for it."""

    def begin(self, step: int) -> None:
        self._step, self._met = step, 0

    def __call__(self, *, key: str = "", timeout_ms: int = 1000 * MEETING_SECONDS) -> None:
        """Orbax's barrier, once after the arrays are written and once after the files are merged."""
        client = ocp.multihost.get_jax_distributed_client()
        self._met += 1
        client.wait_at_barrier(f"{self._place()}arrived", timeout_ms)
        failed = client.key_value_dir_get(self._place())
        if failed:
            raise PeerFailure("; ".join(f"process {name.split('/')[-1]}: {reason}" for name, reason in sorted(failed)))

    def fail(self, error: Exception) -> None:
        """Says why this process failed, to all that meet next."""
        if jax.process_count() == 1 or isinstance(error, PeerFailure) or self._met == 2:
            return
        name = f"{self._place(1)}{jax.process_index()}"
        ocp.multihost.get_jax_distributed_client().key_value_set(name, why(error))
        with contextlib.suppress(PeerFailure):
            self()

    def _place(self, later: int = 0) -> str:
        return f"ipt_train/save/{self._step}/{self._met + later}/"


class Checkpoints:
    """Writes and reads the checkpoints of one run. Entered after the run has chosen what it resumes from."""

    def __init__(self, run_dir: Path, model: ModelConfig, settings: TrainSettings):
        self.path = run_dir.absolute() / "checkpoints"  # Orbax refuses relative paths
        self._settings, self._preserved = settings, preservation(settings)
        self._begun = time.monotonic()  # of the last save
        handler = ocp.CompositeCheckpointHandler(
            params=ocp.StandardCheckpointHandler(),
            optimizer=ocp.StandardCheckpointHandler(),
            record=RecordHandler(model),
        )
        self._meeting = Meeting()
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=ocp.AsyncOptions(barrier_sync_fn=self._meeting))
        self._saving: threading.Thread | None = None
        self._failure: Exception | None = None
        self._last = False

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for a save under way: leaving earlier would throw it away."""
        self._wait()
        self._orbax.close()

    def due(self, step: int) -> bool:
        """Whether to save at `step`, on all hosts alike.

        Minutes are compared at logged steps, by the first process's clock. (Orbax's own policy of seconds ends the run
        when that process is five minutes late.)
        """
        settings = self._settings
        if any(steps and step % steps == 0 for steps in (settings.checkpoint_every, settings.keep_every)):
            return True
        if settings.checkpoint_minutes is None or step % settings.log_every:
            return False
        return bool(from_first_process(time.monotonic() - self._begun >= 60 * settings.checkpoint_minutes))

    def save(self, state: TrainState, record: CheckpointRecord, *, last: bool) -> None:
        """Copies the state off the devices and returns. Writing continues in the background, and prints its end.

        A save that fails is printed, and the next one is the next try; `finish` raises for the last of a run.
        """
        self._wait()
        self._failure, self._last, self._begun = None, last, time.monotonic()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.optimizer)))
        room = jax.process_index() != 0 or self._has_room(record.step, size if last else 2 * size)
        if not from_first_process(room):
            self._failure = self._failure or UserError("the first process found no room for a checkpoint")
            return
        finite = {name: value for name, value in record.measures.items() if math.isfinite(value)}  # JSON has no NaN
        self._meeting.begin(record.step)
        failed = None
        try:
            self._orbax.save(
                LiteralPath(self.path / f"{record.step}{SAVING}"),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.optimizer),
                    record=RecordSave(
                        msgspec.to_builtins(
                            msgspec.structs.replace(record, digests=True, measures=finite, unix_seconds=time.time())
                        )
                    ),
                ),
                force=True,
            )
        except (OSError, ValueError) as error:  # Orbax reports a failed write as ValueError
            failed = error
        self._saving = threading.Thread(target=self._commit, args=(record.step, failed), name="commit_checkpoint")
        self._saving.start()

    def finish(self) -> None:
        """Waits until the last save is on disk, on all hosts. Raises UserError or Fault when it is not."""
        self._wait()
        failed = np.asarray(self._failure is not None)
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(failed).any()
        if failed:
            raise self._failure or Fault("the last save of the run failed on another host, which prints why")

    def restore(self, checkpoint: Path, state: TrainState, shardings: TrainState) -> TrainState:
        """The state of a step's directory, of this run or of another one, straight into its shards; `state` gives
        shapes, and the dtypes to convert to."""
        wanted = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), state, shardings
        )
        restored = self._orbax.restore(
            LiteralPath(checkpoint),
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(wanted.params),
                optimizer=ocp.args.StandardRestore(wanted.optimizer),
            ),
        )
        step = np.int32(int(checkpoint.name))  # a JAX scalar is put wrongly where each process has one device
        return TrainState(jax.device_put(step, shardings.step), restored["params"], restored["optimizer"])

    def _wait(self) -> None:
        """Waits for a save under way, then removes parts of failed ones, whose threads may have written on."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if jax.process_index() == 0:
            remove_leftovers(self.path)

    def _has_room(self, step: int, needed: int) -> bool:
        """Whether a save may begin. A folder is made as well, since the other processes would wait for one."""
        try:
            free = shutil.disk_usage(self.path).free
            if free < needed:
                raise OSError(f"needs {needed / 1e6:,.1f} MB of free space, the disk has {free / 1e6:,.1f} MB")
            (self.path / f"{step}{SAVING}").mkdir()
            (self.path / f"{step}{SAVING}").rmdir()
        except OSError as error:
            self._fail(step, error)
            return False
        return True

    def _commit(self, step: int, failed: Exception | None) -> None:
        """Waits for Orbax; then the first process makes the checkpoint durable and gives it its number."""
        started = time.monotonic()
        try:
            if failed is not None:
                raise failed
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            size = write_digests(self.path / f"{step}{SAVING}")
            os.replace(self.path / f"{step}{SAVING}", self.path / str(step))
            sync_directory(self.path)
        except Exception as error:  # of whatever kind: a thread's exception would reach nobody
            self._fail(step, error)
            self._meeting.fail(error)
            return
        report(f"saved at step {step}: {size / 1e6:,.1f} MB on disk after {time.monotonic() - started:.1f} s")
        self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        """Removes what no policy keeps, after the checkpoint of `step` is durable."""
        directories = numbered(self.path)[::-1]  # Orbax's policies take the oldest first
        best = self._settings.keep_best
        saved = [Saved.read(directory, best) for directory in directories]
        if best is not None and saved[-1].metrics is None:
            report(f"warning: step {step} has no measure {best}: train.keep_best cannot compare it")
        kept = self._preserved.should_preserve(saved, context=policies.PreservationContext())
        for directory, keeps in zip(directories, kept, strict=True):
            if not keeps:
                remove(directory)

    def _fail(self, step: int, error: Exception) -> None:
        """Reports a save that failed and removes its parts, which would take the next one's room."""
        drain(self._orbax)
        if jax.process_index() == 0:
            remove_leftovers(self.path)
        reason = why(error)
        kept = numbered(self.path)
        resumes = f"the last checkpoint is step {kept[0].name}" if kept else "there is no checkpoint yet"
        told = isinstance(error, PeerFailure) and jax.process_index() != 0  # by that process and the first one
        if not self._last and not told:  # the last one is raised by `finish`
            report(f"step {step} is not saved ({reason}); {resumes}; training continues, the next save tries again")
        where = f"run_dir {self.path.parent}: step {step} is not saved ({reason}); {resumes}"
        if isinstance(error, OSError | ValueError):
            self._failure = UserError(f"{where}; free space or repair the disk, and rerun the same command to resume")
        else:
            self._failure = Fault(f"{where}; rerun the same command to resume")


def preservation(settings: TrainSettings) -> policies.PreservationPolicy:
    """The checkpoints to keep: the latest ones, some for good, and the one with the lowest measure."""
    kept: list[policies.PreservationPolicy] = [policies.LatestN(settings.keep_checkpoints)]
    if settings.keep_every is not None:
        kept.append(policies.EveryNSteps(settings.keep_every))
    if settings.keep_hours is not None:
        kept.append(policies.EveryNSeconds(round(3600 * settings.keep_hours)))
    if (best := settings.keep_best) is not None:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda measures: float(measures[best]), reverse=True, n=1,
                keep_checkpoints_without_metrics=False,
            )
        )  # fmt: skip
    return policies.AnyPreservationPolicy(kept)


def drain(checkpointer: ocp.AsyncCheckpointer) -> None:
    """Fetches what else failed in the same save: Orbax would raise it in the next one, one error a call."""
    for _ in range(10):
        try:
            checkpointer.wait_until_finished()
            return
        except Exception:  # its first error is reported
            continue


def why(error: Exception) -> str:
    """The reason of a failed write, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return FULL if FULL in text else text[:300]


def from_first_process(value: int) -> int:
    """The first process's `value`, on all hosts."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def remove_leftovers(checkpoints: Path) -> None:
    """Removes what a save or a removal that was killed left."""
    for entry in checkpoints.iterdir():
        if SAVING in entry.name or REMOVING in entry.name or ".orbax-checkpoint-tmp" in entry.name:
            shutil.rmtree(entry, ignore_errors=True)


def remove(step: Path) -> None:
    """Removes a checkpoint: first its number, so that a part of it is never taken for a checkpoint."""
    leaving = step.with_name(step.name + REMOVING)
    try:
        os.replace(step, leaving)
        shutil.rmtree(leaving)
    except OSError as error:
        report(f"checkpoint {step.name} cannot be removed ({error.strerror or error}); the disk may fill up")
