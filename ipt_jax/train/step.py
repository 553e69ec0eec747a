"""The train step: a pure function (state, batch) -> (state, metrics).

Guarantees: the loss is the sum over the global batch divided once by the global count of target tokens, so neither
micro-batches nor meshes change what is optimized; gradients and moments are float32 whatever the compute dtype. A batch
is a dict of arrays [A, M, T]: A accumulation steps of M rows. Metrics are scalars and sums by document kind; a loss or
gradient that is not finite is reported in them, the caller decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from ipt_jax.config import OptimizerSettings
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.mistral import forward, head_of
from ipt_jax.parallel.mesh import row_shards
from ipt_jax.parallel.rules import constrainer
from ipt_jax.train.loss import cross_entropy, no_sums
from ipt_jax.train.optim import clip, learning_rate
from ipt_jax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]


@dataclass(frozen=True)
class StepShape:
    """What of a recipe and its devices decides the compiled step."""

    accumulation: int
    compute_dtype: str
    remat: str
    attention: str
    separate_documents: bool  # cross_document: block
    loss_positions: int  # of a row whose logits exist at a time
    z_loss: float


def loss_of(
    params: dict[str, Any], rows: Batch, count: Array, *, model: ModelConfig, shape: StepShape, mesh: Mesh
) -> tuple[Array, dict[str, Array]]:
    """The share of rows [M, T] in the mean loss over `count` targets, and its sums by kind."""
    constrain = constrainer(mesh)
    dtype = jnp.dtype(shape.compute_dtype)
    # The table is gathered over fsdp before the lookup: a lookup in a table split along D would move activations.
    table = constrain(params["embedding"].astype(dtype), ("vocab", None))
    head = constrain(head_of(params, model).astype(dtype), (None, "vocab"))
    hidden = forward(
        {**params, "embedding": table}, model, rows["tokens"],
        segment_ids=rows["segment_ids"] if shape.separate_documents else None,
        positions=rows["positions"] if shape.separate_documents else None,
        compute_dtype=dtype, remat=shape.remat, attention=shape.attention, constrain=constrain,
    )  # [M, T, D]  # fmt: skip
    objective, sums = cross_entropy(
        hidden, head, rows["targets"], rows["loss_mask"], rows["kinds"],
        positions=shape.loss_positions, shards=row_shards(mesh), z_loss=shape.z_loss,
    )  # fmt: skip
    return objective / count, sums


def gradients(
    params: dict[str, Any], batch: Batch, *, model: ModelConfig, shape: StepShape, mesh: Mesh, shardings: dict[str, Any]
) -> tuple[Any, dict[str, Array]]:
    """Gradients of the mean loss over the whole batch [A, M, T], and its sums by kind."""
    count = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)

    def of_rows(rows: Batch) -> tuple[Any, dict[str, Array]]:
        grads, sums = jax.grad(loss_of, has_aux=True)(params, rows, count, model=model, shape=shape, mesh=mesh)
        return jax.lax.with_sharding_constraint(grads, shardings), sums

    if shape.accumulation == 1:
        return of_rows({name: rows[0] for name, rows in batch.items()})

    def add(total: Any, rows: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_rows(rows)), None

    nothing = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings), no_sums()
    return jax.lax.scan(add, nothing, batch)[0]


def visible_pairs(batch: Batch, model: ModelConfig, shape: StepShape) -> Array:
    """(query, key) pairs that attention cannot avoid in this batch: its part of the model FLOPs."""
    place = batch["positions"] if shape.separate_documents else jnp.arange(batch["tokens"].shape[-1])
    seen = place + 1 if model.sliding_window is None else jnp.minimum(place + 1, model.sliding_window)
    return jnp.where(batch["segment_ids"] > 0, seen, 0).sum(dtype=jnp.float32)  # int32 ends at 1,023 rows of 2,048


def make_step(
    model: ModelConfig,
    settings: OptimizerSettings,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    shape: StepShape,
    mesh: Mesh,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step for these settings; not yet jitted."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = gradients(state.params, batch, model=model, shape=shape, mesh=mesh, shardings=shardings.params)
        norm = optax.global_norm(grads)
        grads = clip(grads, norm, settings.clip_norm)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        metrics = {
            "loss_sums": sums["loss"],
            "targets": sums["targets"],
            "grad_norm": norm,
            "learning_rate": learning_rate(settings, state.step, total_steps),
            "tokens": (batch["segment_ids"] > 0).sum(),
            "pairs": visible_pairs(batch, model, shape),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments), metrics

    return train_step
