"""Grouped-query attention: causal, windowed, masked by document. Which kernel runs is chosen with a reason.

Guarantees: a query at row position t sees the keys s with t - W < s <= t (a window of W sees W keys, itself
included) and, where segment ids are given, only keys of its own segment, exactly: what is masked weighs 0.0. Softmax
is float32. `xla` runs everywhere and holds at most a block of queries against its keys at a time, recomputed in the
backward pass, so nothing grows with the square of the row. `cudnn` is JAX's public fused kernel for NVIDIA GPUs; it
serves rows without segment ids.

`cudnn`: JAX's public fused attention for NVIDIA GPUs, through cuDNN.

Takes 16-bit floats only, forward and backward fused, nothing of the size of T x T a head. Documents are separated by a
mask [B, 1, T, T], which cuDNN reads as a bias: T squared 16-bit numbers a row, once for all heads and layers, is the
price of a public interface (the packed layouts are private to JAX). Its numbers cannot be checked without a GPU: what
is checked here is the compiled program.

Limits that `choose_attention` keeps to (jax 0.10.2): head_dim a multiple of 8, at most 256 on Hopper and 128 elsewhere;
with a mask an even row length, and on Hopper a multiple of 128 (`cudnn_gives_nan`). The mask is passed as bool. JAX
turns it into a bias in the dtype of the queries, and no gradient flows through it. A float32 bias gives NaN gradients
(jax issue 32242), and the gradient of a bias is wrong for a batch above 1 (jax issue 30593).

`splash`: the block-sparse flash attention for TPUs that comes with JAX (Pallas), forward and backward.

Causality and the window are computed inside the kernel and blocks outside of them are skipped; documents are separated
by segment ids. Rows are a multiple of 128 tokens. `interpret=True` runs the same kernel on a CPU, slowly, for tests.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ipt_jax.model.config import ModelConfig


def attend_cudnn(q: Array, k: Array, v: Array, *, window: int | None, segment_ids: Array | None = None) -> Array:
    """Causal self-attention of q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]; see `attention.attend`."""
    local = (window - 1, 0) if window is not None and window < q.shape[1] else None  # keys left of the query itself
    same = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True, local_window_size=local, implementation="cudnn"
    )  # fmt: skip


LANES = 128  # rows are cut into blocks that are multiples of a TPU's vector lanes
SPLASH_BLOCK = 512  # queries and keys at a time
SPLASH_TOKENS = 2048  # of rows at a time; a core works off its blocks one by one anyway


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
    block = next(size for size in range(min(SPLASH_BLOCK, T), 0, -LANES) if T % size == 0)
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

    # Few rows at a time: the backward kernels need log-sums spread over 128 lanes, twice the size of q in float32.
    rows = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
    return jax.lax.map(row, rows, batch_size=max(1, SPLASH_TOKENS // T)).swapaxes(1, 2)


AttentionKernel = Callable[..., Array]  # (q, k, v, *, window, segment_ids) -> [B, T, N, H], as `attend`

HOPPER = re.compile(r"\b(h20|h100|h200|h800|gh200)\b")  # in device kinds such as "NVIDIA H100 80GB HBM3"
CUDNN_ROWS = 128  # tokens of a row, in multiples of it, for which cuDNN's masked backward pass is right on Hopper
STEP = 64  # queries a step in rows up to BLOCK, unrolled: each step meets only the keys it can reach
BLOCK = 512  # queries a block in longer rows, looped: memory stays that of one block
MASKED = -1e30  # finite, so that a row without any visible key (padding in generation) is not NaN


def choose_attention(
    device_kind: str, config: ModelConfig, seq_len: int, cross_document: str = "allow", compute_dtype: str = "bfloat16"
) -> tuple[str, str]:
    """The kernel for this device and these rows, and the reason in words."""
    kind = device_kind.lower()
    documents = "documents separated" if cross_document == "block" else "documents see each other"
    window = f"window {config.sliding_window}" if _window(config, seq_len) else "no window inside a row"
    rows = f"causal, {window}, {documents}"
    if "tpu" in kind:
        if not fits_splash(seq_len):
            return "xla", f"splash takes rows of a multiple of {LANES} tokens, seq_len is {seq_len}"
        return "splash", f"{device_kind}: Pallas splash attention, {rows}"
    if not any(name in kind for name in ("nvidia", "gpu", "cuda", "h100", "h200", "a100", "b200")):
        return "xla", f"{device_kind}: XLA attention is the only kernel on this device"
    if compute_dtype == "float32":
        return "xla", "cuDNN takes 16-bit floats, compute_dtype is float32"
    largest = 256 if is_hopper(device_kind) else 128
    if config.head_dim > largest or config.head_dim % 8:
        return "xla", (
            f"cuDNN takes head_dim up to {largest} in multiples of 8 on {device_kind}, the model has {config.head_dim}"
        )
    if cross_document == "block" and seq_len % 2 and not is_hopper(device_kind):
        return "xla", f"cuDNN separates documents in rows of an even length, seq_len is {seq_len}"
    return "cudnn", f"{device_kind}: fused cuDNN attention, {rows}"


def is_hopper(device_kind: str) -> bool:
    """Whether `jax.Device.device_kind` names an NVIDIA GPU of compute capability 9.0."""
    return HOPPER.search(device_kind.lower()) is not None


def cudnn_gives_nan(device_kind: str, seq_len: int, cross_document: str) -> bool:
    """Whether the backward pass of `cudnn` is known to give NaN for such rows: on Hopper, with a mask, in rows that
    are not a multiple of 128 tokens (pytorch issue 196678)."""
    return is_hopper(device_kind) and cross_document == "block" and seq_len % CUDNN_ROWS != 0


def _window(config: ModelConfig, seq_len: int) -> int | None:
    """The sliding window, or None where a row is too short to reach it."""
    return config.sliding_window if config.sliding_window and config.sliding_window < seq_len else None


def attend(q: Array, k: Array, v: Array, *, window: int | None, segment_ids: Array | None = None) -> Array:
    """`xla`: causal self-attention of q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]."""
    if window is not None and window >= q.shape[1]:
        window = None
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    rows = _staircase if T <= BLOCK else _blockwise
    out = rows(q, k, v, window, segment_ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def visible(query: Array, key: Array, window: int | None, segments: tuple[Array, Array] | None = None) -> Array:
    """[1 or B, T, S] bool: the query at row position `query` [T] sees the key at `key` [S]."""
    seen = key[None, None, :] <= query[None, :, None]
    if window is not None:
        seen = seen & (query[None, :, None] - key[None, None, :] < window)
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    return seen


def dense(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, K, G, T, H] against k, v [B, K, S, H] under mask [1 or B, T, S]; scores and softmax in float32.

    The weights are divided by their sum after the product with v, not before: [T, H] numbers instead of [T, S].
    """
    B, K, G, T, H = q.shape
    q = (q * (1 / math.sqrt(H))).astype(q.dtype).reshape(B, K, G * T, H)  # one matrix a key head
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    # added, not selected: MASKED swallows any score, and a sum is one pass with the maximum and the exponential
    scores += jnp.tile(jnp.where(mask, 0.0, MASKED), (1, G, 1))[:, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(B, K, G, T, H)


def _staircase(q: Array, k: Array, v: Array, window: int | None, segment_ids: Array | None) -> Array:
    """A short row in steps of queries, each against the keys it can reach: half of the dense arithmetic."""
    T = q.shape[3]
    starts = range(0, T, STEP)
    # split, not sliced: the gradients of slices are padded to the full row and added up
    parts = jax.lax.split(q, [min(STEP, T - start) for start in starts], axis=3)
    steps = []
    for start, part in zip(starts, parts, strict=True):
        end = start + part.shape[3]
        first = 0 if window is None else max(0, start - window + 1)
        own = None if segment_ids is None else (segment_ids[:, start:end], segment_ids[:, first:end])
        mask = visible(jnp.arange(start, end), jnp.arange(first, end), window, own)
        steps.append(dense(part, k[:, :, first:end], v[:, :, first:end], mask))
    return jnp.concatenate(steps, axis=3)


def _blockwise(q: Array, k: Array, v: Array, window: int | None, segment_ids: Array | None) -> Array:
    """A long row, one block of queries after another; a window also bounds the keys that a block touches."""
    B, K, G, T, H = q.shape
    blocks = -(-T // BLOCK)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, blocks * BLOCK - T), (0, 0)))
    span = T if window is None else min(T, BLOCK + window - 1)  # keys that a block of queries can reach

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the scan would save every block's weights: T squared
    def one(start: Array) -> Array:
        first = jnp.clip(start + BLOCK - span, 0, T - span)
        rows, keys = start + jnp.arange(BLOCK), first + jnp.arange(span)
        own = None
        if segment_ids is not None:
            own = (segment_ids.take(rows, axis=1, mode="clip"), segment_ids.take(keys, axis=1, mode="clip"))
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=2)
        mask = visible(rows, keys, window, own)
        block = jax.lax.dynamic_slice_in_dim(q, start, BLOCK, axis=3)
        return dense(block, cut(k, first, span), cut(v, first, span), mask)

    out = jax.lax.map(one, jnp.arange(blocks) * BLOCK)  # [blocks, B, K, G, BLOCK, H]
    return jnp.moveaxis(out, 0, 3).reshape(B, K, G, blocks * BLOCK, H)[:, :, :, :T]
