"""Damaged, partial, foreign and unsaved checkpoints: each is named, none is trained on, the one before it is used."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import STEPS, checkpoints, last_step, run, same_bits, wait_for
from token_shards import save_tokenizer
from trainkit import recipe_of, run_python, train_processes, write_corpus

import ipt_jax
from ipt_jax.core.checkpoint_digests import damage, newest_verified
from ipt_jax.core.errors import UserError
from ipt_jax.hf.convert import run_export
from ipt_jax.train import checkpoint, trainer
from ipt_jax.train.metrics import MetricsLog

TRAIN = """
import sys, time
import ipt_jax.train.checkpoint as checkpoint
import ipt_jax.train.trainer as loop
from ipt_jax.cli import main
place, write = loop.place_batch, checkpoint.write_digests
def slow_batch(*arguments):
    time.sleep(0.1)
    return place(*arguments)
def slow_write(*arguments):
    print("writing digests", file=sys.stderr, flush=True)
    time.sleep(3)
    return write(*arguments)
if "--slow" in sys.argv:
    sys.argv.remove("--slow")
    loop.place_batch, checkpoint.write_digests = slow_batch, slow_write
main()
"""


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPT_COMPILE_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with checkpoints 9 and 11. Tests copy it."""
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    save_tokenizer(folder / "raw" / "tokenizer")
    assert run(folder)["step"] == STEPS
    return folder


