"""Kills, stops, changed recipes: a run resumes bit-equal from its newest complete checkpoint, or says why it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from token_shards import save_tokenizer
from trainkit import SMALL, recipe_of, run_python, write_corpus

import ipt_jax
from ipt_jax.config import Recipe, rows_per_step
from ipt_jax.core.checkpoint_path import LiteralPath
from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.files import lock_directory
from ipt_jax.data.loader import batches
from ipt_jax.data.plan import build_plan
from ipt_jax.data.token_shards import read_token_documents
from ipt_jax.train import step as train_step
from ipt_jax.train import trainer
from ipt_jax.train.checkpoint import Checkpoints
from ipt_jax.train.metrics import MetricsLog, last_line
from ipt_jax.train.state import TrainState
from ipt_jax.train.step import Program
from ipt_jax.train.trainer import run_train

STEPS = 11
CHILD = """
import sys
from ipt_jax.config import Recipe, rows_per_step
import ipt_jax.train.trainer as loop
import time
whole = loop.place_batch
def slow(*arguments):
    time.sleep(float(sys.argv[2]))
    return whole(*arguments)
loop.place_batch = slow  # time for the parent to strike
print(loop.run_train(Recipe.model_validate_json(sys.argv[1])), flush=True)
"""


COMMAND = """
import sys, time
import ipt_jax.train.trainer as loop
from ipt_jax.cli import main
whole = loop.place_batch
def slow(*arguments):
    time.sleep(0.2)
    return whole(*arguments)
loop.place_batch = slow
main()
"""


def run(folder: Path, **blocks: dict[str, Any]) -> dict[str, Any]:
    return run_train(recipe_of(folder, mesh={"fsdp": 8}, **blocks))


def child(recipe: Recipe, seconds_per_step: float) -> subprocess.Popen[str]:
    text = recipe.model_dump_json(by_alias=True, exclude_unset=True)
    return run_python(CHILD, text, str(seconds_per_step), JAX_NUM_CPU_DEVICES="8")


def parameters(run_dir: Path, step: int = STEPS) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(LiteralPath(run_dir.absolute() / "checkpoints" / str(step) / "params"))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what depends on the clock."""
    clocks = ("tokens_per_second", "step_seconds", "data_seconds", "train_seconds", "goodput", "unix_seconds")
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clocks} for line in found]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(step.name) for step in (run_dir / "checkpoints").glob("*") if step.name.isdigit())


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for this module and its children: a second run reads what the first compiled, as a reader's resume does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPT_COMPILE_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that nothing disturbed. Tests copy it."""
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    save_tokenizer(folder / "raw" / "tokenizer")
    result = run(folder)
    assert (result["run_dir"], result["step"]) == (str(folder / "run"), STEPS)
    yield folder


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:
    """The corpus of `straight`, and no run yet."""
    shutil.copytree(straight / "raw", tmp_path / "raw")
    return tmp_path


@pytest.fixture
def finished(straight: Path, tmp_path: Path) -> Path:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    return tmp_path


def same_bits(one: Path, other: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, parameters(one), parameters(other))
    assert lines(one) == lines(other)


def test_a_run_leaves_what_others_read(straight: Path) -> None:
    run_dir = straight / "run"
    described = json.loads((run_dir / "run.json").read_text())
    assert described["plan"]["fingerprint"] == described["plan_fingerprint"]
    for key in ("recipe", "versions", "git_commit", "attention", "attention_reason", "mesh", "remat", "parameters"):
        assert key in described, key
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 4, 6, 8, 10, 11]
    first, last = lines(run_dir)[0], lines(run_dir)[-1]
    assert last["tokens"] == described["plan"]["tokens"] and last["loss"] < first["loss"]
    assert first["loss_by_kind"] == {"raw": first["loss"]} and first["mfu"] is None
    assert checkpoints(run_dir) == [9, 11], "the last two are kept"
    model = json.loads((run_dir / "checkpoints" / "11" / "model.json").read_text())
    assert model["hidden_size"] == SMALL["hidden_size"]
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert list((run_dir / "tensorboard").glob("events*"))


def test_killed_and_resumed_is_bit_equal(straight: Path, folder: Path) -> None:
    """SIGKILL in a step after the first checkpoint, perhaps within the save of the second."""
    process = child(recipe_of(folder, mesh={"fsdp": 8}), 0.2)
    wait_for(process, lambda: last_step(folder / "run") >= 6)
    process.kill()
    process.wait()
    assert checkpoints(folder / "run")[-1] < STEPS
    assert run(folder)["step"] == STEPS
    same_bits(folder / "run", straight / "run")


