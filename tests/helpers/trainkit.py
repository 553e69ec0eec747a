"""A training run small enough for tests: token shards, a recipe over them, and batches without any files."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from extras import ROOT
from token_shards import random_documents, write_tokens

from ipt_jax.config import Recipe
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import init_params
from ipt_jax.parallel.distributed import ADDRESSES
from ipt_jax.parallel.mesh import batch_sharding, make_mesh, place_batch
from ipt_jax.train.state import TrainState, state_from_params
from ipt_jax.train.step import Program, build_program

SMALL: dict[str, Any] = {
    "vocab_size": 104, "hidden_size": 32, "layers": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "initializer_range": 0.1,
}  # fmt: skip


PROGRAMS: dict[str, Program] = {}
DRAWN: dict[str, Any] = {}


def recipe_of(tmp_path: Path = Path("unused"), **blocks: dict[str, Any]) -> Recipe:
    """A recipe of batches of 16 rows of 32; `blocks` override fields."""
    recipe: dict[str, dict[str, Any]] = {
        "model": SMALL | {"tie_embeddings": True},
        "data": {"seq_len": 32, "sources": [{"name": "raw", "path": str(tmp_path / "raw"), "epochs": 2}]},
        "train": {"batch_tokens": 16 * 32, "log_every": 2, "checkpoint_every": 3},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "mesh": {},
    }
    merged = {name: fields | blocks.get(name, {}) for name, fields in recipe.items()}
    return Recipe.model_validate(merged | {"run_dir": str(tmp_path / "run")})


def write_corpus(tmp_path: Path, documents: int = 90) -> None:
    """Raw documents for `recipe_of`: 11 steps."""
    write_tokens(tmp_path / "raw", random_documents([15 + i % 30 for i in range(documents)]))


def model_of(**fields: Any) -> ModelConfig:
    return ModelConfig(**(SMALL | fields))


def random_batch(rows: int, seq_len: int, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows as the loader gives them: documents of random lengths, some tokens no targets, a padded tail."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, seq_len), dtype=np.int32)
    segment_ids = 1 + np.cumsum(rng.random((rows, seq_len)) < 0.1, axis=1).astype(np.int32)
    segment_ids[-1, seq_len // 2 :] = 0
    starts = np.diff(segment_ids, axis=1, prepend=0) != 0
    begun = np.maximum.accumulate(np.where(starts, np.arange(seq_len), 0), axis=1)
    last = np.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], np.ones((rows, 1), bool)], axis=1)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": (segment_ids > 0) & ~last & (rng.random((rows, seq_len)) < 0.8),
        "segment_ids": segment_ids,
        "positions": (np.arange(seq_len) - begun).astype(np.int32),
        "kinds": np.where(segment_ids > 0, 1 + segment_ids % 4, 0).astype(np.int32),
    }


def program_of(recipe: Recipe, model: ModelConfig, devices: int = 1) -> Program:
    """The recipe's program on the first `devices` devices; equal ones are shared, and with them what they compile."""
    key = f"{recipe.model_dump_json()} {model.model_dump_json()} {devices}"
    if key not in PROGRAMS:
        PROGRAMS[key] = build(recipe, model, devices)
    return PROGRAMS[key]


def build(recipe: Recipe, model: ModelConfig, devices: int = 1) -> Program:
    """The program of `ipt train`, its step compiled quickly."""
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor, jax.devices()[:devices])
    program = build_program(recipe, model, mesh, total_steps=30)
    # LLVM's optimizations take half of the compilation and change no result that is tested here
    quick = jax.jit(
        program.step.__wrapped__,
        donate_argnums=0,
        out_shardings=(program.shardings, None),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return dataclasses.replace(program, step=quick)


def start(program: Program, seed: int = 0) -> TrainState:
    """`fresh_state`, its parameters drawn once a model: drawing them takes longer to compile than a small step."""
    key = f"{program.model.model_dump_json()} {seed}"
    if key not in DRAWN:
        DRAWN[key] = jax.device_get(init_params(program.model, jax.random.key(seed)))
    params = jax.tree.map(
        lambda value, to: jax.make_array_from_callback(value.shape, to, lambda part: value[part].copy()),
        DRAWN[key],
        program.shardings.params,
    )
    return state_from_params(params, program.optimizer, program.shardings)


def place(program: Program, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return place_batch(batch, program.shape.accumulation, batch_sharding(program.mesh))


def host(tree: Any) -> Any:
    """Every leaf as a float64 array on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def worst(one: Any, other: Any) -> float:
    """The largest difference between two trees, each tensor's relative to its own largest entry."""

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(apart, host(one), host(other))))


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A child that runs `code` with the tests' folders on its path."""
    env = (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *(path for path in sys.path if path.startswith(str(ROOT / "tests")))]
            )
        }
        | environment
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def train_processes(code: str, arguments: tuple[str, ...], devices: list[int]) -> list[str]:
    """What each process of one run prints to stderr. `code` runs `ipt` on `arguments`; all processes must finish."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = []
    for number, count in enumerate(devices):
        names = dict(zip(ADDRESSES, (address, str(number), str(len(devices))), strict=True))
        environment = {"JAX_NUM_CPU_DEVICES": str(count)} | (names if len(devices) > 1 else {})
        children.append(run_python(code, *arguments, **environment))
    try:
        errors = [child.communicate(timeout=250)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(errors)[-4000:]
    return errors
