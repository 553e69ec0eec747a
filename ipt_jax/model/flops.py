"""The arithmetic of MFU: model FLOPs of a training step, and peak FLOP/s of devices.

Guarantees that each product with a weight is counted, and for attention the (query, key) pairs that causality, the
window and document borders leave: once forward, twice backward, no recomputation. Equal to the multiplications in the
jaxpr of the gradient when both count the same pairs. Norms, RoPE, softmax and the optimizer are not counted: a device's
peak is that of matrix products. A device that is not in the table has no peak.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipt_jax.model.config import ModelConfig

# Dense bfloat16 operations per second of what JAX calls one device, by the name it gives it; the makers' data sheets.
# Full names: an "H100 PCIe" does three quarters of what an "H100 80GB HBM3" does.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def model_flops(model: ModelConfig, tokens: float, pairs: float) -> float:
    """Operations of one training step over `tokens` tokens whose queries see `pairs` keys in all."""
    D, H, F = model.hidden_size, model.head_dim, model.intermediate_size
    layer = D * H * 2 * (model.q_heads + model.kv_heads) + 3 * D * F
    weights = model.layers * layer + D * model.vocab_size  # the embedding is a lookup, tied or not
    attention = 2 * model.layers * model.q_heads * H  # a pair's score, and its share of the weighted sum
    return 3 * 2 * (weights * tokens + attention * pairs)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Of rows of `seq_len` in which documents see each other; `cross_document: block` leaves less."""
    return model_flops(model, seq_len, visible_pairs([seq_len], model.sliding_window)) / seq_len


def recomputed_flops_per_token(model: ModelConfig, seq_len: int, remat: str | tuple[str, ...]) -> float:
    """What the backward pass computes again, besides the model FLOPs: products whose results were not kept.

    Attention's forward pass is computed again by all but `none`: its backward kernel needs more than its output.
    """
    if remat == "none":
        return 0.0
    D, H, F = model.hidden_size, model.head_dim, model.intermediate_size
    N, K = model.q_heads, model.kv_heads
    products = {
        "query": N * H,
        "key": K * H,
        "value": K * H,
        "output": N * H,
        "gate": F,
        "up": F,
    }
    kept = products if remat == "dots" else () if remat == "full" else remat
    again = D * sum(size for name, size in products.items() if name not in kept)
    attention = 2 * N * H * visible_pairs([seq_len], model.sliding_window) / seq_len
    return 2 * model.layers * (again + attention)


def visible_pairs(lengths: Iterable[int], window: int | None) -> int:
    """(query, key) pairs within documents of these lengths: each query sees itself and what the window holds."""
    pairs = 0
    for length in lengths:
        near = min(window or length, length)
        pairs += near * (near + 1) // 2 + (length - near) * near
    return pairs


def peak_flops(device_kind: str, devices: int) -> float | None:
    """Of `devices` devices together; None where the kind is not in the table."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else peak * devices
