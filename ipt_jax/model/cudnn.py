"""`cudnn`: JAX's public fused attention for NVIDIA GPUs, through cuDNN.

Takes 16-bit floats only, forward and backward fused, nothing of the size of T x T a head. Documents are kept apart by a
mask [B, 1, T, T], which cuDNN reads as a bias: T squared 16-bit numbers a row, once for all heads and layers, is the
price of a public interface (the packed layouts are private to JAX). Its numbers cannot be checked without a GPU: what
is checked here is the compiled program.
"""

from __future__ import annotations

import jax
from jax import Array


def attend_cudnn(q: Array, k: Array, v: Array, *, window: int | None, segment_ids: Array | None = None) -> Array:
    """Causal self-attention of q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]; see `attention.attend`."""
    local = (window - 1, 0) if window is not None and window < q.shape[1] else None  # keys left of the query itself
    same = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True, local_window_size=local, implementation="cudnn"
    )  # fmt: skip
