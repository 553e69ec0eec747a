"""`splash`: the block-sparse flash attention for TPUs that comes with JAX (Pallas), forward and backward.

Causality and the window are computed inside the kernel and blocks outside of them are skipped; documents are kept apart
by segment ids. Rows are a multiple of 128 tokens. `interpret=True` runs the same kernel on a CPU, slowly, for tests.
"""

from __future__ import annotations

import math

import jax
from jax import Array

LANES = 128  # rows are cut into blocks that are multiples of a TPU's vector lanes
BLOCK = 512  # queries and keys at a time
TOKENS = 2048  # of rows at a time; a core works off its blocks one by one anyway


def fits_splash(seq_len: int) -> bool:
    return seq_len % LANES == 0


def attend_splash(
    q: Array, k: Array, v: Array, *, window: int | None, segment_ids: Array | None = None, interpret: bool = False
) -> Array:
    """Causal self-attention of q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]; see `attention.attend`."""
    # Pallas takes a second to import: only runs on TPUs pay it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q.shape[1:]
    reach = T if window is None else min(window, T)
    mask = masks.LocalMask((T, T), (reach - 1, 0), 0)  # each query: itself and the reach - 1 keys before it
    block = next(size for size in range(min(BLOCK, T), 0, -LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * N), block_sizes=sizes, interpret=interpret
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * (1 / math.sqrt(H)), k, v))  # [B, N or K, T, H]

    def row(parts: tuple[Array, ...]) -> Array:
        q, k, v, *segments = parts
        return kernel(q.astype(k.dtype), k, v, *(splash.SegmentIds(ids, ids) for ids in segments))

    # Few rows at a time: the backward kernels want log-sums spread over 128 lanes, twice the size of q in float32.
    rows = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
    return jax.lax.map(row, rows, batch_size=max(1, TOKENS // T)).swapaxes(1, 2)
