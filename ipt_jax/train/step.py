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
from jax.sharding import Mesh, PartitionSpec

from ipt_jax.config import OptimizerSettings
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.mistral import forward, logical_axes
from ipt_jax.parallel.mesh import batch_sharding
from ipt_jax.train.device import OnDevice
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
    remat: str | tuple[str, ...]
    attention: str
    separate_documents: bool  # cross_document: block
    loss_chunk: int  # tokens of a device whose logits exist at a time
    mlp_chunk: int | None  # tokens of a device whose feed-forward products exist at a time
    z_loss: float
    unroll: bool  # layers written out, not scanned


def loss_of(
    params: dict[str, Any], rows: Batch, count: Array, *, model: ModelConfig, shape: StepShape, device: OnDevice
) -> tuple[Array, dict[str, Array]]:
    """The share of a device's rows [M, T] in the mean loss over `count` targets, and its sums by kind."""
    dtype = jnp.dtype(shape.compute_dtype)
    # Both tables are made whole once for all rows: looking up in a table split along D would move activations.
    table = device.gather(params["embedding"].astype(dtype), ("vocab", "embed"))
    head = table.T if model.tie_embeddings else device.gather(params["head"].astype(dtype), ("embed", "vocab"))
    hidden = forward(
        {**params, "embedding": table}, model, rows["tokens"],
        segment_ids=rows["segment_ids"] if shape.separate_documents else None,
        positions=rows["positions"] if shape.separate_documents else None,
        compute_dtype=dtype, remat=shape.remat, mlp_chunk=shape.mlp_chunk, unroll=shape.unroll,
        attention=device.attention(shape.attention), constrain=device.constrain, gather=device.gather,
    )  # [M, T, D]  # fmt: skip
    with jax.named_scope("loss"):
        objective, sums = cross_entropy(
            hidden, head, rows["targets"], rows["loss_mask"], rows["kinds"], chunk=shape.loss_chunk, z_loss=shape.z_loss
        )
    return objective / count, sums


def gradients(
    params: dict[str, Any], batch: Batch, *, model: ModelConfig, shape: StepShape, mesh: Mesh, shardings: dict[str, Any]
) -> tuple[Any, dict[str, Array]]:
    """Gradients of the mean loss over the whole batch [A, M, T], and its sums by kind.

    Every device differentiates the loss of its own rows; gathering a weight and adding up its gradient are written out
    (see OnDevice), not left to the partitioner. What lies along `tensor` is.
    """
    count = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)
    device = OnDevice(mesh, model.hidden_size)
    axes = logical_axes(model)

    def of_device(params: dict[str, Any], batch: Batch, count: Array) -> tuple[Any, dict[str, Array]]:
        # Scanned layers cast their own slices: whole cast weights would be copied into the loop slice by slice.
        weights = _cast_matrices(params, axes, shape.compute_dtype) if shape.unroll else params

        def of_rows(rows: Batch) -> tuple[Any, dict[str, Array]]:
            grads, sums = jax.grad(loss_of, has_aux=True)(weights, rows, count, model=model, shape=shape, device=device)
            return jax.tree.map(lambda grad: grad.astype(jnp.float32), grads), sums

        def add(total: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_rows(rows)), None

        if shape.accumulation == 1:
            grads, sums = of_rows({name: rows[0] for name, rows in batch.items()})
        else:
            nothing = jax.tree.map(jnp.zeros_like, params), no_sums()
            (grads, sums), _ = jax.lax.scan(add, nothing, batch)
        return jax.tree.map(device.add_up, grads, axes), device.add_up(sums)

    if not device.manual:  # nothing but tensor is split
        return of_device(params, batch, count)
    specs = jax.tree.map(lambda sharding: device.spec(sharding.spec), shardings)
    rows = device.spec(batch_sharding(mesh).spec)
    on_mesh = jax.shard_map(
        of_device, mesh=mesh, axis_names=device.manual, check_vma=False,
        in_specs=(specs, rows, PartitionSpec()), out_specs=(specs, PartitionSpec()),
    )  # fmt: skip
    return on_mesh(params, batch, count)


def _cast_matrices(params: dict[str, Any], axes: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Matrices in the compute dtype; norms stay float32."""
    return jax.tree.map(lambda w, names: w if "norm" in names else w.astype(dtype), params, axes)


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
        with jax.named_scope("optimizer"):
            norm = optax.global_norm(grads)
            grads = clip(grads, norm, settings.clip_norm)
            updates, moments = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss_sums": sums["loss"],
            "targets": sums["targets"],
            "grad_norm": norm,
            "learning_rate": learning_rate(settings, state.step, total_steps),
            "tokens": (batch["segment_ids"] > 0).sum(),
            "pairs": visible_pairs(batch, model, shape),
        }
        return TrainState(state.step + 1, params, moments), metrics

    return train_step
