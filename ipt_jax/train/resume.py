"""What a run resumes from: the newest checkpoint whose bytes verify, and whether the recipe is the one that made it.

Guarantees: nothing is loaded before its digests were compared; a checkpoint that does not verify is named with the file
and what is wrong, moved aside and never deleted; a run whose data plan, model, optimizer or seed differ from the
checkpoint's is refused, naming the field, before anything is moved. The first process reads and decides for all hosts:
damage that only another host's view of the disk shows is not seen.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import msgspec

from ipt_jax.core.checkpoint_digests import Newest, Skipped, newest_verified, refuse_all, unverified
from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import difference, flatten
from ipt_jax.train.checkpoint import CheckpointRecord, from_first_process
from ipt_jax.train.run_info import report

NOTHING, UNUSABLE = -1, -2


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
    file = checkpoints / str(step) / "record" / "record.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=CheckpointRecord), found.skipped
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); move the folder of step {step} away to resume") from error


def set_aside(run_dir: Path, record: CheckpointRecord | None, skipped: list[Skipped]) -> None:
    """Renames the checkpoints that were skipped to N.damaged, and says what is used instead."""
    if record is None or jax.process_index() != 0:
        return
    for path, damage in skipped:
        aside, count = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.damaged-{count}")
        os.replace(path, aside)
        report(f"checkpoint {path.name} is skipped: {damage}; moved to {aside}")
    if skipped:
        report(f"resumes from step {record.step}, which verifies; the steps after it are trained again")
    if unverified(run_dir / "checkpoints" / str(record.step)):
        report(f"warning: checkpoint {record.step} has no digests.json (an earlier version wrote it): not verified")


def refuse_changed(run_dir: Path, record: CheckpointRecord, made_with: dict[str, Any]) -> None:
    """Raises UserError naming the first field in which the run's checkpoint and the recipe differ."""
    before, now = flatten(record.made_with), flatten(json.loads(json.dumps(made_with)))
    for field in dict.fromkeys([*now, *before]):  # a tokenizer before the contents that it changed
        if before.get(field) != now.get(field):
            raise UserError(
                f"run_dir {run_dir}: its checkpoint at step {record.step} was made with {field}="
                f"{difference(before.get(field), now.get(field))}; set another run_dir, or restore the old value"
            )
