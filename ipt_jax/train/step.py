"""The train step, a pure function (state, batch) -> (state, metrics), and its construction from a recipe and a mesh.

Guarantees: the loss is the sum over the global batch divided once by the global count of target tokens, so neither
micro-batches nor meshes change what is optimized; gradients and updates are float32 whatever the compute dtype. A batch
is a dict of arrays [A, M, T]: A accumulation steps of M rows. Metrics are scalars and sums by document kind; the caller
decides what follows from them. A step that is not finite, or has no targets, leaves parameters and moments unchanged.

`build_program` makes every choice that the recipe leaves open (attention kernel, dtype, accumulation, loss chunk), with
its reason, for `ipt train` and `ipt compile` alike. `strict: true` turns a fallback into an error. Devices may be
descriptions of hardware that is not attached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipt_jax.config import OptimizerSettings, Recipe, accumulation_steps, rows_per_step
from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import KINDS
from ipt_jax.model.attention import CUDNN_ROWS, choose_attention, cudnn_gives_nan
from ipt_jax.model.config import ModelConfig, param_count
from ipt_jax.model.decoder import Execution, Mistral, Params, decay_mask, logical_axes
from ipt_jax.parallel.fsdp import OnDevice
from ipt_jax.parallel.mesh import batch_sharding, row_shards
from ipt_jax.parallel.rules import bytes_per_device, place_params
from ipt_jax.train.loss import chunk_size, cross_entropy, no_sums
from ipt_jax.train.state import TrainState, abstract_state, state_shardings

Batch = dict[str, Array]
Metrics = dict[str, Any]  # arrays, and dicts of arrays


@dataclass(frozen=True)
class StepShape:
    """What of a recipe and its devices decides the compiled step."""

    accumulation: int
    compute_dtype: str
    reduce_dtype: str  # in which a split weight's gradients are summed over fsdp
    remat: str | tuple[str, ...]
    attention: str
    separate_documents: bool  # cross_document: block
    loss_chunk: int  # tokens of a device whose logits exist at a time
    mlp_chunk: int | None  # tokens of a device whose feed-forward products exist at a time
    z_loss: float
    unroll: bool  # layers written out, not scanned


def loss_of(
    params: Params, rows: Batch, count: Array, *, config: ModelConfig, shape: StepShape, device: OnDevice,
    groups: int = len(KINDS) + 1,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """The share of a device's rows [M, T] in the mean loss over `count` targets, and its sums by kind [groups]."""
    dtype, axes = jnp.dtype(shape.compute_dtype), logical_axes(config)
    # Both tables are gathered once for all rows: looking up in a table split along D would move activations.
    tables: Params = {
        name: device.gather(params[name], axes[name], dtype) for name in ("embedding", "head") if name in params
    }
    model = Mistral.from_params(config, {**params, **tables})
    head = model.output_projection()
    hidden = model.hidden(
        rows["tokens"],
        segment_ids=rows["segment_ids"] if shape.separate_documents else None,
        positions=rows["positions"] if shape.separate_documents else None,
        execution=Execution(
            compute_dtype=dtype, remat=shape.remat, mlp_chunk=shape.mlp_chunk, unroll=shape.unroll,
            attention=device.attention(shape.attention), constrain=device.constrain, gather=device.gather,
        ),
    )  # [M, T, D]  # fmt: skip
    with jax.named_scope("loss"):
        objective, sums = cross_entropy(
            hidden, head, rows["targets"], rows["loss_mask"], rows["kinds"],
            chunk=shape.loss_chunk, z_loss=shape.z_loss, groups=groups,
        )  # fmt: skip
    return objective / count, sums


def gradients(
    params: Params, batch: Batch, *, config: ModelConfig, shape: StepShape, mesh: Mesh, shardings: dict[str, Any]
) -> tuple[Any, dict[str, Array]]:
    """Gradients of the mean loss over the global batch [A, M, T], and its sums by kind.

    Every device differentiates the loss of its own rows; gathering a weight and adding up its gradient are written out
    (see OnDevice), not left to the partitioner. The `tensor` axis is.
    """
    count = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)
    device = OnDevice(mesh, config.hidden_size, shape.reduce_dtype)
    axes = logical_axes(config)
    gradient = jax.grad(functools.partial(loss_of, config=config, shape=shape, device=device), has_aux=True)

    def of_device(params: Params, batch: Batch, count: Array) -> tuple[Any, dict[str, Array]]:
        # Scanned layers cast their own slices: all cast weights would be copied into the loop slice by slice.
        early = shape.unroll and shape.reduce_dtype == shape.compute_dtype  # a cast weight rounds its gradient's sum
        weights = cast_matrices(params, axes, shape.compute_dtype) if early else params

        def of_rows(rows: Batch) -> tuple[Any, dict[str, Array]]:
            grads, sums = gradient(weights, rows, count)
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


