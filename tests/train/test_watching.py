"""What a run shows of itself and what that costs: norms by group, a trace, Weights & Biases; no syncs, no leaks."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from token_shards import random_documents, write_tokens
from trainkit import model_of, place, program_of, random_batch, recipe_of, run_python, start, write_corpus

from ipt_jax.core.errors import UserError
from ipt_jax.train import trainer
from ipt_jax.train.metrics import Ledger
from ipt_jax.train.step import gradients
from ipt_jax.train.trainer import run_train


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPT_COMPILE_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus / "raw", tmp_path / "raw")
    return tmp_path


def run(folder: Path, **train: Any) -> dict[str, Any]:
    return run_train(recipe_of(folder, mesh={"fsdp": 8}, train=train))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- the terminal


@pytest.mark.parametrize("stderr", [io.StringIO(), None], ids=["no_descriptor", "none"])
def test_stderr_that_is_not_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, stderr: Any) -> None:
    """As in a notebook, under pytest's capture or pythonw: the watchdog needs a descriptor."""
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run(folder)["step"] == 11
    if stderr is not None:
        said = stderr.getvalue().splitlines()
        assert sum(line.startswith("ipt train: state: ") for line in said) == 1
        assert sum("a device holds" in line for line in said) == 1


# ---- norms by group


def test_norms_by_group_are_those_of_the_tensors() -> None:
    program = program_of(recipe_of(), model_of())
    batch = place(program, random_batch(16, 32, 104))
    state = start(program)
    how = {"config": program.model, "shape": program.shape, "mesh": program.mesh}
    grads, _ = jax.jit(lambda p, b: gradients(p, b, shardings=program.shardings.params, **how))(state.params, batch)
    layers = jax.device_get(grads["layers"])
    tensors = {
        "embedding": [grads["embedding"]],
        "attention": [layers[name] for name in ("query", "key", "value", "output")],
        "feed_forward": [layers[name] for name in ("gate", "up", "down")],
        "norms": [layers["attention_norm"], layers["mlp_norm"], grads["norm"]],
        "head": [grads["head"]],
    }
    metrics = jax.device_get(program.step(state, batch)[1])
    assert metrics["grad_norms"].keys() == tensors.keys()
    for group, found in metrics["grad_norms"].items():
        expected = np.sqrt(sum(np.square(np.asarray(one, np.float64)).sum() for one in tensors[group]))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    total = np.sqrt(sum(np.float64(norm) ** 2 for norm in metrics["grad_norms"].values()))
    np.testing.assert_allclose(metrics["grad_norm"], total, rtol=1e-5)


# ---- a trace of some steps


@pytest.mark.parametrize(("start", "steps", "said"), [(4, 3, "from 4 to 6"), (10, 9, "from 10 to 11")])
def test_a_trace_of_some_steps(
    folder: Path, capfd: pytest.CaptureFixture[str], start: int, steps: int, said: str
) -> None:
    assert run(folder, profile={"start": start, "steps": steps})["step"] == 11
    assert f"trace of the steps {said} in {folder / 'run' / 'profile'}" in capfd.readouterr().err
    (file,) = (folder / "run" / "profile").rglob("*.xplane.pb")
    names = {event.name for plane in jax.profiler.ProfileData.from_file(str(file)).planes
             for line in plane.lines for event in line.events}  # fmt: skip
    assert "train" in names
    assert run(folder, profile={"start": 3})["step"] == 11, "a finished run traces nothing"
    assert len(list((folder / "run" / "profile").rglob("*.xplane.pb"))) == 1


# ---- Weights & Biases


