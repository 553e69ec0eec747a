"""Restarts: `launch/pretrain.sh` on one host, the SLURM job and the Kubernetes job. Programs are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from extras import ROOT

LAUNCH = ROOT / "launch"
FIELDS = {"model": {"preset": "tiny"}, "data": {"seq_len": 8, "sources": [{"name": "raw", "path": "raw"}]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe, and an environment whose `ipt` takes the next line of `tries`: "STEP CODE" saves and exits."""
    recipe = FIELDS | {"train": {"batch_tokens": 8}, "run_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    program(tmp_path / "venv/bin/python", f'exec {sys.executable} "$@"')
    program(
        tmp_path / "venv/bin/ipt",
        f"cd {tmp_path}; read -r step code <tries; sed -i 1d tries; echo try >>log",
        "mkdir -p run/checkpoints/$step",
        "if [ $code = wait ]; then trap 'exit 143' TERM; echo waits; while :; do read -rt 1 <>fifo; done; fi",
        "exit $code",
    )
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def pretrain(folder: Path, tries: list[str], restarts: str) -> subprocess.Popen[str]:
    (folder / "tries").write_text("".join(f"{one}\n" for one in tries))
    environment = os.environ | {
        "IPT_VENV": str(folder / "venv"), "IPT_RESTARTS": restarts, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = ["bash", str(LAUNCH / "pretrain.sh"), str(folder / "run.yaml"), "--json"]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("tries", "restarts", "code", "used", "said"),
    [
        (["10 137", "20 1", "30 0"], "5", 0, 3, "exit code 1; the newest checkpoint is step 20; restart 2 of 5"),
        (["10 1", "10 2"], "5", 2, 2, "exit code 1; the newest checkpoint is step 10; restart 1 of 5"),
        (["10 1", "10 134", "10 134", "20 0"], "5", 134, 3, "step 10, as at the last try; not restarted"),
        (["10 1", "20 1", "30 1"], "2", 1, 3, "not restarted: IPT_RESTARTS=2 is used up"),
        (["10 1"], "0", 1, 1, "ipt train"),
        ([], "two", 2, 0, "IPT_RESTARTS is 'two'; set it to a number of restarts"),
    ],
)
def test_restarts(folder: Path, tries: list[str], restarts: str, code: int, used: int, said: str) -> None:
    process = pretrain(folder, tries, restarts)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    assert said in error
    log = folder / "log"
    assert (log.read_text().count("try") if log.exists() else 0) == used


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_passed_on_and_ends_the_restarts(folder: Path, name: str) -> None:
    process = pretrain(folder, ["10 wait", "20 0"], "5")
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert (folder / "log").read_text().count("try") == 1


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        (0, {}, False),
        (2, {"IPT_RESTARTS": "3"}, False),
        (143, {}, True),
        (1, {}, False),
        (1, {"IPT_RESTARTS": "3"}, True),
        (137, {"IPT_RESTARTS": "3", "SLURM_RESTART_COUNT": "2"}, True),
        (137, {"IPT_RESTARTS": "3", "SLURM_RESTART_COUNT": "3"}, False),
    ],
)
def test_a_slurm_job_is_requeued(tmp_path: Path, code: int, variables: dict[str, str], requeued: bool) -> None:
    program(tmp_path / "srun", f"exit {code}")
    program(tmp_path / "scontrol", 'echo "$@"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "8"} | variables
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm/pretrain.sbatch"), "run.yaml"], env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "requeue 7\n" if requeued else "")


def test_a_kubernetes_job_ends_at_a_mistake_and_counts_no_stop() -> None:
    _, job = yaml.safe_load_all((LAUNCH / "gke/pretrain.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    rules = {
        (rule["action"], *rule["onExitCodes"]["values"])
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {("FailJob", 2), ("Ignore", 143)}
    assert pod["terminationGracePeriodSeconds"] >= 300
