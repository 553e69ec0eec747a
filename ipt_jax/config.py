"""The training recipe: what `ipt plan`, `ipt train` and `ipt compile` read from one YAML file.

Guarantees: every field is checked before anything runs, and optional fields have defaults that work. This module does
not import JAX. Values chosen at run time, such as that of `compute_dtype: auto`, are printed at the start of a run and
written to `run.json`.
"""

from __future__ import annotations

from typing import Literal, Self

import pydantic
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.data.mixture import DataSettings
from ipt_jax.model.config import ModelSettings

Saved = Literal["query", "key", "value", "output", "gate", "up"]


class ProfileSettings(Settings):
    """A window of steps to trace."""

    start: int = Field(gt=0)
    """First step of the window. A run that resumes after it writes no trace."""
    steps: int = Field(default=3, gt=0)
    """Number of steps."""


class TrainSettings(Settings):
    """The train step, and how often a run logs and saves."""

    batch_tokens: int = Field(gt=0)
    """Tokens per step. A multiple of `data.seq_len`."""
    microbatch: int | None = Field(default=None, gt=0)
    """Rows per data x fsdp shard and accumulation step. null: the full batch at once."""
    remat: Literal["none", "dots", "full"] | tuple[Saved, ...] = "none"
    """What the backward pass recomputes: none, all but matrix products (dots), each layer (full) or all but a list."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations. auto: bfloat16 on accelerators, float32 on CPUs."""
    reduce_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which gradients of split weights are summed over fsdp. auto: that of `compute_dtype`."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel. auto: cudnn on GPUs, splash on TPUs, xla elsewhere."""
    strict: bool = False
    """Raise an error instead of using a fallback."""
    loss_chunk: int | None = Field(default=None, gt=0)
    """Tokens per shard whose logits are in memory at a time. null: chosen for the device."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax denominator."""
    seed: int = 0
    """Random seed of new weights."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two log lines."""
    checkpoint_every: int | None = Field(default=1000, gt=0)
    """Steps between two checkpoints. null: by `checkpoint_minutes` alone."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Minutes after a save at which the next one is due, at a logged step. null: by `checkpoint_every` alone."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Number of latest checkpoints to keep."""
    keep_every: int | None = Field(default=None, gt=0)
    """Steps between two checkpoints that are never removed; saved at multiples of it. null: none."""
    keep_hours: float | None = Field(default=None, gt=0)
    """Hours between two checkpoints that are never removed, from the first one on. null: none."""
    keep_best: str | None = None
    """Measure of the validation. The checkpoint with its lowest value is kept. null: none."""
    stop_at_step: int | None = Field(default=None, gt=0)
    """Step at which this command ends, with the schedule of the full plan. null: the last step of the plan."""
    skip_steps: tuple[int, ...] = ()
    """Steps whose update is skipped, such as one whose batch makes the loss diverge."""
    max_bad_steps: int = Field(default=10, gt=0)
    """Steps in a row without a finite loss and gradient after which training stops. Their updates are skipped."""
    on_spike: Literal["warn", "skip"] = "warn"
    """What to do when the loss is far above the median of the last 128 steps. skip: as if it were not finite."""
    branch_from: PathText | None = None
    """Run, or step in its `checkpoints`, that a new `run_dir` continues: weights, optimizer state, step and data."""
    stall_minutes: float | None = Field(default=60.0, gt=0)
    """Minutes without a finished step after which training exits with the stack traces. null: no limit."""
    profile: ProfileSettings | None = None
    """Steps of which the first process writes an XPlane trace to `profile` in `run_dir`. null: none."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases that gets the logged metrics too. Needs the package wandb. null: none."""


