"""What has to happen before the first computation: joining the other processes, and the compilation cache.

Guarantees that a process started by SLURM, on a TPU slice or with IPT_COORDINATOR joins its group, that a lone process
starts nothing, and that compiled programs are kept across runs: large steps take minutes to compile and every restart
would pay again. The order matters: `initialize_distributed`, then `enable_compile_cache`, then anything else of JAX.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from ipt_jax.core.errors import UserError
from ipt_jax.parallel.devices import visible_devices

ADDRESSES = ("IPT_COORDINATOR", "IPT_PROCESS_ID", "IPT_NUM_PROCESSES")


def initialize_distributed() -> str:
    """Joins the group of processes that the environment describes; says in words what it found."""
    if jax.distributed.is_initialized():
        return "already initialized"
    if any(name in os.environ for name in ADDRESSES):
        return _join_addresses()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set by srun; a shell inside an allocation is not a step
        jax.distributed.initialize()
        return f"SLURM, {_place()}"
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()
        return f"TPU slice, {_place()}"
    return "one process"


def _place() -> str:
    visible_devices()  # the first use of JAX's devices: a lost one is reported in one line here too
    return f"process {jax.process_index()} of {jax.process_count()}"


def _join_addresses() -> str:
    missing = [name for name in ADDRESSES if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not set, but others of {', '.join(ADDRESSES)} are; "
            "set all three (host:port, this process, number of processes) or none"
        )
    address, process, processes = (os.environ[name] for name in ADDRESSES)
    if not (process.isdigit() and processes.isdigit() and int(process) < int(processes)):
        raise UserError(
            f"IPT_PROCESS_ID is {process!r} and IPT_NUM_PROCESSES is {processes!r}; "
            "expected a number of processes and this one's place among them, from 0"
        )
    jax.distributed.initialize(address, int(processes), int(process))
    return f"{address}, process {process} of {processes}"


def enable_compile_cache() -> str:
    """Keeps compiled programs in IPT_COMPILE_CACHE, else in ~/.cache/ipt_jax; returns the directory."""
    cache = os.environ.get("IPT_COMPILE_CACHE") or str(Path.home() / ".cache" / "ipt_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return cache
