"""Grouped-query attention: causal, windowed, kept inside documents; which kernel runs is chosen with a reason.

Guarantees: a query at row position t sees the keys s with t - W < s <= t (a window of W sees W keys, itself
included) and, where segment ids are given, only keys of its own segment, exactly: what is masked weighs 0.0. Softmax
is float32. `xla` runs everywhere and holds at most a block of queries against its keys at a time, recomputed in the
backward pass, so nothing grows with the square of the row. `cudnn` is JAX's public fused kernel for NVIDIA GPUs; it
serves rows without segment ids.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from ipt_jax.model.config import ModelConfig

BLOCK = 512  # queries held against their keys at a time; rows up to this length are one dense block
MASKED = -1e30  # finite, so that a row without any visible key (padding in generation) is no NaN


def choose_attention(
    device_kind: str, config: ModelConfig, seq_len: int, cross_document: str = "allow"
) -> tuple[str, str]:
    """The kernel for this device and these rows, and the reason in words."""
    kind = device_kind.lower()
    if "tpu" in kind:
        return "xla", f"{device_kind}: the fused TPU kernel is not wired in, blockwise XLA attention runs"
    if not any(name in kind for name in ("nvidia", "gpu", "cuda", "h100", "h200", "a100", "b200")):
        return "xla", f"{device_kind}: XLA attention is the only kernel on this device"
    if cross_document == "block":
        return "xla", "cross_document: block needs segment masks, which the fused GPU path here does not take"
    if config.head_dim > 128 or config.head_dim % 8:
        return "xla", f"cuDNN takes head_dim up to 128 in multiples of 8, the model has {config.head_dim}"
    window = f"window {config.sliding_window}" if _window(config, seq_len) else "no window inside a row"
    return "cudnn", f"{device_kind}: fused cuDNN attention, causal, {window}"


def _window(config: ModelConfig, seq_len: int) -> int | None:
    """The sliding window, or None where a row is too short to reach it."""
    return config.sliding_window if config.sliding_window and config.sliding_window < seq_len else None


def attend(
    q: Array, k: Array, v: Array, *, window: int | None, segment_ids: Array | None = None, kernel: str = "xla"
) -> Array:
    """Causal self-attention of q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]."""
    if window is not None and window >= q.shape[1]:
        window = None
    if kernel == "cudnn":
        return _cudnn(q, k, v, window, segment_ids)
    assert kernel == "xla", f"unknown attention kernel {kernel}"
    if q.shape[1] <= BLOCK:
        return dense(q, k, v, row_mask(q.shape[1], window, segment_ids))
    return _blockwise(q, k, v, window, segment_ids)


def row_mask(length: int, window: int | None, segment_ids: Array | None) -> Array:
    """[1 or B, T, S] bool, True where query t sees key s."""
    rows = jnp.arange(length)
    return visible(rows[None, :, None], rows[None, None, :], window) & _same_segment(segment_ids, segment_ids)


def visible(query: Array, key: Array, window: int | None) -> Array:
    """Causality and window between row positions of queries and keys."""
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


def _same_segment(query: Array | None, key: Array | None) -> Array | bool:
    if query is None or key is None:
        return True
    return query[:, :, None] == key[:, None, :]


def dense(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, T, N, H] against k, v [B, S, K, H] under mask [1 or B, T, S]; scores and softmax in float32."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)  # [B, T, K, G, H]
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def _blockwise(q: Array, k: Array, v: Array, window: int | None, segment_ids: Array | None) -> Array:
    """`dense` over one block of queries after another; a window also bounds the keys that a block touches."""
    B, T, N, H = q.shape
    blocks = -(-T // BLOCK)
    padded = ((0, 0), (0, blocks * BLOCK - T), (0, 0), (0, 0))
    q = jnp.pad(q, padded)
    span = T if window is None else min(T, BLOCK + window - 1)  # keys a block of queries can see

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the scan would save every block's weights: T squared
    def one(start: Array) -> Array:
        first_key = jnp.clip(start + BLOCK - span, 0, T - span) if window is not None else jnp.int32(0)
        rows, keys = start + jnp.arange(BLOCK), first_key + jnp.arange(span)
        mask = visible(rows[None, :, None], keys[None, None, :], window)
        if segment_ids is not None:
            own = jnp.take(segment_ids, rows, axis=1, mode="fill", fill_value=-1)  # [B, BLOCK]
            mask = mask & (own[:, :, None] == jnp.take(segment_ids, keys, axis=1)[:, None, :])
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
        return dense(cut(q, start, BLOCK), cut(k, first_key, span), cut(v, first_key, span), mask)

    out = jax.lax.map(one, jnp.arange(blocks) * BLOCK)  # [blocks, B, BLOCK, N, H]
    return jnp.moveaxis(out, 0, 1).reshape(B, blocks * BLOCK, N, H)[:, :T]


def _cudnn(q: Array, k: Array, v: Array, window: int | None, segment_ids: Array | None) -> Array:
    assert segment_ids is None, "choose_attention gives cudnn only to rows without segment ids"
    local = None if window is None else (window - 1, 0)  # keys to the left of the query, itself not counted
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
