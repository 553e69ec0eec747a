"""Next-token cross entropy from hidden states, in chunks, so that full logits of a large vocabulary never exist.

Guarantees: sums, not means, so that the caller divides once by the global count of targets, whatever the micro-batches;
float32 logits and sums; loss by document kind at no extra pass. The gradient is worked out beside the loss, chunk by
chunk: the logits are computed once, not again in the backward pass. Positions are cut, not rows, because rows are
split over devices; the head's gradient is kept apart for each group of rows until the end, so that devices exchange it
once and not once a chunk. Says nothing about labels: which position predicts what was decided per document.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

KINDS = ("raw", "augmented", "task", "instruction")  # ids 1 to 4 in batches; 0 is padding

Sums = dict[str, Array]  # loss [5], targets [5]: by kind


def cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    kinds: Array,
    *,
    positions: int | None = None,
    shards: int = 1,
    z_loss: float = 0.0,
) -> tuple[Array, Sums]:
    """(objective, sums) of hidden [B, T, D] under head [D, V], `positions` of T at a time (all when None).

    Only the objective has a gradient: the summed cross entropy plus z_loss times the squared log-normalizers.
    """
    B, T, D = hidden.shape
    assert B % shards == 0, f"{B} rows over {shards} shards"
    positions = positions or T
    assert T % positions == 0, f"{positions} positions at a time do not divide {T}"

    def cut(x: Array) -> Array:
        """[C, shards, rows * positions, ...]: chunks first, to be scanned."""
        x = x.reshape(shards, B // shards, T // positions, positions, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(T // positions, shards, B // shards * positions, *x.shape[4:])

    head = head.astype(hidden.dtype)
    return _summed(z_loss, cut(hidden), head, (cut(targets), cut(mask), cut(kinds)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(z_loss: float, hidden: Array, head: Array, labels: Any) -> tuple[Array, Sums]:
    """Without a gradient, for evaluation."""

    def add(total: Any, chunk: Any) -> tuple[Any, None]:
        objective, sums, _ = _chunk(z_loss, head, *chunk)
        return jax.tree.map(jnp.add, total, (objective, sums)), None

    total, _ = _scan(add, _nothing(hidden.shape[1]), (hidden, labels))
    return _over_shards(total)


def _summed_forward(z_loss: float, hidden: Array, head: Array, labels: Any) -> tuple[tuple[Array, Sums], Any]:
    def add(carry: Any, chunk: Any) -> tuple[Any, Array]:
        total, head_grad = carry
        states = chunk[0]
        objective, sums, logits_grad = _chunk(z_loss, head, *chunk)
        logits_grad = logits_grad.astype(head.dtype)
        hidden_grad = jnp.einsum("ntv,dv->ntd", logits_grad, head)
        # turned here, the small operand: one dim of tokens, and no product over the outer dims of both, which XLA
        # either transposes whole (the logits' gradient too) or runs at three quarters of its speed
        states = jax.lax.optimization_barrier(states.swapaxes(1, 2))
        head_grad += jnp.einsum("ndt,ntv->ndv", states, logits_grad, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, total, (objective, sums)), head_grad), hidden_grad

    shards = hidden.shape[1]
    zeros = jnp.zeros((shards, *head.shape), jnp.float32)  # [n, D, V]
    (total, head_grad), hidden_grad = _scan(add, (_nothing(shards), zeros), (hidden, labels))
    return _over_shards(total), (hidden_grad, head_grad.sum(0).astype(head.dtype))


def _summed_backward(z_loss: float, residuals: Any, cotangents: Any) -> tuple[Array, Array, None]:
    hidden_grad, head_grad = residuals
    scale = cotangents[0]
    return hidden_grad * scale.astype(hidden_grad.dtype), head_grad * scale.astype(head_grad.dtype), None


_summed.defvjp(_summed_forward, _summed_backward)


def _scan(add: Any, carry: Any, chunks: Any) -> Any:
    """lax.scan; a single chunk needs no loop."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.scan(add, carry, chunks)
    carry, out = add(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, None if out is None else out[None]


def no_sums() -> Sums:
    return {"loss": jnp.zeros(len(KINDS) + 1), "targets": jnp.zeros(len(KINDS) + 1)}


def _nothing(shards: int) -> tuple[Array, Sums]:
    """Objective and sums kept apart for each shard: devices add them up once, not once a chunk."""
    return jax.tree.map(lambda x: jnp.zeros((shards, *x.shape)), (jnp.zeros(()), no_sums()))


def _over_shards(total: tuple[Array, Sums]) -> tuple[Array, Sums]:
    return jax.tree.map(lambda x: x.sum(0), total)


def _chunk(z_loss: float, head: Array, hidden: Array, labels: tuple[Array, Array, Array]) -> tuple[Array, Sums, Array]:
    """Of each shard n: objective [n], sums by kind [n, 5], gradient with respect to the logits [n, t, V]."""
    targets, mask, kinds = labels
    logits = jnp.einsum("ntd,dv->ntv", hidden, head, preferred_element_type=jnp.float32)
    peak = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - peak)
    total = exps.sum(-1, keepdims=True)
    log_normalizer = (jnp.log(total) + peak)[..., 0]  # [n, t]
    loss = log_normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    counted = mask.astype(jnp.float32)
    objective = (counted * (loss + z_loss * log_normalizer**2)).sum(1)
    slope = (counted * (1.0 + 2.0 * z_loss * log_normalizer))[..., None] / total
    # comparing with an iota instead of scattering: the vocabulary may be split over devices
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    logits_grad = exps * slope - jnp.where(is_target, counted[..., None], 0.0)
    return objective, _by_kind(loss * counted, counted, kinds), logits_grad


def _by_kind(loss: Array, counted: Array, kinds: Array) -> Sums:
    of_kind = kinds[..., None] == jnp.arange(len(KINDS) + 1)  # [n, t, 5]
    return {
        "loss": jnp.where(of_kind, loss[..., None], 0.0).sum(1),
        "targets": jnp.where(of_kind, counted[..., None], 0.0).sum(1),
    }


def chunk_positions(seq_len: int, rows: int, tokens: int) -> int:
    """Positions at a time such that `rows` of them hold at most `tokens`: the largest divisor of `seq_len`."""
    wanted = max(1, min(seq_len, tokens // rows))
    return next(size for size in range(wanted, 0, -1) if seq_len % size == 0)
