"""What a run starts from: its newest checkpoint whose bytes verify, else that of the run it branches from.

Guarantees: nothing is loaded before its digests were compared; a checkpoint that does not verify is named with the file
and what is wrong, moved aside and never deleted; the run that another one branches from is only read. The first process
reads and decides for all hosts: damage that only another host's view of the disk shows is not seen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec

from ipt_jax.config import Recipe
from ipt_jax.core.checkpoint_digests import Newest, Skipped, damage, newest_verified, refuse_all, unverified
from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole
from ipt_jax.train.checkpoint import CheckpointRecord, from_first_process
from ipt_jax.train.run_info import report

NOTHING, UNUSABLE = -1, -2


class Start(NamedTuple):
    """What a run starts from. `record` is None at step 0; `run_dir` is another run's for a branch."""

    run_dir: Path
    record: CheckpointRecord | None
    skipped: list[Skipped]
    branches: bool = False

    @property
    def checkpoint(self) -> Path:
        """The directory of the step."""
        assert self.record is not None
        return self.run_dir.absolute() / "checkpoints" / str(self.record.step)


def find_start(recipe: Recipe) -> Start:
    """The newest checkpoint of `run_dir`, else that of `train.branch_from`, else step 0."""
    run_dir = Path(recipe.run_dir)
    record, skipped = find_newest(run_dir)
    if record is not None or recipe.train.branch_from is None:
        return Start(run_dir, record, skipped)
    path = Path(recipe.train.branch_from).absolute()
    if not (path.name.isdigit() and path.parent.name == "checkpoints"):
        record, skipped = find_newest(path)
        for one in skipped:
            report(f"warning: checkpoint {one.path} is skipped: {one.damage}")
        if record is None:
            raise UserError(f"train.branch_from {path}: has no checkpoint; set it to a run, or to RUN/checkpoints/STEP")
        return Start(path, record, [], branches=True)
    found = damage(path) if jax.process_index() == 0 else None
    if from_first_process(found is not None):
        raise UserError(f"train.branch_from {path}: {found or 'cannot be used'}; set it to another checkpoint")
    return Start(path.parent.parent, read_record(path), [], branches=True)


def start_line(start: Start, recipe: Recipe) -> str:
    """What is read, and which fields are not."""
    unread = ["model.from"] if recipe.model.from_ is not None else []
    if start.record is None:
        return (
            f"starting from the weights of model.from {recipe.model.from_}" if unread else "starting from new weights"
        )
    if start.branches:
        read = f"branching from step {start.record.step} of {start.run_dir}"
    else:
        read = f"resuming from step {start.record.step} of {start.run_dir}"
        unread += ["train.branch_from"] if recipe.train.branch_from is not None else []
    return read + (f"; the weights of {' and '.join(unread)} are not read" if unread else "")


def copy_metrics(start: Start, run_dir: Path) -> None:
    """A branch begins with the lines of the run that it branches from; those after its step are removed later."""
    theirs, ours = start.run_dir / "metrics.jsonl", run_dir / "metrics.jsonl"
    if start.branches and theirs.is_file() and not ours.exists():
        write_whole(ours, theirs.read_bytes())


def find_newest(run_dir: Path) -> tuple[CheckpointRecord | None, list[Skipped]]:
    """The record of the newest checkpoint that verifies, and the later ones. Raises UserError when none verifies."""
    checkpoints = run_dir.absolute() / "checkpoints"
    found = newest_verified(checkpoints) if jax.process_index() == 0 else Newest(None, [])
    unusable = UNUSABLE if found.skipped else NOTHING
    step = from_first_process(int(found.path.name) if found.path else unusable)
    if step == UNUSABLE:
        raise refuse_all(found.skipped) if found.skipped else UserError(f"{checkpoints}: no checkpoint can be used")
    if step == NOTHING:
        return None, []
    return read_record(checkpoints / str(step)), found.skipped


def read_record(checkpoint: Path) -> CheckpointRecord:
    file = checkpoint / "record" / "record.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=CheckpointRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); move {checkpoint} away to resume") from error


def set_aside(start: Start) -> None:
    """Renames the checkpoints that were skipped to N.damaged, and says what is used instead."""
    if start.record is None or jax.process_index() != 0:
        return
    for path, found in start.skipped:
        aside, count = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.damaged-{count}")
        os.replace(path, aside)
        report(f"checkpoint {path.name} is skipped: {found}; moved to {aside}")
    if start.skipped:
        report(f"resumes from step {start.record.step}, which verifies; the steps after it are trained again")
    if unverified(start.checkpoint):
        report(
            f"warning: checkpoint {start.record.step} has no digests.json (an earlier version wrote it): not verified"
        )
