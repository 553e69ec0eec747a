"""Descriptions of devices that are not attached, to compile for them: GPUs in nodes of eight, TPU slices by shape.

Call `prepare_environment` before the first import of JAX. It removes the variables of JAX, XLA and the devices from the
process, so that the result does not depend on them. The GPU figures are those of XLA's own target descriptions (bytes,
hertz, counts per core); libtpu has the TPU slices by name.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from ipt_jax.core.errors import UserError

OURS = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "NCCL_", "MEGASCALE_", "TF_")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the plugin would look for a driver
    "CUDA_VISIBLE_DEVICES": "",
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask Google's metadata server what it runs on
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is used, so the lock file of another process does not matter
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
USABLE = 0.9  # of a GPU's memory: the share that launch/pretrain.sh sets for JAX
GPUS_PER_NODE = 8
GPUS: dict[str, dict[str, Any]] = {
    "h100": dict(
        name="NVIDIA H100 80GB HBM3", capability=9, cores=132, lanes=128, core_memory=233472, block_memory=232448,
        bandwidth=3_352_320_000_000, l2=52_428_800, clock=1.98, memory=84_929_347_584,
    ),
    "a100": dict(
        name="NVIDIA A100-SXM4-80GB", capability=8, cores=108, lanes=64, core_memory=167936, block_memory=166912,
        bandwidth=2_039_000_000_000, l2=41_943_040, clock=1.41, memory=84_929_347_584,
    ),
}  # fmt: skip
# Slices by name: dims of the shape, and bytes of HBM that libtpu lets a program use.
TPUS = {"v5e": (2, 15.75), "v5p": (3, 95.0), "v6e": (2, 31.25)}


@dataclass(frozen=True)
class Topology:
    """The devices that `--topology` names."""

    name: str
    platform: str  # gpu | tpu
    devices: int
    memory: int  # bytes per device
    usable: int  # bytes of them that a program may use


def parse_topology(text: str) -> Topology:
    """Parses `h100:64`, `v5e:4x4`, … Raises UserError for unknown devices and impossible numbers."""
    kind, _, shape = text.partition(":")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", shape):
        count = int(shape)
        if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
            raise UserError(
                f"--topology {text}: more than {GPUS_PER_NODE} GPUs must be a multiple of {GPUS_PER_NODE}, the GPUs of "
                f"a node; use {kind}:{count // GPUS_PER_NODE * GPUS_PER_NODE}"
            )
        memory = GPUS[kind]["memory"]
        return Topology(text, "gpu", count, memory, int(memory * USABLE))
    if kind in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        sides = [int(side) for side in shape.split("x")]
        dims, usable = TPUS[kind]
        if len(sides) != dims:
            raise UserError(f"--topology {text}: a {kind} slice has {dims} sides, as in {kind}:{'x'.join('4' * dims)}")
        return Topology(text, "tpu", math.prod(sides), int(usable * 2**30), int(usable * 2**30))
    raise UserError(f"--topology {text!r} is unknown; use h100:N, a100:N, v5e:AxB, v6e:AxB or v5p:AxBxC")


def prepare_environment(topology: Topology, dumps: str) -> None:
    """Sets the environment variables to compile for `topology`. The compiler writes its programs to `dumps` as text.

    Raises UserError where the compiler is not installed.
    """
    extra, package = {"gpu": ("compile-gpu", "jax_cuda12_plugin"), "tpu": ("compile-tpu", "libtpu")}[topology.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--topology {topology.name}: its compiler is not installed; install it into a separate "
            f"environment with IPT_VENV=.venv-compile launch/setup.sh {extra}"
        )
    assert "jax" not in sys.modules, "variables are read when JAX is imported"
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT, XLA_FLAGS=f"--xla_dump_to={dumps} --xla_dump_hlo_as_text")


def describe_devices(topology: Topology) -> list[Any]:
    """JAX devices to compile for. None is attached."""
    from jax.experimental import topologies

    if topology.platform == "gpu":
        kind, _, count = topology.name.partition(":")
        nodes = max(1, int(count) // GPUS_PER_NODE)
        shape = f"1x{nodes}x{int(count) // nodes}"
        return list(
            topologies.get_topology_desc(platform="cuda", target_config=_target(**GPUS[kind]), topology=shape).devices
        )
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:  # libtpu's own error type, for shapes that do not exist
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology.name}: unknown to libtpu ({reason}); use another shape") from error


def _target(**gpu: Any) -> str:
    """XLA's GPU target configuration, protobuf text."""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
      shared_memory_per_core: {gpu["core_memory"]} shared_memory_per_block_optin: {gpu["block_memory"]}
      core_count: {gpu["cores"]} fpus_per_core: {gpu["lanes"]} clock_rate_ghz: {gpu["clock"]}
      memory_bandwidth: {gpu["bandwidth"]} l2_cache_size: {gpu["l2"]} device_memory_size: {gpu["memory"]}
      cuda_compute_capability {{ major: {gpu["capability"]} }}
    }}
    platform_name: "CUDA" device_description_str: "{gpu["name"]}"
    dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
    """
