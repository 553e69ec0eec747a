"""Two processes of one run that do not match, do not share a disk, do not start or do not end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from token_shards import save_tokenizer
from trainkit import recipe_of, run_python, train_processes, write_corpus

from ipt_jax.core.errors import UserError
from ipt_jax.parallel.distributed import ADDRESSES, initialize_distributed

TRAIN = """
import os, sys, time
os.chdir(sys.argv[1])
seconds = float(sys.argv.pop(2))
del sys.argv[1]
import ipt_jax.train.trainer as loop
from ipt_jax.cli import main
place, steps = loop.place_batch, 0
def slow(*arguments):
    global steps
    steps += 1
    time.sleep(seconds)
    if steps == 4 and os.environ.get("FAULT_OF") == os.environ["IPT_PROCESS_ID"]:
        exec(os.environ["FAULT"])
    return place(*arguments)
loop.place_batch = slow
exec(os.environ.get("BEFORE", ""))
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    write_corpus(folder)
    save_tokenizer(folder / "raw" / "tokenizer")
    recipe = recipe_of(folder, mesh={"fsdp": 8})
    (folder / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    return folder


def start(
    folder: Path,
    *overrides: list[str],
    seconds: float = 0.0,
    cwds: tuple[str, ...] = (".", "."),
    of_second: dict[str, str] | None = None,
    **of_both: str,
) -> list[subprocess.Popen[str]]:
    """One `ipt train` for each list of overrides, as the processes of one run of two, with environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = []
    for number, (words, cwd) in enumerate(zip(overrides, cwds, strict=False)):
        names = dict(zip(ADDRESSES, (address, str(number), "2"), strict=True))
        (folder / cwd).mkdir(exist_ok=True)
        arguments = (str(folder / cwd), str(seconds), "train", str(folder / "run.yaml"), *words)
        names |= {"JAX_NUM_CPU_DEVICES": "4", "IPT_JOIN_SECONDS": "60"} | of_both | (of_second or {} if number else {})
        children.append(run_python(TRAIN, *arguments, **names))
    return children


def ended(children: list[subprocess.Popen[str]], seconds: float = 180) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; all end within `seconds`, which allow for busy cores."""
    try:
        found = [(child, child.communicate(timeout=seconds)[1]) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, error) for child, error in found]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rate=0.5", "has optimizer.learning_rate=0.5, process 0"),
        ("data.seed=7", "has data.seed=7, process 0"),
    ],
)
def test_other_recipe(folder: Path, override: str, said: str) -> None:
    for code, error in ended(start(folder, ["run_dir=other"], ["run_dir=other", override])):
        assert code == 2, error
        assert said in error.splitlines()[-1]
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("real = loop.versions(); loop.versions = lambda: real | {'jax': '9.9'}", "has jax='9.9', process 0"),
        ("from ipt_jax.data.plan import Plan; Plan.fingerprint = 'f00'", "has plan fingerprint='f00', process 0"),
    ],
    ids=["version", "plan"],
)
def test_other_version_or_plan(folder: Path, before: str, said: str) -> None:
    for code, error in ended(start(folder, ["run_dir=o"], ["run_dir=o"], of_second={"BEFORE": before})):
        (line,) = said_of_peer(error)
        assert code == 2 and said in line


def test_run_dir_that_is_not_shared(folder: Path) -> None:
    for code, error in ended(start(folder, ["run_dir=own"], ["run_dir=own"], cwds=("a", "b"))):
        assert code == 2, error
        assert "process 1 does not see the files of process 0" in error.splitlines()[-1]


@pytest.mark.parametrize("present", [0, 1])
def test_absent_peer(folder: Path, present: int) -> None:
    children = start(folder, ["run_dir=absent"], ["run_dir=absent"], IPT_JOIN_SECONDS="15")
    children[1 - present].kill()
    ((code, error),) = ended([children[present]])
    assert code == 1
    assert "other processes did not join within 15 s (IPT_JOIN_SECONDS)" in error.splitlines()[-1]
    assert error.splitlines()[-1].endswith(f"unset {' '.join(ADDRESSES)}")