def test_sigterm_saves_and_ends_as_unfinished(straight: Path, folder: Path) -> None:
    """143: Kubernetes starts a pod again that ends with any code but 0. Finished, the same command ends with 0."""
    recipe = recipe_of(folder, mesh={"fsdp": 8}, train={"checkpoint_every": 100})
    (folder / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    arguments = ("train", str(folder / "run.yaml"), "--json")
    process = run_python(COMMAND, *arguments, JAX_NUM_CPU_DEVICES="8")
    wait_for(process, lambda: last_step(folder / "run") >= 2)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    stopped = checkpoints(folder / "run")[-1]
    result = json.loads(output)
    assert 2 < stopped < STEPS and (result["step"], result["steps"]) == (stopped, STEPS)
    assert f"stopped by a signal: saved at step {stopped} of {STEPS}" in error
    again = run_python(COMMAND, *arguments, JAX_NUM_CPU_DEVICES="8")
    output, error = again.communicate(timeout=120)
    assert (again.returncode, json.loads(output)["step"]) == (0, STEPS), error
    same_bits(folder / "run", straight / "run")


def last_step(run_dir: Path) -> int:
    try:
        line = last_line(run_dir)
    except ValueError:  # read while it was being written
        return 0
    return line["step"] if line else 0


def wait_for(process: subprocess.Popen[str], condition: Any) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_run_says_so_and_touches_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()}
    result = run(finished)
    assert (result["step"], result["loss"]) == (STEPS, lines(finished / "run")[-1]["loss"])
    assert result["tokens"] == lines(finished / "run")[-1]["tokens"]
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("blocks", "field"),
    [
        ({"data": {"seed": 1}}, "data.seed=0, now 1"),
        ({"data": {"packing": "best_fit"}}, "data.packing='concat', now 'best_fit'"),
        ({"train": {"seed": 3}}, "train.seed=0, now 3"),
        ({"model": {"layers": 1}}, "model.layers=2, now 1"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name='adamw', now 'sgd'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_recipe_is_refused_naming_the_field(finished: Path, blocks: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as refused:
        run(finished, **blocks)
    assert f"its checkpoint at step 11 was made with {field}; set another run_dir" in str(refused.value)


def test_any_character_in_the_path_of_a_run(straight: Path, folder: Path) -> None:
    """Orbax takes a directory for a pattern; checkpoints have to be found, resumed from, moved and loaded."""
    run_dir = folder / "lr[1e-4] *? größe 東京" / "run"
    recipe = recipe_of(folder, mesh={"fsdp": 8}).model_copy(update={"run_dir": str(run_dir)})
    assert run_train(recipe)["step"] == STEPS
    assert checkpoints(run_dir) == [9, 11]
    shutil.rmtree(run_dir / "checkpoints" / "11")
    moved = run_dir.rename(folder / "**moved {a,b}")
    assert run_train(recipe.model_copy(update={"run_dir": str(moved)}))["step"] == STEPS
    same_bits(moved, straight / "run")
    ours, theirs = (ipt_jax.load(path).logits(list(range(5, 25))) for path in (moved, straight / "run"))
    np.testing.assert_array_equal(ours, theirs)


def test_another_corpus_is_refused(finished: Path) -> None:
    shutil.rmtree(finished / "raw")
    write_corpus(finished, documents=89)
    with pytest.raises(UserError, match=r"made with contents of source 'raw'="):
        run(finished)


def test_a_half_written_checkpoint_is_never_picked(straight: Path, finished: Path) -> None:
    """As a killed save leaves it: the arrays there, the name not yet final; and one that lost its rename's race."""
    saved = finished / "run" / "checkpoints"
    (saved / "11").rename(saved / "11.orbax-checkpoint-tmp")
    assert run(finished)["step"] == STEPS
    assert checkpoints(finished / "run") == [9, 11]
    assert not list(saved.glob("*tmp*"))
    same_bits(finished / "run", straight / "run")


def test_metrics_after_a_resume_hold_no_step_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": 0.5, "loss_by_kind": {"raw": 0.5}, "mfu": None})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    log = MetricsLog(tmp_path, 4)
    assert log.last is not None and log.last["step"] == 4
    log.write({"step": 6, "loss": 0.25, "loss_by_kind": {}, "mfu": None})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 0.5), (4, 0.5), (6, 0.25)]


def test_a_run_directory_has_one_writer(finished: Path) -> None:
    lock = lock_directory(finished / "run")
    with pytest.raises(UserError, match="another run is writing here"):
        run(finished)
    os.close(lock)


def nan_in_step_7(monkeypatch: pytest.MonkeyPatch, folder: Path, spike: float | None = None) -> None:
    """Programs built from now on compute a NaN gradient from the batch of step 7, where it has targets; or a loss that
    is `spike` times as high, with its gradient."""
    plan = build_plan(recipe_of(folder).data, rows_per_step=rows_per_step(recipe_of(folder)))
    seventh = next(iter(batches(plan, start_step=6, rows_per_step=rows_per_step(recipe_of(folder)))))["tokens"]
    compute = train_step.gradients

    def poisoned(params: Any, batch: Any, **how: Any) -> Any:
        grads, sums = compute(params, batch, **how)
        bad = (batch["tokens"].reshape(seventh.shape) == seventh).all() & batch["loss_mask"].any()
        if spike is not None:
            sums = sums | {"loss": sums["loss"] * jnp.where(bad, spike, 1.0)}
        return jax.tree.map(lambda grad: grad * jnp.where(bad, spike or jnp.nan, 1.0), grads), sums

    monkeypatch.setattr(train_step, "gradients", poisoned)


def test_nan_in_a_step_equals_a_run_that_skips_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nan_in_step_7(monkeypatch, folder)
    assert run(folder)["step"] == STEPS
    assert "warning: step 7: the gradient norm is not finite; its update is skipped" in capfd.readouterr().err
    os.rename(folder / "run", folder / "first")
    assert run(folder, train={"skip_steps": [7]})["step"] == STEPS
    assert "not finite" not in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, parameters(folder / "run"), parameters(folder / "first"))
    assert lines(folder / "first")[-1]["bad_steps"] == 1 and "bad_steps" not in lines(folder / "run")[-1]