def cast_matrices(params: Params, axes: dict[str, Any], dtype: str) -> Params:
    """Matrices in the compute dtype; norms stay float32."""
    return jax.tree.map(lambda w, names: w if "norm" in names else w.astype(dtype), params, axes)


def visible_pairs(batch: Batch, config: ModelConfig, shape: StepShape) -> Array:
    """(query, key) pairs that attention cannot avoid in this batch: its part of the model FLOPs."""
    place = batch["positions"] if shape.separate_documents else jnp.arange(batch["tokens"].shape[-1])
    seen = place + 1 if config.sliding_window is None else jnp.minimum(place + 1, config.sliding_window)
    return jnp.where(batch["segment_ids"] > 0, seen, 0).sum(dtype=jnp.float32)  # int32 ends at 1,023 rows of 2,048


def make_step(
    config: ModelConfig,
    settings: OptimizerSettings,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    shape: StepShape,
    mesh: Mesh,
    shardings: TrainState,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step for these settings; not yet jitted. A step whose mean loss exceeds `loss_limit` changes nothing."""

    def train_step(state: TrainState, batch: Batch, loss_limit: Array | None = None) -> tuple[TrainState, Metrics]:
        grads, sums = gradients(state.params, batch, config=config, shape=shape, mesh=mesh, shardings=shardings.params)
        with jax.named_scope("optimizer"):
            squares = jax.tree.map(lambda grad: jnp.square(grad).sum(), grads)
            norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
            grads = clip(grads, norm, settings.clip_norm)
            directions, moments = optimizer.update(grads, state.optimizer, state.params)
            rate = learning_rate(settings, state.step, total_steps)
            params = jax.tree.map(lambda param, direction: param - rate * direction, state.params, directions)
            # A step that is not finite, or has no targets, changes nothing but the count of steps.
            applied = jnp.isfinite(norm) & jnp.isfinite(sums["loss"].sum()) & (sums["targets"].sum() > 0)
            if loss_limit is not None:
                applied &= sums["loss"].sum() <= loss_limit * sums["targets"].sum()
            params, moments = jax.tree.map(
                lambda new, old: jnp.where(applied, new, old), (params, moments), (state.params, state.optimizer)
            )
        metrics = {
            "loss_sums": sums["loss"],
            "targets": sums["targets"],
            "grad_norm": norm,
            "grad_norms": norms_by_group(squares),
            "applied": applied,
            "learning_rate": rate,
            "tokens": (batch["segment_ids"] > 0).sum(),
            "pairs": visible_pairs(batch, config, shape),
        }
        return TrainState(state.step + 1, params, moments), metrics

    return train_step


GROUPS = {
    "attention": ("query", "key", "value", "output"),
    "feed_forward": ("gate", "up", "down"),
    "norms": ("attention_norm", "mlp_norm", "norm"),
}  # of parameters; `embedding` and `head` are groups of their own


def norms_by_group(squares: Params) -> dict[str, Array]:
    """The norm of each group of tensors, from each tensor's sum of squares."""
    groups = {name: group for group, names in GROUPS.items() for name in names}
    sums: dict[str, Array] = {}
    for path, square in jax.tree_util.tree_leaves_with_path(squares):
        name = path[-1].key
        group = groups.get(name, name)
        sums[group] = sums[group] + square if group in sums else square
    return {group: jnp.sqrt(total) for group, total in sums.items()}


def learning_rate(settings: OptimizerSettings, step: Array | int, total_steps: int) -> Array:
    """The rate of step `step` (from 0). The first step of a warm-up already moves; the last step has the least rate."""
    done = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (done + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "wsd":  # at its peak equal to `constant` in all bits
        start, stop = settings.decay(total_steps)
        decayed = jnp.clip((done + 1 - start) / (stop - start), 0.0, 1.0)
        return settings.learning_rate * warmup * (1.0 - (1.0 - settings.min_ratio) * decayed)
    span = max(1, total_steps - 1 - settings.warmup_steps)
    progress = jnp.clip((done - settings.warmup_steps) / span, 0.0, 1.0)
    shape = {
        "constant": jnp.ones(()),
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    }[settings.schedule]
    if settings.schedule != "constant":
        shape = settings.min_ratio + (1.0 - settings.min_ratio) * shape
    return settings.learning_rate * warmup * shape


BFLOAT16_BETA2 = 0.99  # rounding to 8 bits undoes a decay by less than 1 / 256


def make_optimizer(settings: OptimizerSettings, decay: Any) -> optax.GradientTransformation:
    """Turns clipped gradients into directions, before the learning rate. `decay`: a bool per parameter."""
    direction = {
        "adamw": optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps, mu_dtype=jnp.float32),
        "sgd": optax.identity(),
    }[settings.name]
    if settings.moments_dtype != "float32":
        if settings.name == "adamw" and settings.beta2 > BFLOAT16_BETA2:
            raise UserError(
                f"optimizer.beta2 is {settings.beta2}, too near 1 for a second moment in bfloat16, which would never "
                f"decay; set optimizer.beta2 to {BFLOAT16_BETA2} or less, or optimizer.moments_dtype to float32"
            )
        direction = stored_as(direction, jnp.dtype(settings.moments_dtype))
    return optax.chain(
        direction,
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
    )


def stored_as(direction: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`direction` with its moments stored as `dtype` between float32 updates (Optax does so for the first one only)."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found, state = direction.update(grads, cast(state, jnp.float32), params)
        return found, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(direction.init(params), dtype), update)


def clip(grads: Any, norm: Array, limit: float | None) -> Any:
    """`grads` of global norm `norm`, scaled down to norm `limit` where they exceed it."""
    if limit is None:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda grad: grad * scale, grads)