def test_port_that_is_taken_and_the_same_command_again(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        names = dict(zip(ADDRESSES, (f"127.0.0.1:{taken.getsockname()[1]}", "0", "2"), strict=True))
        arguments = (str(folder), "0", "train", str(folder / "run.yaml"), "run_dir=port", "train.stop_at_step=1")
        ((code, error),) = ended([run_python(TRAIN, *arguments, IPT_JOIN_SECONDS="15", **names)])
        assert code == 2 and "cannot listen on port" in error.splitlines()[-1]
    children = [run_python(TRAIN, *arguments, **(names | both)) for both in PLACES]  # the same command, the port free
    assert [code for code, _ in ended(children)] == [0, 0]


PLACES = [{"IPT_PROCESS_ID": str(process), "JAX_NUM_CPU_DEVICES": "4"} for process in (0, 1)]


def said_of_peer(error: str) -> list[str]:
    """The errors that a process prints after its peer has ended. Lines of Gloo, torn where its threads print at once,
    may come before."""
    assert "Traceback" not in error and "*** SIG" not in error, error
    return [line for line in error.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_peer_that_is_killed_ends_the_run_which_then_resumes(folder: Path, straight: Path, killed: int) -> None:
    run_dir = folder / f"killed{killed}"
    children = start(folder, [f"run_dir={run_dir}"], [f"run_dir={run_dir}"], seconds=0.3)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "3").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children[killed].kill()
    ((code, error),) = ended([children[1 - killed]])
    (line,) = said_of_peer(error)
    gone = f"error: process {killed} ({socket.gethostname()}) is gone; rerun the same command on all hosts to resume"
    assert (code, line) == (1, gone)
    assert [code for code, _ in ended(start(folder, [f"run_dir={run_dir}"], [f"run_dir={run_dir}"]))] == [0, 0]
    assert losses(run_dir) == losses(straight)


def test_a_signal_to_one_process_stops_and_saves_both(folder: Path, straight: Path) -> None:
    run_dir = folder / "stopped"
    children = start(folder, [f"run_dir={run_dir}"], [f"run_dir={run_dir}"], seconds=0.3)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "3").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children[1].send_signal(signal.SIGUSR1)
    for code, error in ended(children):
        assert code == 143, error
        assert "Traceback" not in error
    saved = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert 3 < saved < 11 and losses(run_dir)[:-1] == losses(straight)[: len(losses(run_dir)) - 1]


@pytest.mark.parametrize("early", [0, 1])
def test_a_process_that_ends_early_ends_the_others_with_its_reason(folder: Path, early: int) -> None:
    fault = {"FAULT_OF": str(early), "FAULT": "raise RuntimeError('the disk is on fire')"}
    found = ended(start(folder, [f"run_dir=early{early}"], [f"run_dir=early{early}"], **fault))
    assert found[early][0] == 1 and "the disk is on fire" in found[early][1].splitlines()[-1]
    code, error = found[1 - early]
    (line,) = said_of_peer(error)
    assert code == 1 and line.startswith(
        f"error: process {early} ({socket.gethostname()}) ended: RuntimeError: the disk"
    )


def test_steps_that_are_not_finite_name_the_documents_of_all_hosts(folder: Path) -> None:
    """The rate is so high that the loss overflows."""
    words = ["run_dir=bad", "optimizer.learning_rate=1e30", "optimizer.clip_norm=null", "train.max_bad_steps=2"]
    for code, error in ended(start(folder, words, words)):
        assert code == 1 and "see bad/bad_steps.json" in error.splitlines()[-1], error
    found = json.loads((folder / "bad" / "bad_steps.json").read_text())
    assert {(row["step"], row["row"]) for row in found["documents"]} == {
        (step, row) for step in found["steps"] for row in range(16)
    }


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """An undisturbed run of both processes."""
    for code, error in ended(start(folder, ["run_dir=straight"], ["run_dir=straight"])):
        assert code == 0, error
    return folder / "straight"


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


