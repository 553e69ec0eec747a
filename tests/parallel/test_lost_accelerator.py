"""A lost accelerator ends `ipt train` with exit code 2 and one line; a plain CPU machine trains as ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from extras import ROOT
from trainkit import recipe_of

from ipt_jax.config import MeshSettings
from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.parallel import devices
from ipt_jax.parallel.devices import GPU_PATHS, TPU_PATHS, nvidia_smi, training_devices

TRAIN = "from ipt_jax.cli import main; main()"
LOOK = "from ipt_jax.parallel.devices import training_devices; print(training_devices(None))"
PURPOSE = "set JAX_PLATFORMS=cpu to train on the CPU on purpose"
FAILS = 'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9'
DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
LOST = "Unable to determine the device handle for GPU2: 0000:3B:00.0: GPU is lost. Reboot the system."
ONE_GPU = "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'"

without_accelerator = pytest.mark.skipif(
    any(Path(path).exists() for path in GPU_PATHS + TPU_PATHS), reason="the lines are those of a machine without one"
)


def smi(folder: Path, *lines: str) -> Path:
    """A folder for PATH whose nvidia-smi runs `lines`; without lines it is empty."""
    folder.mkdir(exist_ok=True)
    if lines:
        (folder / "nvidia-smi").write_text("\n".join(["#!/bin/bash", *lines, ""]), encoding="utf-8")
        (folder / "nvidia-smi").chmod(0o755)
    return folder


def child(code: str, path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process that sees the programs of `path` alone and no variable of a device."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "CUDA_", "SLURM_"))}
    places = [str(ROOT), *filter(None, [variables.pop("PLUGINS", "")])]
    env = kept | {"PATH": str(path), "PYTHONPATH": os.pathsep.join(places)} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=120
    )


def train(tmp_path: Path, *smi_lines: str, overrides: tuple[str, ...] = (), **variables: str) -> list[str]:
    """Lines on stderr of `ipt train`, which has to end with exit code 2 before it reads any data."""
    recipe = recipe_of(tmp_path, train={"strict": True}).model_dump(mode="json", by_alias=True, exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    path = smi(tmp_path / "bin", *smi_lines)
    done = child(TRAIN, path, "train", str(tmp_path / "recipe.yaml"), *overrides, **variables)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert not (tmp_path / "run").exists()
    return done.stderr.splitlines()


@without_accelerator
@pytest.mark.parametrize("platforms", ["cuda,cpu", "cpu,cuda"])
def test_platforms_that_name_a_gpu_which_is_not_there(tmp_path: Path, platforms: str) -> None:
    (line,) = train(tmp_path, JAX_PLATFORMS=platforms)
    assert line == (
        f"error: JAX_PLATFORMS is {platforms}, but JAX runs on the CPU; found: no GPU and no TPU, no plugin of JAX for "
        f"them; repair the accelerator, or {PURPOSE}"
    )


@without_accelerator
def test_platforms_without_the_cpu(tmp_path: Path) -> None:
    (line,) = train(tmp_path, FAILS, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="0")
    assert line == (
        f"error: JAX does not start: no device of JAX_PLATFORMS=cuda; found: nvidia-smi fails: {DRIVER} (exit code 9), "
        "no plugin of JAX for them, CUDA_VISIBLE_DEVICES is '0'; repair the driver or install the plugin "
        f"(launch/setup.sh cuda or tpu), or {PURPOSE}"
    )


@without_accelerator
def test_a_backend_that_does_not_start(tmp_path: Path) -> None:
    (line,) = train(tmp_path, JAX_PLATFORMS="tpu,cpu")
    assert line.startswith("error: JAX does not start: Unable to initialize backend 'tpu': ")
    assert line.endswith(f"; repair the driver or install the plugin (launch/setup.sh cuda or tpu), or {PURPOSE}")


def test_nvidia_smi_that_fails(tmp_path: Path) -> None:
    (line,) = train(tmp_path, FAILS)
    assert line == (
        f"error: JAX runs on the CPU and nvidia-smi fails: {DRIVER} (exit code 9); repair the GPU or its driver, or "
        f"{PURPOSE}"
    )


def test_a_plugin_whose_gpu_does_not_start(tmp_path: Path) -> None:
    """JAX itself only warns, and trains on the CPU."""
    plugin = tmp_path / "site" / "jax_cuda12_plugin"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    *logged, line = train(tmp_path, ONE_GPU, PLUGINS=str(tmp_path / "site"), CUDA_VISIBLE_DEVICES="")
    assert line == (
        "error: JAX runs on the CPU, but jax_cuda12_plugin is installed and this machine has an accelerator "
        f"(nvidia-smi lists 1 GPU, CUDA_VISIBLE_DEVICES is ''); repair the driver, or {PURPOSE}"
    )
    assert "Traceback" not in "".join(logged)


def test_fewer_devices_than_the_recipe_needs(tmp_path: Path) -> None:
    (line,) = train(tmp_path, overrides=("mesh.devices=8",), JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="4")
    assert line == (
        "error: mesh.devices is 8, but JAX sees 4 x cpu; check each host for lost or hidden devices, or set "
        "mesh.devices to 4"
    )


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_numbers_of_devices_that_no_machine_has(number: float) -> None:
    with pytest.raises(UserError, match="^recipe: devices: "):
        check_settings(MeshSettings, {"devices": number}, where="recipe")
    assert check_settings(MeshSettings, {"devices": 1}, where="recipe").devices == 1


@without_accelerator
@pytest.mark.parametrize(
    ("lines", "variables"),
    [
        ((), {}),  # a plain CPU machine
        ((), {"JAX_PLATFORMS": ""}),
        ((), {"JAX_PLATFORMS": "cpu"}),
        ((FAILS,), {"JAX_PLATFORMS": "cpu"}),  # on purpose, whatever the GPU does
        ((ONE_GPU,), {}),  # a laptop's GPU, and a JAX that was installed for the CPU
    ],
)
def test_the_cpu_where_it_is_meant(tmp_path: Path, lines: tuple[str, ...], variables: dict[str, str]) -> None:
    done = child(LOOK, smi(tmp_path / "bin", *lines), **variables)
    assert (done.returncode, done.stdout) == (0, "[CpuDevice(id=0)]\n"), done.stderr


# ---- the parts


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((), (0, None)),
        (("exit 0",), (0, None)),
        ((ONE_GPU,), (1, None)),
        ((ONE_GPU, "echo '  MIG 1g.10gb Device 0: (UUID: MIG-2)'"), (1, None)),
        (("echo 'No devices found.'",), (0, "No devices found. (exit code 0)")),
        (("exit 6",), (0, "no message (exit code 6)")),
        ((ONE_GPU, f"echo '{LOST}' >&2", "exit 15"), (1, f"{LOST} (exit code 15)")),
        (("exec /bin/sleep 20",), (0, "no answer within 0.5 s")),
    ],
)
def test_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], found: tuple[int, str | None]
) -> None:
    monkeypatch.setenv("PATH", str(smi(tmp_path / "bin", *lines)))
    monkeypatch.setattr(devices, "NVIDIA_SMI_SECONDS", 0.5 if "sleep" in str(lines) else 60)
    assert nvidia_smi() == found


@pytest.mark.parametrize(
    ("plugin", "paths", "sign"),
    [
        ("jax_cuda13_plugin", "GPU_PATHS", "node0"),
        ("jax_cuda12_plugin", "GPU_PATHS", "node0"),
        ("libtpu", "TPU_PATHS", "node0"),
        ("libtpu", "GPU_PATHS", None),
        ("jax_cuda12_plugin", "TPU_PATHS", None),
        (None, "GPU_PATHS", None),
    ],
)
def test_a_plugin_beside_its_device_is_no_machine_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str | None, paths: str, sign: str | None
) -> None:
    (tmp_path / "node0").touch()
    monkeypatch.setenv("PATH", str(smi(tmp_path / "bin")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.jax, "config", SimpleNamespace(jax_platforms=None))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == plugin else None)
    for name in ("GPU_PATHS", "TPU_PATHS"):
        monkeypatch.setattr(devices, name, (str(tmp_path / "node0"),) if name == paths else ())
    if sign is None:
        assert training_devices(None) == devices.jax.devices()
        return
    with pytest.raises(UserError) as refused:
        training_devices(None)
    assert str(refused.value) == (
        f"JAX runs on the CPU, but {plugin} is installed and this machine has an accelerator ({tmp_path}/{sign}); "
        f"repair the driver, or {PURPOSE}"
    )


def gpus(*of_processes: int) -> list[Any]:
    kind = "NVIDIA H200"
    return [
        SimpleNamespace(platform="gpu", device_kind=kind, process_index=process)
        for process, count in enumerate(of_processes)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("of_processes", "wanted", "said"),
    [
        ((8,), 8, None),
        ((7,), None, None),
        ((7,), 8, "7 x NVIDIA H200; check each host for lost or hidden devices, or set mesh.devices to 7"),
        (
            (8, 7),
            16,
            "15 x NVIDIA H200, process 1 has 7; check each host for lost or hidden devices, or set mesh.devices to 15",
        ),
        ((8, 8), 8, "16 x NVIDIA H200; hide the others from JAX, or set mesh.devices to 16"),
    ],
)
def test_devices_are_counted_over_all_processes(
    monkeypatch: pytest.MonkeyPatch, of_processes: tuple[int, ...], wanted: int | None, said: str | None
) -> None:
    found = gpus(*of_processes)
    monkeypatch.setattr(devices.jax, "devices", lambda: found)
    if said is None:
        assert training_devices(wanted) == found
        return
    with pytest.raises(UserError) as refused:
        training_devices(wanted)
    assert str(refused.value) == f"mesh.devices is {wanted}, but JAX sees {said}"