class OptimizerSettings(Settings):
    """AdamW by default. The rate rises over `warmup_steps`, then follows `schedule` down to `min_ratio` of its peak."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warm-up. wsd: constant, then a linear decay over `decay_steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the peak."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Steps of the decay of `schedule: wsd`. null: a tenth of the run."""
    decay_start: int | None = Field(default=None, ge=0)
    """Step after which the decay of wsd begins. The run ends with the decay. null: it ends at the last planned step."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which Adam's two moments are stored. They are updated in float32. May change at a resume."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices. Norms are not decayed."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Maximum norm of the global gradient. null: no clipping."""

    @pydantic.model_validator(mode="after")
    def _decay_of_wsd(self) -> Self:
        stated = [name for name in ("decay_steps", "decay_start") if getattr(self, name) is not None]
        if stated and self.schedule != "wsd":
            raise ValueError(f"{stated[0]} is for schedule wsd, not {self.schedule}; set schedule to wsd")
        return self

    def decay(self, steps: int) -> tuple[int, int]:
        """The steps done before and after the decay of wsd, in a run of `steps`."""
        length = self.decay_steps or max(steps // 10, 1)
        start = steps - length if self.decay_start is None else self.decay_start
        return start, start + length


class MeshSettings(Settings):
    """Devices along each mesh axis. At most one axis may be -1."""

    data: int = 1
    """Replicas of the model (data parallelism). -1: all remaining devices."""
    fsdp: int = -1
    """Devices that shard the weights. -1: all remaining devices."""
    tensor: int = 1
    """Devices that split a matrix product (tensor parallelism). -1: all remaining devices."""
    devices: int | None = Field(default=None, ge=1)
    """Devices that `ipt train` requires; another number is an error. null: any. Ignored by `ipt compile`."""


class ValidationSource(Settings):
    """Token shards that no run trains on."""

    name: str = Field(min_length=1)
    """Name of the source in messages."""
    path: PathText
    """Output directory of `ipt tokenize`. It may share no id with the sources of training."""


class ValidationSettings(Settings):
    """The loss on documents that training leaves out: those of `data.held_out_share`, and sources of its own."""

    every_steps: int = Field(default=500, gt=0)
    """Steps between two validations. The last step is validated too, and with `train.keep_best` each checkpoint."""
    tokens: int | None = Field(default=1_000_000, gt=0)
    """Maximum tokens of each source. null: all that it holds."""
    sources: list[ValidationSource] = []
    """Token directories for validation alone."""


class Recipe(Settings):
    """One training run."""

    model: ModelSettings
    """A preset or a directory with weights, and overrides. In this block null means: from the preset or directory."""
    data: DataSettings
    """Token shards, their amounts and how they are packed into rows."""
    train: TrainSettings
    """The train step, logging and checkpoints."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer and learning rate."""
    mesh: MeshSettings = MeshSettings()
    """Devices along each mesh axis."""
    validation: ValidationSettings | None = None
    """When and on what to measure the held-out loss. It does not influence training. null: never."""
    run_dir: PathText
    """Directory of checkpoints, metrics and `run.json`. A rerun resumes from it."""


def rows_per_step(recipe: Recipe) -> int:
    """Rows of the global batch."""
    batch_tokens, seq_len = recipe.train.batch_tokens, recipe.data.seq_len
    if batch_tokens % seq_len:
        raise UserError(
            f"train.batch_tokens is {batch_tokens}, not a multiple of data.seq_len {seq_len}; "
            f"set train.batch_tokens to {_multiple(batch_tokens, seq_len)}"
        )
    return batch_tokens // seq_len


def check_schedule(recipe: Recipe, steps: int) -> None:
    """Raises UserError if a plan of `steps` ends before the warm-up or before the decay of wsd does."""
    optimizer = recipe.optimizer
    if optimizer.warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, but the plan has {steps} steps; "
            f"set it below {steps}, or lower train.batch_tokens for more steps"
        )
    start, stop = optimizer.decay(steps)
    if optimizer.schedule == "wsd" and not optimizer.warmup_steps <= start <= stop <= steps:
        raise UserError(
            f"optimizer: the decay would run from step {start} to {stop}, but the warm-up ends at step "
            f"{optimizer.warmup_steps} and the plan at {steps}; change decay_steps or decay_start, or raise data.tokens"
        )


def last_step(recipe: Recipe, steps: int) -> int:
    """The last step of a run with a plan of `steps`: that of the plan or of the decay."""
    return min(steps, recipe.optimizer.decay(steps)[1]) if recipe.optimizer.schedule == "wsd" else steps


def accumulation_steps(recipe: Recipe, shards: int) -> int:
    """Micro-batches per step when rows are split over `shards` (data x fsdp) groups of devices."""
    rows = rows_per_step(recipe)
    microbatch = recipe.train.microbatch or max(1, rows // shards)
    if rows % (microbatch * shards):
        fits = _multiple(recipe.train.batch_tokens, recipe.data.seq_len * microbatch * shards)
        other = f", or train.microbatch to a divisor of {rows // shards}" if rows % shards == 0 else ""
        raise UserError(
            f"train.batch_tokens is {recipe.train.batch_tokens}, not a multiple of seq_len {recipe.data.seq_len} x "
            f"microbatch {microbatch} x {shards} (data x fsdp); set train.batch_tokens to {fits}{other}"
        )
    return rows // (microbatch * shards)


def _multiple(value: int, unit: int) -> int:
    """The multiple of `unit` nearest to `value`, at least one."""
    return max(1, round(value / unit)) * unit