def test_too_many_steps_that_are_not_finite_end_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_in_step_7(monkeypatch, folder)
    with pytest.raises(Fault, match=r"steps 7 to 7: .* \(the weights are finite\); see .*bad_steps.json"):
        run(folder, train={"max_bad_steps": 1})
    assert checkpoints(folder / "run") == [3, 6]
    found = json.loads((folder / "run" / "bad_steps.json").read_text())
    assert found["steps"] == [7]
    assert len(found["parameter_norms"]["layers.query"]) == SMALL["layers"]
    plan = build_plan(recipe_of(folder).data, rows_per_step=16)
    rows = next(iter(batches(plan, start_step=6, rows_per_step=16)))
    documents = {one.id: one.tokens for one in read_token_documents(folder / "raw")}
    assert [row["row"] for row in found["documents"]] == list(range(16))
    for row, tokens, segments in zip(found["documents"], rows["tokens"], rows["segment_ids"], strict=True):
        assert (row["step"], row["source"], len(row["ids"])) == (7, "raw", segments.max())
        assert all(documents[name] in tokens.astype("<u2").tobytes() for name in row["ids"][1:-1])
    assert run(folder, train={"max_bad_steps": 1, "skip_steps": [7]})["step"] == STEPS


def test_a_spike_that_is_skipped_equals_a_masked_step_also_after_a_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nan_in_step_7(monkeypatch, folder, spike=30.0)
    for stops in ([STEPS], [6, STEPS]):
        for stop in stops:
            assert run(folder, train={"on_spike": "skip", "stop_at_step": stop})["step"] == stop
        error = capfd.readouterr().err
        assert len(re.findall(r"warning: step 7: loss \d+\.\d+ is a spike .*; its update is skipped", error)) == 1
        os.rename(folder / "run", folder / f"spike{len(stops)}")
    assert run(folder, train={"skip_steps": [7]})["step"] == STEPS
    for name in ("spike1", "spike2"):
        jax.tree.map(np.testing.assert_array_equal, parameters(folder / "run"), parameters(folder / name))


