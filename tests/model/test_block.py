"""`cross_document: block` is exact: another text in one document of a row changes no bit of its neighbours' step.

Through the real train step, whose optimizer keeps the gradients that it was given: blockwise and short rows, a window,
chunked loss, accumulation, every remat.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
from trainkit import build, model_of, place, recipe_of, start

ROWS, VOCAB = 4, 104


def packed(length: int) -> dict[str, np.ndarray]:
    """Rows of three documents; the targets of the first and the last one count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, length), dtype=np.int32)
    borders = np.array([length // 3, length // 3 * 2 - 5])
    segments = 1 + (np.arange(length)[:, None] >= borders).sum(1)
    first = np.concatenate([[0], borders])[segments - 1]
    ends = np.isin(np.arange(length), [*(borders - 1), length - 1])
    whole = np.ones((ROWS, 1), np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": (segments != 2) & ~ends & (whole > 0),
        "segment_ids": (segments * whole).astype(np.int32),
        "positions": ((np.arange(length) - first) * whole).astype(np.int32),
        "kinds": (segments * whole).astype(np.int32),
    }


def rewritten(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Other tokens, and with them other targets, in the middle documents."""
    middle = batch["segment_ids"] == 2
    tokens, targets = ((batch[name] + 1 + np.arange(middle.shape[1]) % 7) % VOCAB for name in ("tokens", "targets"))
    changed = {
        "tokens": np.where(middle, tokens, batch["tokens"]),
        "targets": np.where(middle, targets, batch["targets"]),
    }
    assert (changed["tokens"] != batch["tokens"]).sum() == middle.sum()
    return batch | {name: value.astype(np.int32) for name, value in changed.items()}


def one_step(program: Any, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
    state, metrics = program.step(start(program), place(program, batch))
    return state.optimizer[0].trace, metrics


@pytest.mark.parametrize(
    ("length", "remat", "dtype"),
    [(96, "none", "bfloat16"), (96, "dots", "float32"), (96, "full", "float32"), (640, "full", "float32")],
)
def test_neighbours_keep_every_bit(length: int, remat: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = "ipt_jax.train.step.make_optimizer"
    monkeypatch.setattr(keep, lambda *given: optax.chain(optax.trace(0.0), optax.sgd(0.1)))
    train = {"batch_tokens": ROWS * length, "microbatch": 2, "loss_chunk": 64, "remat": remat, "compute_dtype": dtype}
    data = {"seq_len": length, "cross_document": "block"}
    program = build(recipe_of(data=data, train=train), model_of(sliding_window=24))
    batch = packed(length)
    (grads, metrics), (other_grads, others) = (one_step(program, rows) for rows in (batch, rewritten(batch)))
    assert metrics["targets"][2] == 0 and metrics["targets"].sum() == batch["loss_mask"].sum()
    jax.tree.map(np.testing.assert_array_equal, (grads, metrics), (other_grads, others))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
