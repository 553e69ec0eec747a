"""Next-token cross entropy from hidden states, in chunks, so that full logits of a large vocabulary never exist.

Guarantees: sums, not means, so that the caller divides once by the global count of targets, whatever the micro-batches;
float32 logits and sums; loss by document kind at no extra pass. The gradient is computed with the loss, chunk by chunk:
the logits are computed once, and of the arrays as wide as the vocabulary only the head's float32 gradient and one chunk
exist. A device computes its own rows; nothing is exchanged here. Labels are made per document before packing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ipt_jax.corpus.records import KINDS

Sums = dict[str, Array]  # loss [5], targets [5]: by kind


def cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    kinds: Array,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    groups: int = len(KINDS) + 1,
) -> tuple[Array, Sums]:
    """(objective, sums) of hidden [B, T, D] under head [D, V], `chunk` of its B T tokens at a time (all when None).

    Only the objective has a gradient: the summed cross entropy plus z_loss times the squared log-normalizers. Kinds are
    numbers below `groups`.
    """
    tokens = targets.size
    chunk = chunk or tokens
    assert tokens % chunk == 0, f"chunks of {chunk} tokens do not divide {tokens}"

    def cut(x: Array) -> Array:
        return x.reshape(tokens // chunk, chunk, *x.shape[2:])  # [C, chunk, ...], in place

    return _summed((z_loss, groups), cut(hidden), head.astype(hidden.dtype), (cut(targets), cut(mask), cut(kinds)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(options: tuple[float, int], hidden: Array, head: Array, labels: Any) -> tuple[Array, Sums]:
    """Without a gradient, for evaluation."""

    def add(total: Any, chunk: Any) -> tuple[Any, None]:
        objective, sums, _ = _chunk(options, head, *chunk)
        return jax.tree.map(jnp.add, total, (objective, sums)), None

    return _scan(add, (jnp.zeros(()), no_sums(options[1])), (hidden, labels))[0]


def _summed_forward(
    options: tuple[float, int], hidden: Array, head: Array, labels: Any
) -> tuple[tuple[Array, Sums], Any]:
    def add(carry: Any, chunk: Any) -> tuple[Any, Array]:
        total, head_grad = carry
        states = chunk[0]
        objective, sums, logits_grad = _chunk(options, head, *chunk)
        logits_grad = logits_grad.astype(head.dtype)
        hidden_grad = jnp.einsum("nv,dv->nd", logits_grad, head)
        # Turned here, the small operand: XLA else transposes the logits' gradient, or runs at three quarters speed.
        states = jax.lax.optimization_barrier(states.T)  # [D, n]
        head_grad += jnp.einsum("dn,nv->dv", states, logits_grad, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, total, (objective, sums)), head_grad), hidden_grad

    nothing = (jnp.zeros(()), no_sums(options[1])), jnp.zeros(head.shape, jnp.float32)
    (total, head_grad), hidden_grad = _scan(add, nothing, (hidden, labels))
    return total, (hidden_grad, head_grad.astype(head.dtype))


def _summed_backward(options: tuple[float, int], residuals: Any, cotangents: Any) -> tuple[Array, Array, None]:
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


def no_sums(groups: int = len(KINDS) + 1) -> Sums:
    return {"loss": jnp.zeros(groups), "targets": jnp.zeros(groups)}


def _chunk(
    options: tuple[float, int], head: Array, hidden: Array, labels: tuple[Array, Array, Array]
) -> tuple[Array, Sums, Array]:
    """Of n tokens: the objective, sums by kind [5], and the gradient with respect to the logits [n, V]."""
    z_loss, groups = options
    targets, mask, kinds = labels
    logits = jnp.einsum("nd,dv->nv", hidden, head, preferred_element_type=jnp.float32)
    peak = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - peak)
    total = exps.sum(-1, keepdims=True)
    log_normalizer = (jnp.log(total) + peak)[:, 0]
    loss = log_normalizer - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    counted = mask.astype(jnp.float32)
    objective = (counted * (loss + z_loss * log_normalizer**2)).sum()
    slope = (counted * (1.0 + 2.0 * z_loss * log_normalizer))[:, None] / total
    # comparing with an iota instead of scattering: the vocabulary may be split over devices
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    logits_grad = exps * slope - jnp.where(is_target, counted[:, None], 0.0)
    return objective, _by_kind(loss * counted, counted, kinds, groups), logits_grad


def _by_kind(loss: Array, counted: Array, kinds: Array, groups: int) -> Sums:
    of_kind = kinds[:, None] == jnp.arange(groups)  # [n, 5]
    return {
        "loss": jnp.where(of_kind, loss[:, None], 0.0).sum(0),
        "targets": jnp.where(of_kind, counted[:, None], 0.0).sum(0),
    }


def chunk_size(tokens: int, limit: int) -> int:
    """The largest divisor of `tokens` that is at most `limit`."""
    return next(size for size in range(max(1, min(tokens, limit)), 0, -1) if tokens % size == 0)
