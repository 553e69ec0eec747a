"""`synth run` killed at random moments, at every write, inside a spool record; then finished, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthkit import recipe, settings, shard_bytes

from ipt_jax.core.errors import UserError
from synth import read_groups
from synth.generate.journal import Journal
from synth.generate.run import run_synth

COMMAND = [sys.executable, "-c", "from synth.cli import main; main()", "run"]
FAULTS = {"malformed": 0.2, "truncated": 0.1, "error": 0.05}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


def start(folder: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """The command on a recipe in `folder`, with output on pipes."""
    (folder / "run.yaml").write_text(json.dumps(recipe(folder, **changes)))
    command = [*COMMAND, str(folder / "run.yaml"), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, f"{path} has not come"
        time.sleep(0.005)


def test_killed_at_ten_moments_gives_the_undisturbed_bytes(tmp_path: Path) -> None:
    rng = Random(20)
    changes = {"texts": 150, "groups_per_shard": 7, "synthesizer__faults": {**FAULTS, "latency_seconds": 0.03}}
    undisturbed = settings(tmp_path, **{**changes, "synthesizer__faults": FAULTS}, output=str(tmp_path / "undisturbed"))
    expected = run_synth(undisturbed)
    held, ended_by_itself = [], 0
    for _ in range(10):
        process = start(tmp_path, **changes)
        wait_for(tmp_path / "groups" / "spool", process)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        ended_by_itself += process.returncode == 0
        held.append(len(shard_bytes(tmp_path / "groups")))
    assert ended_by_itself == 0, "the run is too short to be killed ten times"
    assert held == sorted(held) and held[-1] > 0  # each run goes on where the one before was killed
    last = start(tmp_path, **changes)
    result, errors = last.communicate(timeout=60)
    assert last.returncode == 0, errors.decode()
    assert {**json.loads(result), "seconds": 0} == {**expected, "seconds": 0}
    assert shard_bytes(tmp_path / "groups") == shard_bytes(undisturbed.output)
    assert not (tmp_path / "groups" / "spool").exists()


def test_killed_at_every_write_gives_the_undisturbed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps the moment over each call that changes the disk, before and after it."""
    changes: dict[str, Any] = {"texts": 8, "rounds": 2, "groups_per_shard": 2, "synthesizer__faults": FAULTS}
    run_synth(undisturbed := settings(tmp_path, **changes, output=str(tmp_path / "undisturbed")))
    expected, moment, finished = shard_bytes(undisturbed.output), 0, False
    while not finished:
        again = settings(tmp_path, **changes, output=str(tmp_path / f"killed{moment}"))
        with monkeypatch.context() as patch:
            left = kill_at(patch, moment)
            try:
                run_synth(again)
                finished = left[0] >= 0
            except Killed:
                pass
        run_synth(again)
        assert shard_bytes(again.output) == expected, f"killed at moment {moment}"
        moment += 1
    assert moment > 30


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """Raises `Killed` at the moment-th of the moments before and after each change of the disk."""
    left = [moment]

    def countdown() -> None:
        left[0] -= 1
        if left[0] == -1:
            raise Killed

    def watched(call: Any) -> Any:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            countdown()
            result = call(*arguments, **named)
            countdown()
            return result

        return wrapper

    for owner, name in (
        (os, "pwrite"),
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
        (Path, "unlink"),
        (Path, "rmdir"),
    ):
        patch.setattr(owner, name, watched(getattr(owner, name)))
    return left


@pytest.mark.parametrize(("name", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_cleanly(tmp_path: Path, name: signal.Signals, code: int) -> None:
    process = start(tmp_path, synthesizer__faults={"latency_seconds": 0.1})
    wait_for(tmp_path / "groups" / "spool", process)
    process.send_signal(name)
    errors = process.communicate(timeout=30)[1].decode()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    run_synth(settings(tmp_path))
    ids = [text.raw_id for group in read_groups(tmp_path / "groups") for text in group.texts]
    assert ids == [f"t{number}" for number in range(30)]


def test_two_copies_on_one_output(tmp_path: Path) -> None:
    process = start(tmp_path, synthesizer__faults={"latency_seconds": 0.5})
    try:
        wait_for(tmp_path / "groups" / "spool", process)
        with pytest.raises(UserError, match="another run is writing here"):
            run_synth(settings(tmp_path))
    finally:
        process.kill()
        process.communicate()


def test_full_disk_keeps_what_is_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, write = [0], os.pwrite

    def full(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="No space left on device"):
            run_synth(settings(tmp_path))
    assert run_synth(settings(tmp_path))["groups"] == 10


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
@hypothesis_settings(max_examples=60)
def test_torn_spool_keeps_whole_records(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("spool") / "shard" / "00000.spool"
    journal, ends = Journal(path), []
    for place, payload in enumerate(payloads):
        journal.append(place, payload)
        ends.append(path.stat().st_size)
    journal.close()
    cut = data.draw(st.integers(0, ends[-1]))
    junk = data.draw(st.binary(max_size=30))
    path.write_bytes(path.read_bytes()[:cut] + junk)
    whole = sum(end <= cut for end in ends)
    torn = Journal(path)
    assert [torn.read(place) for place in range(whole)] == payloads[:whole]
    assert len(torn) == whole or junk == path.read_bytes()[cut:]  # junk that happens to be the record's own rest
    if whole < len(payloads) and whole == len(torn):
        torn.append(whole, payloads[whole])
        assert torn.read(whole) == payloads[whole]
    torn.close()