class StandIn(ModuleType):
    """What of wandb is used. `lines` are what it got."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.__spec__ = __import__("importlib.machinery", fromlist=["x"]).ModuleSpec("wandb", None)
        self.started: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.finished, self.fails, self.id = 0, fails, "id7"

    def init(self, **fields: Any) -> StandIn:
        if self.fails == "init":
            raise RuntimeError("no network\nat all")
        self.started.append(fields)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        if self.fails == "log" and values["step"] >= 6:
            raise OSError("gone")
        self.lines.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_metrics_reach_wandb_and_a_resume_continues_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(folder, wandb="pretraining", stop_at_step=6)
    run(folder, wandb="pretraining")
    assert [line["step"] for line in wandb.lines] == [1, 2, 4, 6, 8, 10, 11]
    for sent, logged in zip(wandb.lines, lines(folder / "run"), strict=True):
        assert sent["loss"] == logged["loss"] and sent["grad_norms/attention"] == logged["grad_norms"]["attention"]
        assert all(isinstance(value, int | float) for value in sent.values())
    first, second = wandb.started
    assert (first["project"], first["name"], first["id"], second["id"]) == ("pretraining", "run", None, "id7")
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert first["config"]["train"]["wandb"] == "pretraining" and wandb.finished == 2


@pytest.mark.parametrize(("fails", "reason"), [("init", "no network at all"), ("log", "gone")])
def test_an_error_of_wandb_is_said_once_and_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fails: str, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails))
    assert run(folder, wandb="pretraining")["step"] == 11
    assert capfd.readouterr().err.count(f"train.wandb: no more metrics are sent ({reason}); WANDB_MODE=offline") == 1
    assert len(lines(folder / "run")) == 7


def test_wandb_that_is_not_installed_is_said_before_the_data_is_read(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="train.wandb is 'mine', but the package wandb is not installed; run pip"):
            run(tmp_path / "nothing", wandb="mine")


def test_tensorboard_events_need_no_torch(tmp_path: Path) -> None:
    """Its import would double those of a start."""
    code = """
import sys
from pathlib import Path
from ipt_jax.train.metrics import Board
Board(Path(sys.argv[1]), 0).write({"step": 1, "loss": 2.5})
print("torch" in sys.modules)
"""
    output, error = run_python(code, str(tmp_path)).communicate(timeout=120)
    assert output == "False\n", error
    assert list(tmp_path.glob("events*"))


# ---- what the loop waits for


class OnDevice:
    """A metric of a step, which notes when it is fetched."""

    def __init__(self, value: jax.Array, fetch: Any) -> None:
        self.value, self.fetch = value, fetch

    def __array__(self, *how: Any) -> np.ndarray:
        self.fetch()
        return np.asarray(self.value)


def test_nothing_is_fetched_or_sent_between_logged_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a transfer guard. On CPUs the guard sees no fetches, so metrics note theirs."""
    started, fetched, compiled = [0], [], trainer.compile_step

    def watched(*arguments: Any) -> Any:
        step = compiled(*arguments)

        def run(*values: Any) -> Any:
            started[0] += 1
            state, metrics = step(*values)
            return state, jax.tree.map(lambda one: OnDevice(one, lambda: fetched.append(started[0])), metrics)

        return run

    def guarded(*arguments: Any) -> None:
        with jax.transfer_guard("disallow"):
            train(*arguments)

    def waits(*arguments: Any) -> None:
        raise AssertionError(f"waits for the devices at step {started[0]}")

    train = trainer.train
    monkeypatch.setattr(trainer, "compile_step", watched)
    monkeypatch.setattr(trainer, "train", guarded)
    monkeypatch.setattr(jax, "block_until_ready", waits)
    assert run(folder, log_every=5, checkpoint_every=100)["step"] == 11
    assert sorted(set(fetched)) == [5, 10, 11]


# ---- memory


def test_memory_is_flat_over_2000_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live arrays and resident memory at step 200 and at step 2,000 of a model that is small."""
    rows, length, steps = 2, 16, 2000
    write_tokens(tmp_path / "raw", random_documents([length + 5] * 400))
    source = {"name": "raw", "path": str(tmp_path / "raw"), "tokens": steps * rows * length}
    recipe = recipe_of(
        tmp_path, model={"layers": 1}, data={"seq_len": length, "sources": [source]}, mesh={"devices": 1},
        train={"batch_tokens": rows * length, "log_every": 100, "checkpoint_every": None, "checkpoint_minutes": 60},
    )  # fmt: skip
    found: dict[int, tuple[int, int]] = {}
    settle = Ledger.settle

    def measured(self: Ledger, step: int) -> None:
        settle(self, step)
        found[step] = len(jax.live_arrays()), resident_bytes()

    monkeypatch.setattr(Ledger, "settle", measured)
    monkeypatch.setattr(trainer, "training_devices", lambda wanted: jax.devices()[:1])
    assert run_train(recipe)["step"] == steps
    (arrays, resident), (last_arrays, last_resident) = found[199], found[1899]
    assert last_arrays == arrays
    assert last_resident - resident < 12 * 2**20, found


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0
    return pages * resource.getpagesize()
