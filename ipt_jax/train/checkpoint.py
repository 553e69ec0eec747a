"""Checkpoints in RUN/checkpoints/STEP, written by Orbax while training goes on.

Guarantees: a directory that carries a step's number is whole (Orbax writes under another name and renames at the end;
leftovers of a killed save are removed at the next start); the last K are kept; a run whose data plan, model, optimizer
or seed differ from the checkpoint's is refused, naming the field. Beside the arrays (`params`, `optimizer`) lie
`record` (step, tokens, what the run was made with) and `model.json`, so that one step's directory can be read alone.
Does not check a checkpoint's bytes again when it reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import msgspec
import orbax.checkpoint as ocp
from etils import epath

from ipt_jax.corpus.settings import UserError
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.paths import LiteralPath
from ipt_jax.train.state import TrainState


class Record(msgspec.Struct):
    """What a checkpoint knows of its run. `made_with` must be equal to go on."""

    step: int
    tokens: int  # trained on so far, padding not counted
    plan_fingerprint: str
    made_with: dict[str, Any]


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


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, model: ModelConfig, keep: int):
        self.path = run_dir.absolute() / "checkpoints"  # Orbax refuses relative paths
        self._manager = ocp.CheckpointManager(
            LiteralPath(self.path),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "record": RecordHandler(model),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for a save under way: leaving earlier would throw it away."""
        self._manager.close()

    def latest(self) -> Record | None:
        """The record of the newest whole checkpoint."""
        step = self._manager.latest_step()
        if step is None:
            return None
        return msgspec.json.decode((self.path / str(step) / "record" / "record.json").read_bytes(), type=Record)

    def save(self, state: TrainState, record: Record) -> None:
        """Copies the state off the devices and returns; writing goes on in the background."""
        self._manager.save(
            record.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.optimizer),
                record=RecordSave(msgspec.to_builtins(record)),
            ),
            force=True,
        )

    def restore(self, step: int, state: TrainState, shardings: TrainState) -> TrainState:
        """The state saved at `step`, straight into its shards; `state` gives shapes."""
        wanted = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), state, shardings
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(wanted.params),
                optimizer=ocp.args.StandardRestore(wanted.optimizer),
            ),
        )
        return TrainState(jax.device_put(jnp.int32(step), shardings.step), restored["params"], restored["optimizer"])


def refuse_changed(run_dir: Path, record: Record, made_with: dict[str, Any]) -> None:
    """Raises UserError naming the first field in which the run's checkpoint and the recipe differ."""
    before, now = flatten(record.made_with), flatten(json.loads(json.dumps(made_with)))
    for field in dict.fromkeys([*now, *before]):  # a tokenizer before the contents that it changed
        if before.get(field) != now.get(field):
            raise UserError(
                f"run_dir {run_dir}: its checkpoint at step {record.step} was made with {field}="
                f"{before.get(field)!r}, now it is {now.get(field)!r}; give another run_dir, or set it back"
            )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b.0": value} of nested dicts and lists."""
    if not isinstance(value, dict | list) or not value:
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for name, inner in items:
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat
