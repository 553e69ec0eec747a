"""What has to happen before the first computation: joining the other processes, and the compilation cache.

Guarantees that a process started by SLURM, on a TPU slice or with IPT_COORDINATOR joins its group, that a lone process
starts nothing, and that compiled programs are kept across runs: large steps take minutes to compile and every restart
would pay again. The order matters: `initialize_distributed`, then `enable_compile_cache`, then anything else of JAX.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ipt_jax.core.errors import UserError
from ipt_jax.parallel.devices import on_tpu_machine, visible_devices

JOIN_SECONDS = 50  # in which all processes have to start
PROBE_SECONDS = 5  # in which a network disk shows a file
PEER_SECONDS = 45  # after which JAX ends all processes when one no longer answers; `watch_peers` is sooner
ADDRESSES = ("IPT_COORDINATOR", "IPT_PROCESS_ID", "IPT_NUM_PROCESSES")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU = ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS")
OF_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "JAX_COORDINATOR_BIND_ADDRESS")  # they override the rest
SCONTROL_SECONDS = 10
PORT_SECONDS = 5  # in which the system frees a port of a process that was killed


def initialize_distributed() -> str:
    """Joins the group of processes that the environment describes; says in words what it found."""
    if jax.distributed.is_initialized():
        return "already initialized"
    if any(name in os.environ for name in ADDRESSES):
        return _join_addresses()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set by srun; a shell inside an allocation is not a step
        return _join_slurm()
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        if not on_tpu_machine():
            raise UserError(f"{_found(TPU)}, but this machine has no TPU; {_unset(TPU)}")
        _join("TPU slice", TPU)
        return f"TPU slice, {_place()}"
    return "one process"


def _join_slurm() -> str:
    if missing := [name for name in SLURM if name not in os.environ]:
        raise UserError(f"{_found(SLURM)}, but {', '.join(missing)} is not set; {_unset(SLURM)}, or start it with srun")
    if over := _step_is_over(f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"):
        raise UserError(f"{_found(SLURM)}, but {over}: left over from another job; {_unset(SLURM)}")
    if os.environ["SLURM_PROCID"] == "0" and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        port = os.environ.get("JAX_COORDINATOR_PORT") or 61440 + int(os.environ["SLURM_JOB_ID"]) % 4096  # as JAX does
        _check_port(f"job {os.environ['SLURM_JOB_ID']}", str(port), "JAX_COORDINATOR_PORT")
    _join("SLURM", SLURM)
    return f"SLURM, {_place()}"


def _step_is_over(step: str) -> str | None:
    """Why SLURM no longer runs `step`; None where it does, or where nothing here can say."""
    if shutil.which("scontrol") is None:
        return None
    try:
        asked = subprocess.run(
            ["scontrol", "show", "step", step], capture_output=True, text=True, check=False, timeout=SCONTROL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    said = f"{asked.stdout} {asked.stderr}"
    return f"SLURM has no step {step}" if "Invalid job" in said or "not found" in said else None


def _found(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in names[:1] if name in os.environ) + " is set"


def _unset(names: tuple[str, ...]) -> str:
    """What to do about variables of another job."""
    present = [name for name in (*names, *OF_JAX) if name in os.environ]
    return f"to train in one process, run: unset {' '.join(present)}"


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
    if process == "0":
        _check_port(f"IPT_COORDINATOR={address}", address.rpartition(":")[2], "IPT_COORDINATOR")
    _join(address, ADDRESSES, coordinator_address=address, num_processes=int(processes), process_id=int(process))
    return f"{address}, process {process} of {processes}"


def _check_port(group: str, port: str, variable: str) -> None:
    """Raises UserError where the first process cannot listen: JAX would crash."""
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
                return
            except (OSError, OverflowError, ValueError) as error:
                if isinstance(error, OSError) and error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                raise UserError(
                    f"{group}: cannot listen on port {port} ({error}); end the process that uses it, or set another "
                    f"in {variable} on all hosts"
                ) from error


def _join(group: str, names: tuple[str, ...], **where: Any) -> None:
    """`jax.distributed.initialize`. Where JAX would abort or crash at exit, prints one line and exits with code 1: a
    host that is late may come at the next try."""
    seconds = int(os.environ.get("IPT_JOIN_SECONDS", JOIN_SECONDS))

    def give_up(reason: str) -> None:
        advice = "start all processes at about the same time, and check the address, the port and the firewall"
        os.write(2, f"error: {group}: {reason}; {advice}; if {names[0]} is left over, {_unset(names)}\n".encode())
        os._exit(1)

    late = f"other processes did not join within {seconds} s (IPT_JOIN_SECONDS){_unresolved(where)}"
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


def _unresolved(where: dict[str, Any]) -> str:
    host = where.get("coordinator_address", "localhost:0").rpartition(":")[0]
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except OSError as error:
        return f", and the address {host} does not resolve ({error.strerror})"
    return ""


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