@pytest.fixture
def finished(straight: Path, tmp_path: Path) -> Path:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def unfinished(straight: Path, tmp_path: Path) -> Path:
    """The corpus alone."""
    shutil.copytree(straight / "raw", tmp_path / "raw")
    return tmp_path


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def biggest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_biggest(folder: Path) -> None:
    flip(biggest(folder), 8 * (biggest(folder).stat().st_size // 2))


def truncate_biggest(folder: Path) -> None:
    os.truncate(biggest(folder), biggest(folder).stat().st_size - 1)


# ---- bytes


@pytest.mark.parametrize("kind", ["flip", "truncation"])
def test_every_flip_and_truncation_is_named(finished: Path, kind: str) -> None:
    """60 each, every file of the checkpoint at least once; the one before it is chosen."""
    step = finished / "run" / "checkpoints" / "11"
    files = sorted(file for file in step.rglob("*") if file.is_file())
    assert {file.name for file in files} >= {"digests.json", "record.json", "model.json", "_METADATA"}
    assert len(files) <= 60 and all(file.stat().st_size for file in files)
    draw = random.Random(5)
    for file in files + draw.choices(files, k=60 - len(files)):
        before = file.read_bytes()
        if kind == "flip":
            flip(file, draw.randrange(8 * len(before)))
        else:
            os.truncate(file, draw.randrange(len(before)))
        found = newest_verified(step.parent)
        assert found.path == step.parent / "9"
        assert [skipped.path for skipped in found.skipped] == [step]
        assert found.skipped[0].damage.startswith(str(file.relative_to(step))), found
        file.write_bytes(before)
    assert damage(step) is None


def test_a_big_file_is_hashed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipt_jax.core import checkpoint_digests

    monkeypatch.setattr(checkpoint_digests, "CHUNK", 1000)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "big").write_bytes(bytes(2500))
    (tmp_path / "params" / "empty").touch()
    (tmp_path / "model.json").write_text("{}")
    assert checkpoint_digests.write_digests(tmp_path) == 2502
    listed = json.loads((tmp_path / "digests.json").read_text())["files"]
    assert {name: len(file["sha256"]) for name, file in listed.items()} == {
        "model.json": 1, "params/big": 3, "params/empty": 1,
    }  # fmt: skip
    assert damage(tmp_path, ("params",)) is None
    flip(tmp_path / "params" / "big", 8 * 2100)
    assert damage(tmp_path, ("params",)) == (
        "params/big is damaged from byte 2,000 on (its bytes do not match digests.json)"
    )


# ---- resuming


def remove_item(name: str) -> Callable[[Path], None]:
    return lambda saved: shutil.rmtree(saved / "11" / name)


def add_empty(saved: Path) -> None:
    (saved / "99999").mkdir()


def add_foreign(saved: Path) -> None:
    (saved / "99999").mkdir()
    (saved / "99999" / "notes.txt").write_text("mine")


def add_copy(saved: Path) -> None:
    shutil.copytree(saved / "9", saved / "99999")


def add_file(saved: Path) -> None:
    (saved / "11" / "params" / "notes.txt").write_text("mine")


DAMAGES = {
    "flip in params": (lambda saved: flip_biggest(saved / "11" / "params"), r"params/\S+ is damaged \(its bytes do"),
    "truncated optimizer": (lambda saved: truncate_biggest(saved / "11" / "optimizer"), r"optimizer/\S+ has [\d,]+ by"),
    "no optimizer": (remove_item("optimizer"), "optimizer/ is missing"),
    "no record": (remove_item("record"), "record/ is missing"),
    "no digests": (lambda saved: (saved / "11" / "digests.json").unlink(), "digests.json is missing"),
    "extra file": (add_file, "params/notes.txt is not listed in digests.json"),
}  # fmt: skip
ADDED = {
    "empty": (add_empty, "is an empty directory"),
    "foreign": (add_foreign, "params/ is missing, so is digests.json"),
    "copy": (add_copy, "record/record.json is that of step 9"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint(
    straight: Path, finished: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hurt, said = DAMAGES[name]
    saved = finished / "run" / "checkpoints"
    hurt(saved)
    assert run(finished)["step"] == STEPS
    error = capfd.readouterr().err
    assert re.search(rf"ipt train: checkpoint 11 is skipped: {said}.*; moved to \S+/11.damaged\n", error), error
    assert "resumes from step 9, which verifies; the steps after it are trained again" in error
    assert "ipt train: saved at step 11: " in error
    assert checkpoints(finished / "run") == [9, 11] and (saved / "11.damaged").is_dir()
    same_bits(finished / "run", straight / "run")


@pytest.mark.parametrize("name", ADDED)
def test_a_directory_that_is_no_checkpoint(finished: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    add, said = ADDED[name]
    saved = finished / "run" / "checkpoints"
    add(saved)
    (saved / "99999.damaged").mkdir()
    assert run(finished)["step"] == STEPS
    assert f"checkpoint 99999 is skipped: {said}; moved to {saved}/99999.damaged-2\n" in capfd.readouterr().err
    assert checkpoints(finished / "run") == [9, 11]


def test_no_checkpoint_that_verifies(finished: Path) -> None:
    """Exit 2, one line, and everything stays where it is."""
    saved = finished / "run" / "checkpoints"
    for step in ("9", "11"):
        flip_biggest(saved / step / "optimizer")
    (finished / "run.yaml").write_text(
        recipe_of(finished, mesh={"fsdp": 8}).model_dump_json(by_alias=True, exclude_unset=True)
    )
    process = run_python(TRAIN, "train", str(finished / "run.yaml"), JAX_NUM_CPU_DEVICES="8")
    _, error = process.communicate(timeout=120)
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in error, error
    assert "none of 2 checkpoints can be used; the newest, 11: optimizer/" in lines[0]
    assert "copy a checkpoint from a backup, or move this directory away" in lines[0]
    assert checkpoints(finished / "run") == [9, 11]


def test_a_checkpoint_of_an_earlier_version(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in ("9", "11"):
        record = finished / "run" / "checkpoints" / step / "record" / "record.json"
        (record.parent.parent / "digests.json").unlink()
        fields = json.loads(record.read_text())
        assert fields.pop("digests") is True
        record.write_text(json.dumps(fields))
    assert run(finished)["step"] == STEPS
    assert "warning: checkpoint 11 has no digests.json (an earlier version wrote it): not ver" in capfd.readouterr().err
    ipt_jax.load(finished / "run")
    assert "/11 has no digests.json" in capfd.readouterr().err


def test_leftovers_of_killed_saves_are_removed(straight: Path, finished: Path) -> None:
    saved = finished / "run" / "checkpoints"
    shutil.move(saved / "11", saved / "11.saving")  # killed before the digests were complete
    (saved / "11.saving" / "digests.json").unlink()
    for name in ("12.saving.orbax-checkpoint-tmp", "6.removing"):
        (saved / name / "params").mkdir(parents=True)
    assert run(finished)["step"] == STEPS
    assert sorted(entry.name for entry in saved.iterdir()) == ["11", "9"]
    same_bits(finished / "run", straight / "run")


# ---- loading


def test_export_and_load_use_the_newest_that_verifies(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = finished / "run" / "checkpoints"
    flip_biggest(saved / "11" / "params")
    ours, theirs = (ipt_jax.load(path).logits(list(range(5, 25))) for path in (finished / "run", saved / "9"))
    assert (ours == theirs).all()
    said = capfd.readouterr().err
    assert f"warning: checkpoint {saved}/11 is skipped: params/" in said
    assert "warning: step 9 is used, whose digests match" in said
    run_export(finished / "run", finished / "hf")
    assert (finished / "hf" / "model.safetensors").is_file()
    for use in (ipt_jax.load, lambda path: run_export(path, finished / "other")):
        with pytest.raises(UserError, match=r"checkpoints/11: params/\S+ is damaged .*; use another checkpoint"):
            use(saved / "11")
    (saved / "99999").mkdir()
    with pytest.raises(UserError, match="99999: is an empty directory; use another checkpoint"):
        ipt_jax.load(saved / "99999")
    flip_biggest(saved / "9" / "optimizer")
    with pytest.raises(UserError, match="none of 3 checkpoints can be used"):
        ipt_jax.load(finished / "run")


# ---- saving


def test_a_failed_save_is_said_and_tried_again(
    straight: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Step 6 fails while it is written, step 9 before: the run ends as if nothing had been."""
    write, usage = checkpoint.write_digests, shutil.disk_usage
    sizes = namedtuple("sizes", "total used free")

    def full(directory: Path) -> int:
        if directory.name == "6.saving":
            raise OSError(28, "No space left on device")
        return write(directory)

    def little(path: Path) -> Any:
        return sizes(1, 1, 1000) if last_step(unfinished / "run") == 8 else usage(path)

    monkeypatch.setattr(checkpoint, "write_digests", full)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", little)
    assert run(unfinished)["step"] == STEPS
    said = [line for line in capfd.readouterr().err.splitlines() if "saved" in line]
    assert [line.split(":")[1][:22] for line in said] == [
        " saved at step 3", " step 6 is not saved (", " step 9 is not saved (", " saved at step 11",
    ]  # fmt: skip
    assert "No space left on device); the last checkpoint is step 3; training continues" in said[1]
    assert "(needs 0.5 MB of free space, the disk has 0.0 MB)" in said[2]
    assert checkpoints(unfinished / "run") == [3, 11]
    assert not list((unfinished / "run" / "checkpoints").glob("*.saving*"))
    same_bits(unfinished / "run", straight / "run")


@pytest.mark.parametrize("left", [150_000, 0])
def test_a_disk_that_is_full_for_some_steps(
    straight: Path, unfinished: Path, left: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real one: Orbax fails in its arrays, or in each file. Full from step 5 to 7, past the check of free space."""
    run_dir, started = unfinished / "run", 0
    run_dir.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", run_dir], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    place, sizes = trainer.place_batch, namedtuple("sizes", "total used free")

    def filling(*arguments: Any) -> Any:
        nonlocal started
        started += 1
        time.sleep(0.3)  # the save of step 3 is over
        if started == 5:
            (run_dir / "filler").write_bytes(bytes(os.statvfs(run_dir).f_bavail * 4096 - left))
        if started == 8:
            (run_dir / "filler").unlink()
        return place(*arguments)

    monkeypatch.setattr(trainer, "place_batch", filling)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: sizes(1, 1, 10**12))
    try:
        assert run(unfinished)["step"] == STEPS
        said = [line for line in capfd.readouterr().err.splitlines() if "saved" in line]
        goes_on = "the last checkpoint is step 3; training continues, the next save tries again"
        assert [re.sub(r": [\d.]+ MB.*", "", line) for line in said] == [
            "ipt train: saved at step 3",
            f"ipt train: step 6 is not saved ({checkpoint.FULL}); {goes_on}",
            "ipt train: saved at step 9",
            "ipt train: saved at step 11",
        ]
        assert sorted(entry.name for entry in (run_dir / "checkpoints").iterdir()) == ["11", "9"]
        same_bits(run_dir, straight / "run")
    finally:
        subprocess.run(["umount", run_dir], check=True)


def test_a_failed_last_save_is_an_error(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_digests", full)
    with pytest.raises(
        UserError, match=r"step 11 is not saved \(.*No space left.*\); there is no checkpoint yet; free"
    ):
        run(unfinished)
    assert not list((unfinished / "run" / "checkpoints").iterdir())


def test_a_second_sigterm_waits_for_the_save(unfinished: Path) -> None:
    recipe = recipe_of(unfinished, mesh={"fsdp": 8}, train={"checkpoint_every": 100})
    (unfinished / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    process = run_python(TRAIN, "train", str(unfinished / "run.yaml"), "--slow", JAX_NUM_CPU_DEVICES="8")
    wait_for(process, lambda: last_step(unfinished / "run") >= 2)
    process.send_signal(signal.SIGTERM)
    wait_for(process, lambda: list((unfinished / "run" / "checkpoints").glob("*.saving")))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    order = [
        "writing digests",
        "SIGTERM again: the run ends when its save is on disk",
        ": saved at step",
        "stopped by a signal: s",
    ]
    places = [error.index(line) for line in order]
    assert max(places[:2]) < places[2] < places[3], error
    (step,) = checkpoints(unfinished / "run")
    assert damage(unfinished / "run" / "checkpoints" / str(step)) is None


def test_killed_before_the_digests_are_written(straight: Path, unfinished: Path) -> None:
    """SIGKILL between Orbax's end and ours: the save has no number, and the one before it is resumed from."""
    recipe = recipe_of(unfinished, mesh={"fsdp": 8})
    (unfinished / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    process = run_python(TRAIN, "train", str(unfinished / "run.yaml"), "--slow", JAX_NUM_CPU_DEVICES="8")
    saved = unfinished / "run" / "checkpoints"
    wait_for(process, lambda: (saved / "6.saving").is_dir())
    process.kill()
    process.wait()
    assert checkpoints(unfinished / "run") == [3]
    assert run(unfinished)["step"] == STEPS
    assert sorted(entry.name for entry in saved.iterdir()) == ["11", "9"]
    same_bits(unfinished / "run", straight / "run")


# ---- metrics.jsonl


@pytest.mark.parametrize("tail", [b'{"step": 6, "lo', bytes(300), bytes(300) + b"\n", b'{"step": 6, "loss"' + bytes(9)])
def test_a_torn_last_line_is_removed(tmp_path: Path, tail: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n' + tail)
    log = MetricsLog(tmp_path, 6)
    log.write({"step": 6, "loss": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]
    assert f"{path}: its last line is damaged (a kill or a power cut): {len(tail)} bytes are" in capfd.readouterr().err


def test_a_damaged_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n' + bytes(20) + b'\n{"step": 6, "loss": 1.0}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: is damaged; remove this line")):
        MetricsLog(tmp_path, 6)


def test_metrics_wait_for_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A device that takes a part of a line, then nothing, then all."""
    log = MetricsLog(tmp_path, 0)
    real = log._file

    class Full:
        fileno = real.fileno

        def write(self, data: bytes) -> int | None:
            return real.write(data[:5])

    log.write({"step": 1, "loss": 1.5})
    log._file = Full()  # type: ignore[assignment]
    for step in (2, 3):
        log.write({"step": step, "loss": 1.5})
    assert capfd.readouterr().err.count("cannot be written (No space left on device); its lines are written when") == 1
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.5}\n'
    log._file = real
    log.write({"step": 4, "loss": 1.5})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]


# ---- processes


def run_two(folder: Path) -> list[str]:
    """What two processes with four devices each print when they run the recipe."""
    return train_processes(TRAIN, ("train", str(folder / "run.yaml")), [4, 4])


def test_two_processes_save_once_and_fall_back_together(unfinished: Path) -> None:
    saved = unfinished / "run" / "checkpoints"
    (unfinished / "run.yaml").write_text(
        recipe_of(unfinished, mesh={"fsdp": 8}).model_dump_json(by_alias=True, exclude_unset=True)
    )
    first, second = run_two(unfinished)
    assert first.count("saved at step") == 4 and "saved at step" not in second
    assert checkpoints(unfinished / "run") == [9, 11] and damage(saved / "11") is None
    assert "params/ocdbt.process_1/manifest.ocdbt" in json.loads((saved / "11" / "digests.json").read_text())["files"]
    flip_biggest(saved / "11" / "params" / "ocdbt.process_1")
    first, second = run_two(unfinished)
    assert "checkpoint 11 is skipped: params/ocdbt.process_1/" in first and "resumes from step 9" in first
    assert checkpoints(unfinished / "run") == [9, 11] and damage(saved / "11") is None
