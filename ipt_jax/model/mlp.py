"""The gated feed-forward block (SwiGLU), whole or in chunks of tokens.

In chunks, only one chunk's products [n, F] exist at a time, forward and backward: the largest activations of a layer
stop growing with the batch. The backward pass computes a chunk's products again, which a layer that keeps nothing but
its input would do anyway; the weights' gradients are added up over chunks in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

Weights = tuple[Array, Array, Array]  # gate [D, F], up [D, F], down [F, D]


def gated_mlp(h: Array, weights: Weights, chunk: int | None = None) -> Array:
    """h [B, T, D] -> [B, T, D], `chunk` of its B T tokens at a time (all when None)."""
    tokens = h.size // h.shape[-1]
    flat = h.reshape(tokens, -1)
    if chunk is None or chunk == tokens:
        return _gated(flat, weights).reshape(h.shape)
    assert tokens % chunk == 0, f"chunks of {chunk} tokens do not divide {tokens}"
    return _in_chunks(flat.reshape(-1, chunk, h.shape[-1]), weights).reshape(h.shape)


def _gated(h: Array, weights: Weights) -> Array:
    """h [n, D] -> [n, D]; the activation is float32 between the products."""
    w_gate, w_up, w_down = weights
    gate = checkpoint_name(h @ w_gate, "gate")  # [n, F]
    up = checkpoint_name(h @ w_up, "up")
    gated = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return gated.astype(h.dtype) @ w_down


@jax.custom_vjp
def _in_chunks(h: Array, weights: Weights) -> Array:
    """h [C, n, D]"""
    return jax.lax.map(functools.partial(_gated, weights=weights), h)


def _in_chunks_forward(h: Array, weights: Weights) -> tuple[Array, Any]:
    return _in_chunks(h, weights), (h, weights)


def _in_chunks_backward(kept: tuple[Array, Weights], grad: Array) -> tuple[Array, Weights]:
    h, weights = kept

    def one(total: Weights, chunk: tuple[Array, Array]) -> tuple[Weights, Array]:
        part, part_grad = chunk
        _, pull = jax.vjp(_gated, part, weights)
        back, weight_grads = pull(part_grad)
        return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, weight_grads), back

    nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    total, back = jax.lax.scan(one, nothing, (h, grad))
    return back, jax.tree.map(lambda sum_, w: sum_.astype(w.dtype), total, weights)


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)
