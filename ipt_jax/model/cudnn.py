"""`cudnn`: JAX's public fused attention for NVIDIA GPUs, through cuDNN.

Takes 16-bit floats only, forward and backward fused, nothing of the size of T x T a head. Documents are kept apart by a
mask [B, 1, T, T], which cuDNN reads as a bias: T squared 16-bit numbers a row, once for all heads and layers, is the
price of a public interface (the packed layouts are private to JAX). Its numbers cannot be checked without a GPU: what
is checked here is the compiled program.

Limits that `choose_attention` keeps to (jax 0.10.2): head_dim a multiple of 8, at most 256 on Hopper and 128 elsewhere;
with a mask an even row length, and on Hopper a multiple of 128 (`cudnn_gives_nan`). The mask is passed as bool. JAX
turns it into a bias in the dtype of the queries, and no gradient flows through it. A float32 bias gives NaN gradients
(jax issue 32242), and the gradient of a bias is wrong for a batch above 1 (jax issue 30593).
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
