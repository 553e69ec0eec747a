"""Two processes of one run that do not match, do not share a disk, do not start or do not end together."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
from token_shards import save_tokenizer
from trainkit import recipe_of, run_python, write_corpus

from ipt_jax.parallel.distributed import ADDRESSES

TRAIN = """
import os, sys, time
os.chdir(sys.argv[1])
seconds = float(sys.argv.pop(2))
del sys.argv[1]
import ipt_jax.train.trainer as loop
from ipt_jax.cli import main
place = loop.place_batch
def slow(*arguments):
    time.sleep(seconds)
    return place(*arguments)
loop.place_batch = slow
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
    folder: Path, *overrides: list[str], seconds: float = 0.0, cwds: tuple[str, ...] = (".", ".")
) -> list[subprocess.Popen[str]]:
    """One `ipt train` for each list of overrides, as the processes of one run of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = []
    for number, (words, cwd) in enumerate(zip(overrides, cwds, strict=False)):
        names = dict(zip(ADDRESSES, (address, str(number), "2"), strict=True))
        (folder / cwd).mkdir(exist_ok=True)
        arguments = (str(folder / cwd), str(seconds), "train", str(folder / "run.yaml"), *words)
        children.append(run_python(TRAIN, *arguments, JAX_NUM_CPU_DEVICES="4", IPT_JOIN_SECONDS="15", **names))
    return children


def ended(children: list[subprocess.Popen[str]], seconds: float = 90) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; all end within `seconds`."""
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


def test_run_dir_that_is_not_shared(folder: Path) -> None:
    for code, error in ended(start(folder, ["run_dir=own"], ["run_dir=own"], cwds=("a", "b"))):
        assert code == 2, error
        assert "process 1 does not see the files of process 0" in error.splitlines()[-1]


@pytest.mark.parametrize("present", [0, 1])
def test_absent_peer(folder: Path, present: int) -> None:
    children = start(folder, ["run_dir=absent"], ["run_dir=absent"])
    children[1 - present].kill()
    ((code, error),) = ended([children[present]], 60)
    assert code == 2
    assert "other processes did not join within 15 s (IPT_JOIN_SECONDS)" in error.splitlines()[-1]


def test_port_that_is_taken(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        names = dict(zip(ADDRESSES, (f"127.0.0.1:{taken.getsockname()[1]}", "0", "2"), strict=True))
        arguments = (str(folder), "0", "train", str(folder / "run.yaml"))
        ((code, error),) = ended([run_python(TRAIN, *arguments, IPT_JOIN_SECONDS="15", **names)])
    assert code == 2 and "cannot listen on this port" in error.splitlines()[-1]


def test_a_peer_that_is_killed_ends_the_run_which_then_resumes(folder: Path) -> None:
    run_dir, straight = folder / "killed", folder / "straight"
    children = start(folder, [f"run_dir={run_dir}"], [f"run_dir={run_dir}"], seconds=0.3)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "3").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children[1].kill()
    killed = time.monotonic()
    (code, error), _ = ended(children)
    assert code != 0 and time.monotonic() - killed < 60
    assert "tasks are unhealthy (stopped sending heartbeats)" in error
    for path in (run_dir, straight):
        assert [code for code, _ in ended(start(folder, [f"run_dir={path}"], [f"run_dir={path}"]))] == [0, 0]
    found = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run_dir, straight)
    ]
    assert found[0] == found[1]
