"""What has to happen before the first computation: joining the other processes, and the compilation cache.

Guarantees that a process started by SLURM, on a TPU slice or with IPT_COORDINATOR joins its group, that a lone process
starts nothing, and that compiled programs are kept across runs: large steps take minutes to compile and every restart
would pay again. The order matters: `initialize_distributed`, then `enable_compile_cache`, then anything else of JAX.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ipt_jax.core.errors import UserError
from ipt_jax.parallel.devices import visible_devices

JOIN_SECONDS = 50  # in which all processes have to start
PROBE_SECONDS = 5  # in which a network disk shows a file
PEER_SECONDS = 30  # after which a process that no longer answers ends the others
ADDRESSES = ("IPT_COORDINATOR", "IPT_PROCESS_ID", "IPT_NUM_PROCESSES")


def initialize_distributed() -> str:
    """Joins the group of processes that the environment describes; says in words what it found."""
    if jax.distributed.is_initialized():
        return "already initialized"
    if any(name in os.environ for name in ADDRESSES):
        return _join_addresses()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set by srun; a shell inside an allocation is not a step
        _join("SLURM")
        return f"SLURM, {_place()}"
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        _join("TPU slice")
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
    if process == "0":  # JAX crashes where it cannot listen
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(address.rpartition(":")[2])))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"IPT_COORDINATOR={address}: cannot listen on this port ({error}); set another"
                ) from error
    _join(address, coordinator_address=address, num_processes=int(processes), process_id=int(process))
    return f"{address}, process {process} of {processes}"


def _join(group: str, **where: Any) -> None:
    """`jax.distributed.initialize`. Where JAX would abort or crash at exit, prints one line and exits with code 2."""
    seconds = int(os.environ.get("IPT_JOIN_SECONDS", JOIN_SECONDS))

    def give_up(reason: str) -> None:
        advice = "start all processes at about the same time, and check the address, the port and the firewall"
        os.write(2, f"error: {group}: {reason}; {advice}\n".encode())
        os._exit(2)

    late = f"other processes did not join within {seconds} s (IPT_JOIN_SECONDS)"
    timer = threading.Timer(seconds, give_up, [late])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=2 * seconds + 60, heartbeat_timeout_seconds=PEER_SECONDS,
            shutdown_timeout_seconds=PEER_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        give_up(f"cannot join ({' '.join(str(error).split())[:200]})")
    finally:
        timer.cancel()


def refuse_different_hosts(facts: dict[str, Any]) -> None:
    """Raises UserError on all processes, naming process and field, where `facts` differ from the first process's."""
    if jax.process_count() == 1:
        return
    own = json.dumps({"host": socket.gethostname()} | facts, default=str).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(own))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(own.ljust(longest), np.uint8))
    first, *others = [json.loads(bytes(row)) for row in np.asarray(rows, np.uint8)]
    for process, found in enumerate(others, start=1):
        for name in sorted(facts.keys() | found.keys() - {"host"}):
            if found.get(name) != first.get(name):
                raise UserError(
                    f"process {process} ({found['host']}) has {name}={found.get(name)!r}, process 0 ({first['host']}) "
                    f"has {first.get(name)!r}; start all processes with the same recipe, data and packages"
                )


def refuse_unshared(directory: Path) -> None:
    """Raises UserError on all processes where one does not see what the first process writes to `directory`."""
    if jax.process_count() == 1:
        return
    token = str(int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))))
    probe = directory / ".shared"
    if jax.process_index() == 0:
        probe.write_text(token)
    multihost_utils.sync_global_devices("probe written")
    deadline = time.monotonic() + PROBE_SECONDS
    while not (seen := _reads(probe, token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    everywhere = multihost_utils.process_allgather(np.asarray(seen))
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)
    if not everywhere.all():
        raise UserError(
            f"run_dir {directory}: process {int(everywhere.argmin())} does not see the files of process 0; "
            "set run_dir to a directory on a disk that all hosts share"
        )


def _reads(probe: Path, token: str) -> bool:
    return probe.is_file() and probe.read_text() == token


def enable_compile_cache() -> str:
    """Keeps compiled programs in IPT_COMPILE_CACHE, else in ~/.cache/ipt_jax; returns the directory."""
    cache = os.environ.get("IPT_COMPILE_CACHE") or str(Path.home() / ".cache" / "ipt_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return cache