# Logits held at a time on one device, where the recipe leaves train.loss_chunk open. On CPUs a chunk that stays in the
# cache is nearly twice as fast as one pass; on accelerators only memory matters.
LOGITS_BYTES = 256 * 2**20
CPU_CHUNK_TOKENS = 256
# A layer's products [tokens, F] at a time, where the layer computes them again in the backward pass anyway. Matrix
# products of some thousand rows fill any accelerator.
MLP_BYTES = 128 * 2**20
BATCH_DTYPES = {
    "tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.bool_,
    "segment_ids": jnp.int32, "positions": jnp.int32, "kinds": jnp.int32,
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A train step and everything needed to lower it."""

    model: ModelConfig
    mesh: Mesh
    shape: StepShape
    rows: int  # of the global batch
    optimizer: optax.GradientTransformation
    state: TrainState  # abstract
    shardings: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]  # abstract, with shardings
    step: jax.stages.Wrapped  # jitted, the state donated
    choices: dict[str, Any]  # what was chosen and why, for people and run.json


def build_program(recipe: Recipe, model: ModelConfig, mesh: Mesh, total_steps: int) -> Program:
    """The program of `recipe` on the devices of `mesh`. Raises UserError for what cannot be."""
    device = mesh.devices.flat[0]
    attention, reason, fallbacks = _attention(recipe, model, device.device_kind, device.platform)
    shards = row_shards(mesh)
    accumulation = accumulation_steps(recipe, shards)
    rows = rows_per_step(recipe)
    chunk, chunk_reason = _chunk_tokens(recipe, model, mesh)
    tokens = recipe.data.seq_len * rows // accumulation // shards  # of one micro-batch on one device
    shape = StepShape(
        accumulation=accumulation,
        compute_dtype=(compute_dtype := _compute_dtype(recipe, device.platform)),
        reduce_dtype=compute_dtype if recipe.train.reduce_dtype == "auto" else recipe.train.reduce_dtype,
        remat=recipe.train.remat,
        attention=attention,
        separate_documents=recipe.data.cross_document == "block",
        loss_chunk=chunk_size(tokens, chunk),
        mlp_chunk=_mlp_chunk(recipe, model, mesh, tokens),
        z_loss=recipe.train.z_loss,
        unroll=device.platform in ("cuda", "gpu") and recipe.train.remat != "full",
    )
    if recipe.data.seq_len > model.max_positions:
        raise UserError(
            f"data.seq_len is {recipe.data.seq_len}, but model.max_positions is {model.max_positions}; lower "
            f"data.seq_len, or set model.max_positions to {recipe.data.seq_len} (stored weights have not seen the "
            "positions beyond their own)"
        )
    optimizer = make_optimizer(recipe.optimizer, decay_mask(model))
    state = abstract_state(model, optimizer)
    placement = place_params(logical_axes(model), state.params, mesh)
    fallbacks = fallbacks + placement.notes
    if recipe.train.strict and fallbacks:
        raise UserError(f"train.strict: {fallbacks[0]}; change the recipe, or set train.strict to false")
    shardings = state_shardings(state, optimizer, placement.shardings, mesh)
    step = make_step(model, recipe.optimizer, optimizer, total_steps, shape, mesh, shardings)
    whole = NamedSharding(mesh, PartitionSpec())
    choices = {
        **asdict(shape),
        "attention_reason": reason,
        "loss_chunk_reason": chunk_reason,
        "mesh": dict(mesh.shape),
        "devices": f"{mesh.devices.size} x {device.device_kind}",
        "parameters": param_count(model),
        "state_bytes_per_device": bytes_per_device(state, shardings),
        "rows_per_step": rows,
        "fallbacks": fallbacks,
    }
    return Program(
        model, mesh, shape, rows, optimizer, state, shardings,
        batch=abstract_batch(recipe.data.seq_len, rows, accumulation, batch_sharding(mesh)),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole)),
        choices=choices,
    )  # fmt: skip


def lower(program: Program, *loss_limit: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The step lowered for the program's mesh, from shapes alone."""
    state = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        program.state,
        program.shardings,
    )
    return program.step.lower(state, program.batch, *loss_limit)


