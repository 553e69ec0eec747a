"""Peaks of devices, and the predicted time of a compiled step on them.

Peaks are those of data sheets. For an H100 the shares of the peaks that kernels reach were measured, and a prediction
is an estimate. For other devices each share is 1.0, and a prediction is a lower bound on seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipt_jax.compile.roofline import kernels, predict
from ipt_jax.model.flops import PEAK_FLOPS

INFINIBAND = 50e9  # assumed: 400 Gb/s of InfiniBand per GPU between nodes


@dataclass(frozen=True)
class Hardware:
    """Bytes per second of one device."""

    memory: float  # read + written
    link: float  # sent to neighbours: NVLink, one direction; ICI along one axis of the torus, both directions
    network: float  # sent to other nodes; 0 where all devices share one network


@dataclass(frozen=True)
class Shares:
    """Shares of the data sheet's peaks that kernels reach."""

    products: float = 1.0
    memory: float = 1.0
    attention_forward: float = 1.0  # of the peak of products, heads of 64
    attention_backward: float = 1.0


# A profile of the 1.3B step, 16 rows of 2,048, one GPU, 2026-11-28 (docs/log.md): 734, 316 and 231 TFLOP/s, 2,872 GB/s.
MEASURED = {"NVIDIA H100 80GB HBM3": Shares(0.742, 0.857, 0.319, 0.234)}
PREDICTION_ERROR = "four steps of one GPU were predicted within 3.3% (docs/reference/compile.md)"

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

    Launches, gaps, the loader and stragglers are not counted.
    """
    peak, hardware, shares = PEAK_FLOPS[device_kind], HARDWARE[device_kind], MEASURED.get(device_kind, Shares())
    found = predict(
        kernels(text),
        peak * shares.products,
        hardware.memory * shares.memory,
        hardware.link,
        hardware.network,
        (peak * shares.attention_forward, peak * shares.attention_backward),
    )
    seconds = found.pop("seconds")
    return {
        "predicted_step_seconds": seconds,
        "predicted_tokens_per_second": tokens / seconds,
        "predicted_tokens_per_second_per_device": tokens / seconds / devices,
        "predicted_mfu": tokens * model_flops_per_token / (seconds * devices * peak),
        **{f"predicted_{name}": value for name, value in found.items()},
        "predicted_from": {
            "measured": device_kind in MEASURED,
            "flops_per_second": peak * shares.products,
            "attention_flops_per_second": [peak * shares.attention_forward, peak * shares.attention_backward],
            "memory_bytes_per_second": hardware.memory * shares.memory,
            "link_bytes_per_second": hardware.link,
            "network_bytes_per_second": hardware.network,
        },
    }
