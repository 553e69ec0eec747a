"""The devices of a training run. A lost accelerator is an error, never a silent run on the CPU.

Guarantees: a run uses the CPU only where JAX_PLATFORMS is `cpu`, or where it is unset and this machine shows no sign of
an accelerator that JAX should have used; a run whose recipe states `mesh.devices` starts only on that many devices.
Does not guarantee: without `mesh.devices`, a lost GPU is not noticed while other GPUs work.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import jax

from ipt_jax.core.errors import UserError

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
TPU_PLUGIN = "libtpu"
GPU_PATHS = ("/dev/nvidia0", "/proc/driver/nvidia")
TPU_PATHS = ("/dev/accel0", "/dev/vfio/0")
NVIDIA_SMI_SECONDS = 60  # a GPU that has fallen off the bus can block nvidia-smi indefinitely
ON_PURPOSE = "set JAX_PLATFORMS=cpu to train on the CPU on purpose"


def training_devices(wanted: int | None) -> list[jax.Device]:
    """All devices of all processes. `wanted` is the recipe's `mesh.devices`.

    Raises UserError where JAX runs on the CPU although an accelerator was asked for or is on this machine, and where
    the number of devices is not `wanted`.
    """
    devices = visible_devices()
    if devices[0].platform == "cpu":
        _refuse_lost_accelerator()
    if wanted is not None and len(devices) != wanted:
        raise UserError(_wrong_number(devices, wanted))
    return devices


def visible_devices() -> list[jax.Device]:
    """`jax.devices()`, with a backend that does not start as a UserError."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that some platform of JAX_PLATFORMS has a device
        reason = str(error).partition("\n")[0] or f"no device of JAX_PLATFORMS={','.join(_platforms())}"
        raise UserError(
            f"JAX does not start: {reason}; found: {_hardware()}; repair the driver or install the plugin "
            f"(launch/setup.sh cuda or tpu), or {ON_PURPOSE}"
        ) from error


def _refuse_lost_accelerator() -> None:
    """Raises UserError unless the CPU is what was asked for, or all that there is."""
    asked = _platforms()
    if asked:
        if set(asked) != {"cpu"}:
            raise UserError(
                f"JAX_PLATFORMS is {','.join(asked)}, but JAX runs on the CPU; found: {_hardware()}; "
                f"repair the accelerator, or {ON_PURPOSE}"
            )
        return
    if failure := nvidia_smi()[1]:
        raise UserError(
            f"JAX runs on the CPU and nvidia-smi fails: {failure}; repair the GPU or its driver, or {ON_PURPOSE}"
        )
    for plugins, sign in ((CUDA_PLUGINS, _gpu_sign()), ((TPU_PLUGIN,), _first(TPU_PATHS))):
        plugin = next(filter(importlib.util.find_spec, plugins), None)
        if plugin and sign:
            raise UserError(
                f"JAX runs on the CPU, but {plugin} is installed and this machine has an accelerator ({sign}"
                f"{_hidden()}); repair the driver, or {ON_PURPOSE}"
            )


def _platforms() -> list[str]:
    """The names in JAX_PLATFORMS; libtpu sets it on a TPU machine where it is left out."""
    names: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _wrong_number(devices: list[jax.Device], wanted: int) -> str:
    number = Counter(device.process_index for device in devices)
    most = max(number.values())
    short = ", ".join(f"process {process} has {count}" for process, count in number.items() if count < most)
    found = f"{len(devices)} x {devices[0].device_kind}" + (f", {short}" if short else "")
    check = "check each host for lost or hidden devices" if len(devices) < wanted else "hide the others from JAX"
    return f"mesh.devices is {wanted}, but JAX sees {found}; {check}, or set mesh.devices to {len(devices)}"


def on_tpu_machine() -> bool:
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))


def nvidia_smi() -> tuple[int, str | None]:
    """(GPUs that `nvidia-smi -L` lists, why it fails or None). (0, None) without the program."""
    if shutil.which("nvidia-smi") is None:
        return 0, None
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", check=False,
            timeout=NVIDIA_SMI_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 0, f"no answer within {NVIDIA_SMI_SECONDS} s"
    except OSError as error:
        return 0, str(error.strerror)
    said = (done.stdout + done.stderr).strip().splitlines()
    gpus = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    if done.returncode or (said and not gpus):
        lines = [line for line in said if not line.startswith("GPU ")] or ["no message"]
        return gpus, f"{lines[0].strip()} (exit code {done.returncode})"
    return gpus, None


def _hardware() -> str:
    """What this machine shows of accelerators, in words."""
    gpus, failure = nvidia_smi()
    signs = [f"nvidia-smi fails: {failure}"] if failure else []
    signs += [_listed(gpus)] if gpus else []
    signs += [path for path in (_first(GPU_PATHS), _first(TPU_PATHS)) if path]
    plugins = [name for name in (*CUDA_PLUGINS, TPU_PLUGIN) if importlib.util.find_spec(name)]
    return f"{', '.join(signs) or 'no GPU and no TPU'}, {', '.join(plugins) or 'no plugin of JAX for them'}{_hidden()}"


def _gpu_sign() -> str | None:
    gpus, _ = nvidia_smi()
    return _listed(gpus) if gpus else _first(GPU_PATHS)


def _listed(gpus: int) -> str:
    return f"nvidia-smi lists {gpus} GPU{'s' if gpus > 1 else ''}"


def _hidden() -> str:
    name = "CUDA_VISIBLE_DEVICES"
    return f", {name} is {os.environ[name]!r}" if name in os.environ else ""


def _first(paths: tuple[str, ...]) -> str | None:
    return next((path for path in paths if Path(path).exists()), None)
