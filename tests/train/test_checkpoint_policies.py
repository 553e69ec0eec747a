"""Which checkpoints are saved and kept, and what they may be restored as: another mesh, host count or moment dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_resume import COMMAND, STEPS, checkpoints, lines, run
from token_shards import save_tokenizer
from trainkit import model_of, recipe_of, train_processes, write_corpus

from ipt_jax.config import OptimizerSettings, TrainSettings
from ipt_jax.core.checkpoint_path import LiteralPath
from ipt_jax.core.errors import UserError
from ipt_jax.model.decoder import decay_mask
from ipt_jax.train.checkpoint import CheckpointRecord, Saved, preservation
from ipt_jax.train.metrics import Ledger
from ipt_jax.train.step import make_optimizer


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPT_COMPILE_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    save_tokenizer(tmp_path / "raw" / "tokenizer")
    return tmp_path


# ---- saved and kept


def test_one_every_n_steps_is_kept(folder: Path) -> None:
    """Steps 5 and 10 are saved for it, though they are no multiples of checkpoint_every."""
    run(folder, train={"keep_every": 5, "keep_checkpoints": 1})
    assert checkpoints(folder / "run") == [5, 10, 11]


def test_the_best_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    settle, losses = Ledger.settle, {3: 2.0, 6: 0.5, 9: math.nan}

    def measured(self: Ledger, step: int) -> None:
        settle(self, step)
        if step in losses:
            self.record = msgspec.structs.replace(self.record, measures={"raw": losses[step]})

    monkeypatch.setattr(Ledger, "settle", measured)
    run(folder, train={"keep_best": "raw", "keep_checkpoints": 1})
    assert checkpoints(folder / "run") == [6, 11]
    said = [line for line in capfd.readouterr().err.splitlines() if "keep_best" in line]
    assert run(folder, train={"keep_best": "raw"})["step"] == STEPS, (
        "a record with a measure that is not finite is read"
    )
    assert said == [
        f"ipt train: warning: step {step} has no measure raw: train.keep_best cannot compare it" for step in (9, 11)
    ]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [40, 50]),
        ({"keep_checkpoints": 1, "keep_hours": 1.0}, [10, 30, 50]),
        ({"keep_checkpoints": 1, "keep_hours": 0.5}, [10, 20, 30, 40, 50]),
        ({"keep_checkpoints": 1, "keep_every": 20}, [20, 40, 50]),
        ({"keep_checkpoints": 1, "keep_best": "all"}, [30, 50]),
        ({"keep_checkpoints": 1, "keep_best": "none"}, [50]),
        ({"keep_checkpoints": 1, "keep_best": "all", "keep_every": 20, "keep_hours": 2.0}, [10, 20, 30, 40, 50]),
    ],
)
def test_policies(tmp_path: Path, fields: dict[str, Any], kept: list[int]) -> None:
    """The second checkpoint has no measures."""
    settings = TrainSettings(batch_tokens=32, **fields)
    hours, losses = (0.0, 0.6, 1.2, 1.9, 2.3), (3.0, None, 1.0, 2.0, 1.5)
    for step, hour, loss in zip((10, 20, 30, 40, 50), hours, losses, strict=True):
        measures = {} if loss is None else {"all": loss}
        made = CheckpointRecord(step, 0, "", {}, measures=measures, unix_seconds=1e9 + 3600 * hour)
        (tmp_path / str(step) / "record").mkdir(parents=True)
        (tmp_path / str(step) / "record" / "record.json").write_bytes(msgspec.json.encode(made))
    saved = [Saved.read(tmp_path / str(step), settings.keep_best) for step in (10, 20, 30, 40, 50)]
    found = preservation(settings).should_preserve(saved, context=None)
    assert [one.step for one, keeps in zip(saved, found, strict=True) if keeps] == kept


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [2, 4, 6, 8, 10, 11]), (1e9, [11])])
def test_checkpoints_by_minutes(folder: Path, minutes: float, saved: list[int]) -> None:
    """At logged steps, and at the last one."""
    run(folder, train={"checkpoint_every": None, "checkpoint_minutes": minutes, "keep_checkpoints": 9})
    assert checkpoints(folder / "run") == saved
    recorded = [
        json.loads((folder / "run" / "checkpoints" / str(step) / "record" / "record.json").read_text())["unix_seconds"]
        for step in saved
    ]
    assert recorded == sorted(recorded) and recorded[0] > 1.7e9


# ---- restored as something else


def test_another_mesh_and_host_count(folder: Path) -> None:
    """fsdp 8, then fsdp 2 x tensor 2, then one device, then two processes of one device each, as under SLURM: the
    losses of an undisturbed run."""
    every = {"log_every": 1, "checkpoint_every": 100}
    run(folder, train=every | {"stop_at_step": 2})
    (folder / "run").rename(folder / "moved")
    run(folder, train=every)
    legs: tuple[tuple[int, dict[str, int], list[int]], ...] = (
        (5, {"fsdp": 2, "tensor": 2}, [4]), (8, {"fsdp": 1}, [1]), (STEPS, {"fsdp": 2}, [1, 1]),
    )  # fmt: skip
    for stop, mesh, devices in legs:
        recipe = recipe_of(folder, mesh=mesh, train=every | {"stop_at_step": stop})
        (folder / "leg.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
        arguments = ("train", str(folder / "leg.yaml"), f"run_dir={folder / 'moved'}")
        train_processes(COMMAND, arguments, devices)
    ours, theirs = ([line["loss"] for line in lines(folder / name)] for name in ("moved", "run"))
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def moments(run_dir: Path, step: int) -> Any:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(LiteralPath(run_dir.absolute() / "checkpoints" / str(step) / "optimizer"))


def test_moments_of_another_dtype(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """float32 up to step 4, bfloat16 up to 8, float32 again: each converts the moments of the one before."""
    every = {"log_every": 1, "checkpoint_every": 4, "keep_checkpoints": 9}
    run(folder, train=every)
    (folder / "run").rename(folder / "straight")
    run(folder, train=every | {"stop_at_step": 4})
    run(folder, train=every | {"stop_at_step": 8}, optimizer={"moments_dtype": "bfloat16"})
    assert "float32 parameters, bfloat16 moments" in capfd.readouterr().err
    run(folder, train=every)
    found = [{leaf.dtype for leaf in jax.tree.leaves(moments(folder / "run", step))} for step in (4, 8, 11)]
    assert found == [{np.dtype(name), np.dtype("int32")} for name in ("float32", "bfloat16", "float32")]
    ours, theirs = ([line["loss"] for line in lines(folder / name)] for name in ("run", "straight"))
    assert ours[:5] == theirs[:5], "the forward pass of step 5 precedes its moments"
    assert ours[5:] != theirs[5:]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01)


def test_bfloat16_moments_are_float32_ones_rounded() -> None:
    """The first update is that of float32. Later ones differ by the rounding of what is stored."""
    decay = decay_mask(model_of())
    params = jax.tree.map(lambda decays: jnp.linspace(-1.0, 1.0, 64), decay)
    both = [make_optimizer(OptimizerSettings(moments_dtype=dtype), decay) for dtype in ("float32", "bfloat16")]
    states = [optimizer.init(params) for optimizer in both]
    for number in range(40):
        grads = jax.tree.map(lambda x, number=number: jnp.sin(x * (number + 1)), params)
        (exact, states[0]), (rounded, states[1]) = (
            optimizer.update(grads, state, params) for optimizer, state in zip(both, states, strict=True)
        )
        apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), exact, rounded)))
        assert apart == 0 if number == 0 else 0 < apart < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(states[1][0]._replace(count=()))} == {jnp.dtype("bfloat16")}


def test_a_slow_decay_in_bfloat16_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.beta2 is 0.999, too near 1 .*; set optimizer.beta2 to 0.99 or le"):
        make_optimizer(OptimizerSettings(moments_dtype="bfloat16", beta2=0.999), decay_mask(model_of()))