def abstract_batch(
    seq_len: int, rows: int, accumulation: int, sharding: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch [A, M, T]."""
    shape = (accumulation, rows // accumulation, seq_len)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_DTYPES.items()}


def _attention(recipe: Recipe, model: ModelConfig, kind: str, platform: str) -> tuple[str, str, list[str]]:
    """Kernel, reason, and the fallback if it is one."""
    asked, seq_len = recipe.train.attention, recipe.data.seq_len
    dtype = _compute_dtype(recipe, platform)
    name, reason = choose_attention(kind, model, seq_len, recipe.data.cross_document, dtype)
    if name == "cudnn" and asked in ("auto", name) and cudnn_gives_nan(kind, seq_len, recipe.data.cross_document):
        below = seq_len // CUDNN_ROWS * CUDNN_ROWS
        lengths = f"{below} or {below + CUDNN_ROWS}" if below else f"{CUDNN_ROWS}"
        raise UserError(
            f"data.seq_len must be a multiple of {CUDNN_ROWS} with data.cross_document: block on {kind}, got {seq_len} "
            f"(NaN in cuDNN's backward pass); set data.seq_len to {lengths}, or train.attention to xla"
        )
    if asked == "auto":
        return name, reason, [f"attention: {reason}"] if name == "xla" and platform != "cpu" else []
    if asked not in ("xla", name):
        raise UserError(f"train.attention is {asked}, which cannot run here ({reason}); set it to {name} or auto")
    return asked, "asked for by train.attention", []


def _compute_dtype(recipe: Recipe, platform: str) -> str:
    if recipe.train.compute_dtype != "auto":
        return recipe.train.compute_dtype
    return "float32" if platform == "cpu" else "bfloat16"


def _chunk_tokens(recipe: Recipe, model: ModelConfig, mesh: Mesh) -> tuple[int, str]:
    """Tokens of one row shard whose logits are held at a time, and why so many."""
    if recipe.train.loss_chunk is not None:
        return recipe.train.loss_chunk, "asked for by train.loss_chunk"
    if mesh.devices.flat[0].platform == "cpu":
        return CPU_CHUNK_TOKENS, f"{CPU_CHUNK_TOKENS} tokens stay in a CPU's cache"
    tokens = LOGITS_BYTES * mesh.shape["tensor"] // (4 * model.vocab_size)
    return tokens, f"float32 logits of at most {LOGITS_BYTES // 2**20} MiB a device"


def _mlp_chunk(recipe: Recipe, model: ModelConfig, mesh: Mesh, tokens: int) -> int | None:
    """Tokens whose feed-forward products exist at a time; None where they are kept for the backward pass."""
    remat = recipe.train.remat
    if remat in ("none", "dots") or "gate" in remat or "up" in remat:
        return None
    return chunk_size(tokens, MLP_BYTES * mesh.shape["tensor"] // (2 * model.intermediate_size))