SLURM_STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 is set, but SLURM_JOB_ID, SLURM_STEP_NODELIST, "),
        (
            SLURM_STEP,
            "is set, but SLURM has no step 7.0: left over from another job; to train in one process, run: uns",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "has no TPU; to train in one process, run: unset TPU_WORKER_HOSTNAMES"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "has no TPU; to train in one process, run: unset MEGASCALE_COORDI"),
        ({"IPT_COORDINATOR": "a:1"}, "IPT_PROCESS_ID, IPT_NUM_PROCESSES is not set, but others of IPT_COORDINATOR, "),
    ],
    ids=["slurm_part", "slurm_finished", "tpu", "tpu_slices", "address_part"],
)
def test_variables_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    answer_scontrol(tmp_path, monkeypatch, "echo 'slurm_get_job_steps error: Invalid job id specified'; exit 1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        initialize_distributed()
    assert said in str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # a shell in an allocation, not a step
        SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    ],
    ids=["slurm_shell", "slurm_one_task", "tpu_one_host"],
)
def test_variables_of_one_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert initialize_distributed() == "one process"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (SLURM_STEP, "if SLURM_STEP_NUM_TASKS is left over, to train in one process, run: unset SLURM_STEP_NUM_TASKS"),
        (dict(zip(ADDRESSES, ("gone.invalid:8476", "1", "2"), strict=True)), "the address gone.invalid does not resol"),
    ],
    ids=["slurm", "address"],
)
def test_variables_of_another_job_that_look_right(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    answer_scontrol(tmp_path, monkeypatch, "echo StepId=7.0")
    arguments = (str(folder), "0", "train", str(folder / "run.yaml"))
    ((code, error),) = ended([run_python(TRAIN, *arguments, IPT_JOIN_SECONDS="3", **variables)])
    (line,) = said_of_peer(error)
    assert code == 1 and line.startswith("error: ") and said in line


def answer_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{command}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


UNWRITABLE = """
import os, resource, time, types
import ipt_jax.train.checkpoint as checkpoint
from ipt_jax.cli import main
save, finalize = checkpoint.Checkpoints.save, checkpoint.RecordHandler.finalize
second = os.environ["IPT_PROCESS_ID"] == "1"
def limited(self, state, record, *, last):
    self._wait()
    if second:  # its files of step 3 may have 1,000 bytes
        limit = 1000 if record.step == 3 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(self, state, record, last=last)
def full(self, directory):
    if "6.saving" in str(directory):  # the first process fails after both have written
        raise OSError(28, "No space left on device")
    finalize(self, directory)
checkpoint.Checkpoints.save, checkpoint.RecordHandler.finalize = limited, full
if second:  # a clock that stands still
    checkpoint.time = types.SimpleNamespace(monotonic=lambda: 0.0, time=time.time)
main()
"""


def test_a_write_that_fails_on_one_host_fails_the_save_on_all(folder: Path) -> None:
    """Each of two saves fails on one process; none waits out Orbax's 20 minutes. The first one's clock decides."""
    run_dir = folder / "unwritable"
    often = ("train.checkpoint_every=null", "train.checkpoint_minutes=0.000001", "train.log_every=3")
    arguments = ("train", str(folder / "run.yaml"), f"run_dir={run_dir}", "train.keep_checkpoints=9", *often)
    first, second = train_processes(UNWRITABLE, arguments, [4, 4])
    assert "step 3 is not saved (process 1: " in first
    assert "ipt train: step 3 is not saved (" in second
    assert "step 6 is not saved (No space left on device); there is no checkpoint yet; training continues" in first
    assert "step 6" not in second
    assert sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir()) == [9, 11]