def test_weights_that_are_not_finite_are_not_saved(
    straight: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN enters the weights before step 5: the run ends at the next checkpoint and resumes from that of step 3."""
    compile_step = trainer.compile_step

    def poisoned(program: Program, *limits: bool) -> Any:
        step = compile_step(program, *limits)

        def taken(state: TrainState, batch: Any) -> Any:
            if int(state.step) == 4:
                params = jax.tree.map(lambda value: value * float("nan"), state.params)
                state = dataclasses.replace(state, params=params)
            return step(state, batch)

        return taken

    monkeypatch.setattr(trainer, "compile_step", poisoned)
    with pytest.raises(Fault, match=r"steps 5 to 6: .* \(the weights are not finite\)"):
        run(folder)
    assert checkpoints(folder / "run") == [3]
    monkeypatch.setattr(trainer, "compile_step", compile_step)
    assert run(folder)["step"] == STEPS
    same_bits(folder / "run", straight / "run")


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_save_too(folder: Path, name: signal.Signals) -> None:
    recipe = recipe_of(folder, mesh={"fsdp": 8}, train={"checkpoint_every": 100})
    (folder / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    process = run_python(COMMAND, "train", str(folder / "run.yaml"), JAX_NUM_CPU_DEVICES="8")
    wait_for(process, lambda: last_step(folder / "run") >= 2)
    process.send_signal(name)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert f"ipt train: {name.name}: the run ends when its save is on disk" in error
    assert len(checkpoints(folder / "run")) == 1


def test_nohup_keeps_its_meaning() -> None:
    """A signal that the shell made the process ignore stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with trainer.stop_signal() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked(1) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_stops_early_keeps_its_schedule(straight: Path, folder: Path) -> None:
    stopped = run(folder, train={"stop_at_step": 5})
    assert (stopped["step"], stopped["steps"]) == (5, 5) and checkpoints(folder / "run") == [3, 5]
    assert run(folder, train={"stop_at_step": 4})["step"] == 5, "it is past that step"
    assert run(folder)["step"] == STEPS
    same_bits(folder / "run", straight / "run")


def test_a_run_that_stalls_ends_with_stack_traces(folder: Path) -> None:
    recipe = recipe_of(folder, mesh={"fsdp": 8}, train={"stall_minutes": 0.05, "log_every": 1})
    process = child(recipe, 30.0)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Timeout (0:00:03)!" in error and "in slow" in error and "trainer.py" in error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"),
    ],
    ids=["metrics", "orbax"],
)
def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*arguments: Any, last: bool) -> None:
        raise error

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(UserError, match=r"run_dir .*/run: cannot be written \(No space left on device\); free space"):
        run(folder)
    os.close(lock_directory(folder / "run"))  # the lock was given back


def test_a_run_directory_that_cannot_be_made(folder: Path) -> None:
    (folder / "run").write_text("a file")
    with pytest.raises(UserError, match="/run: cannot be written"):
        run(folder)


def test_a_warm_up_longer_than_the_run_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="optimizer.warmup_steps is 11, but the plan has 11 steps"):
        run(folder, optimizer={"warmup_steps": 11})


def test_training_goes_on_from_another_model(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "raw", tmp_path / "raw")
    recipe = recipe_of(tmp_path, optimizer={"learning_rate": 1e-9, "weight_decay": 0.0})
    model = {"from": str(straight / "run"), "sliding_window": 16}
    recipe = Recipe.model_validate(
        recipe.model_dump(by_alias=True) | {"model": model, "mesh": {"fsdp": 2, "tensor": 4}}
    )
    assert run_train(recipe)["step"] == STEPS
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), parameters(tmp_path / "run"), parameters(straight / "run"))
    assert 0 < max(jax.tree.leaves(moved)) < 1e-6

    def again(name: str, **fields: int) -> Recipe:
        changed = {"model": model | fields, "run_dir": str(tmp_path / name)}
        return Recipe.model_validate(recipe.model_dump(by_alias=True) | changed)

    with pytest.raises(UserError, match=r"model.hidden_size is 64, but the weights of .* have 32"):
        run_train(again("wider", hidden_size=64))
    assert run_train(again("more_ids", vocab_size=200))["step"] == STEPS
    assert parameters(tmp_path / "more_ids")["embedding"].shape == (200, SMALL["hidden_size"])
    another = json.loads((tmp_path / "raw" / "tokenizer" / "tokenizer.json").read_text())
    vocab = another["model"]["vocab"]
    another["model"]["vocab"] = dict(
        zip(vocab, [*list(vocab.values())[:10], *list(vocab.values())[:9:-1]], strict=True)
    )
    (tmp_path / "raw" / "tokenizer" / "tokenizer.json").write_text(json.dumps(another))
    with pytest.raises(UserError, match="its tokenizer differs from that of the data: 'The quick brown fox'"):
        run_train(recipe.model_copy(update={"run_dir": str(tmp_path / "third")}))
