"""The training recipe: what `ipt plan`, `ipt train` and `ipt compile` read from one YAML file.

Guarantees that every field is checked before anything runs, that a field which is left out has a default that works,
and that nothing here imports JAX. It holds no run-time choice: what a default such as `compute_dtype: auto` comes to
on the devices at hand is printed at the start of a run and written to `run.json`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ipt_jax.corpus.settings import Settings, UserError
from ipt_jax.data.settings import DataSettings
from ipt_jax.model.config import ModelSettings

Saved = Literal["query", "key", "value", "output", "gate", "up"]


class TrainSettings(Settings):
    """The step, and how often a run reports and saves. `microbatch` left out: the whole batch at once."""

    batch_tokens: int = Field(gt=0)
    microbatch: int | None = Field(default=None, gt=0)  # rows per (data x fsdp) shard per accumulation step
    # Kept for the backward pass: all, products with weights, the layer's input alone, or that and what is named.
    remat: Literal["none", "dots", "full"] | tuple[Saved, ...] = "none"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPUs
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    strict: bool = False  # any fallback is an error
    loss_chunk: int | None = Field(default=None, gt=0)  # tokens whose logits exist at a time, per shard
    z_loss: float = Field(default=0.0, ge=0)
    seed: int = 0
    log_every: int = Field(default=10, gt=0)  # steps
    checkpoint_every: int = Field(default=1000, gt=0)  # steps
    keep_checkpoints: int = Field(default=2, gt=0)


class OptimizerSettings(Settings):
    """AdamW by default. The rate rises over `warmup_steps`, then follows `schedule` down to `min_ratio` of its peak."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)  # of matrices; norms are never decayed
    clip_norm: float | None = Field(default=1.0, gt=0)  # null: no clipping


class MeshSettings(Settings):
    """Devices along each mesh axis; one of them may be -1 and takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    devices: int | None = Field(default=None, ge=1)  # that training needs; another number is an error


class Recipe(Settings):
    """One training run."""

    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()
    run_dir: str


def rows_per_step(recipe: Recipe) -> int:
    """Rows of the global batch."""
    batch_tokens, seq_len = recipe.train.batch_tokens, recipe.data.seq_len
    if batch_tokens % seq_len:
        raise UserError(
            f"train.batch_tokens is {batch_tokens}, no multiple of data.seq_len {seq_len}; "
            f"set train.batch_tokens to {_multiple(batch_tokens, seq_len)}"
        )
    return batch_tokens // seq_len


def check_schedule(recipe: Recipe, steps: int) -> None:
    """Raises UserError where a plan of `steps` ends before the warm-up does."""
    if recipe.optimizer.warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_steps is {recipe.optimizer.warmup_steps}, but the plan has {steps} steps; "
            f"set it below {steps}, or lower train.batch_tokens for more steps"
        )


def accumulation_steps(recipe: Recipe, shards: int) -> int:
    """Micro-batches per step when rows are split over `shards` (data x fsdp) groups of devices."""
    rows = rows_per_step(recipe)
    microbatch = recipe.train.microbatch or max(1, rows // shards)
    if rows % (microbatch * shards):
        fits = _multiple(recipe.train.batch_tokens, recipe.data.seq_len * microbatch * shards)
        other = f", or train.microbatch to a divisor of {rows // shards}" if rows % shards == 0 else ""
        raise UserError(
            f"train.batch_tokens is {recipe.train.batch_tokens}, no multiple of seq_len {recipe.data.seq_len} x "
            f"microbatch {microbatch} x {shards} (data x fsdp); set train.batch_tokens to {fits}{other}"
        )
    return rows // (microbatch * shards)


def _multiple(value: int, unit: int) -> int:
    """The multiple of `unit` nearest to `value`, at least one."""
    return max(1, round(value / unit)) * unit
