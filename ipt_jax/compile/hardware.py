"""What devices can do at most, and the step that a compiled program is predicted to take on them.

Peaks are those of data sheets. Nothing here has been met: a prediction is a lower bound on seconds, and each key of it
begins with `predicted_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipt_jax.compile.roofline import kernels, predict
from ipt_jax.model.flops import PEAK_FLOPS

# Shares of the data sheet's peaks that kernels are taken to reach. 1.0: not measured, so that a prediction is a bound.
PRODUCT_EFFICIENCY = 1.0
MEMORY_EFFICIENCY = 1.0

INFINIBAND = 50e9  # assumed: 400 Gb/s of InfiniBand a GPU between nodes


@dataclass(frozen=True)
class Hardware:
    """Bytes a second of one device."""

    memory: float  # read + written
    link: float  # sent to neighbours: NVLink, one direction; ICI along one axis of the torus, both ways round
    network: float  # sent to other nodes; 0 where all devices share one network


# By the names that JAX gives devices. NVIDIA: data sheets of A100 80GB SXM and H100 SXM; NVLink 600 and 900 GB/s count
# both directions. Google: "System architecture" pages of Cloud TPU; ICI of 1,600, 4,800 and 3,584 Gb/s a chip over
# 4, 6 and 4 links. A collective runs along one axis at a time, and an axis has two links.
HARDWARE = {
    "NVIDIA A100-SXM4-80GB": Hardware(2039e9, 300e9, INFINIBAND),
    "NVIDIA H100 80GB HBM3": Hardware(3352e9, 450e9, INFINIBAND),
    "TPU v5 lite": Hardware(819e9, 100e9, 0.0),
    "TPU v5": Hardware(2765e9, 200e9, 0.0),  # v5p
    "TPU v6 lite": Hardware(1640e9, 224e9, 0.0),
}


def predict_step(
    text: str, device_kind: str, devices: int, tokens: int, model_flops_per_token: float
) -> dict[str, Any]:
    """The predicted step of a program (HLO text) that trains on `tokens` tokens over `devices` devices of one kind.

    Seconds are at least, tokens/s and the MFU at most what a run reaches.
    """
    peak, hardware = PEAK_FLOPS[device_kind], HARDWARE[device_kind]
    found = predict(
        kernels(text),
        peak * PRODUCT_EFFICIENCY,
        hardware.memory * MEMORY_EFFICIENCY,
        hardware.link,
        hardware.network,
    )
    seconds = found["seconds"]
    return {
        "predicted_step_seconds": seconds,
        "predicted_tokens_per_second": tokens / seconds,
        "predicted_tokens_per_second_per_device": tokens / seconds / devices,
        "predicted_mfu_bound": tokens * model_flops_per_token / (seconds * devices * peak),
        "predicted_limit": found["limit"],
        "predicted_products_seconds": found["products_seconds"],
        "predicted_memory_seconds": found["memory_seconds"],
        "predicted_collective_seconds": found["collective_seconds"],
        "predicted_exposed_collective_seconds": found["exposed_collective_seconds"],
        "predicted_parts": found["parts"],
        "predicted_from": {
            "flops_per_second": peak * PRODUCT_EFFICIENCY,
            "memory_bytes_per_second": hardware.memory * MEMORY_EFFICIENCY,
            "link_bytes_per_second": hardware.link,
            "network_bytes_per_second": hardware.network,
        },
    }
