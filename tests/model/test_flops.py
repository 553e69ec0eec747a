"""What MFU counts: by hand, against the matrix products in the jaxpr, and against masks written out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import product_flops
from trainkit import model_of, place, program_of, random_batch, recipe_of

from ipt_jax.model import decoder
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import Mistral, abstract_params
from ipt_jax.model.flops import model_flops, model_flops_per_token, peak_flops, visible_pairs
from ipt_jax.train import step
from ipt_jax.train.step import gradients

ROWS, LENGTH, VOCAB = 16, 32, 104


def test_a_hand_count() -> None:
    """2 layers of D 32, heads 4 and 2 of 8, F 48, V 104, rows of 4: multiplications and additions, times three."""
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    head = 32 * 104
    keys = (1 + 2 + 3 + 4) / 4
    assert model_flops_per_token(model_of(), 4) == 6 * (2 * (projections + 2 * 4 * 8 * keys) + head)
    windowed = (1 + 2 + 2 + 2) / 4
    by_hand = 6 * (2 * (projections + 2 * 4 * 8 * windowed) + head)
    assert model_flops_per_token(model_of(sliding_window=2), 4) == by_hand
    assert model_flops_per_token(model_of(), 4) == model_flops_per_token(model_of(tie_embeddings=True), 4)
    documents = model_flops(model_of(), 4, visible_pairs([3, 1], None))  # pairs 1 + 2 + 3, and 1
    assert documents == 4 * model_flops_per_token(model_of(), 4) - 6 * 2 * 2 * 4 * 8 * 3


# ---- the jaxpr


def whole_square(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
    """Attention that leaves nothing out and nothing to recompute: a product of T x T pairs for each of two steps."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k)), v)


MODELS = {
    "grouped": model_of(),
    "one key head, odd head_dim, tied": model_of(kv_heads=1, head_dim=14, tie_embeddings=True),
    "deep, every head its own": model_of(layers=6, kv_heads=4),  # scanned, not unrolled
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_forward_pass_holds_a_third(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "attend", whole_square)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return Mistral.from_params(model, params)(tokens)

    jaxpr = jax.make_jaxpr(logits)(abstract_params(model), jax.ShapeDtypeStruct((3, 10), jnp.int32))
    assert 3 * product_flops(jaxpr) == model_flops(model, 3 * 10, 3 * 10 * 10)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_step_holds_all_of_it(model: ModelConfig, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real gradients of a batch, chunked loss included: the same products, once attention sees the same pairs."""
    monkeypatch.setattr(decoder, "attend", whole_square)
    program = program_of(recipe_of(train={"microbatch": ROWS // accumulation, "loss_chunk": 32}), model)
    assert program.shape.accumulation == accumulation and program.shape.remat == "none"
    shapes = {"config": model, "shape": program.shape, "mesh": program.mesh, "shardings": program.shardings.params}
    jaxpr = jax.make_jaxpr(functools.partial(gradients, **shapes))(program.state.params, program.batch)
    assert product_flops(jaxpr) == model_flops(model, ROWS * LENGTH, ROWS * LENGTH * LENGTH)


def test_recomputation_is_not_counted() -> None:
    """A step that recomputes its layers holds more products than MFU counts."""
    program = program_of(recipe_of(train={"remat": "full"}), model_of())
    shapes = {"config": program.model, "shape": program.shape, "mesh": program.mesh}
    run = functools.partial(gradients, **shapes, shardings=program.shardings.params)
    jaxpr = jax.make_jaxpr(run)(program.state.params, program.batch)
    assert product_flops(jaxpr) > 1.2 * ROWS * LENGTH * model_flops_per_token(program.model, LENGTH)


# ---- pairs


def causal(length: int, window: int | None, documents: np.ndarray | None = None) -> np.ndarray:
    """[B, T, S] bool, written out."""
    at = np.arange(length)
    mask = (at[None] <= at[:, None]) & (at[:, None] - at[None] < (window or length))
    return mask[None] if documents is None else mask & (documents[..., :, None] == documents[..., None, :])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.one_of(st.none(), st.integers(1, 40)))
def test_pairs_are_those_of_the_mask(lengths: list[int], window: int | None) -> None:
    documents = np.repeat(np.arange(len(lengths)), lengths)
    assert visible_pairs(lengths, window) == causal(len(documents), window, documents).sum()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rule", ["block", "allow"])
def test_a_step_counts_the_pairs_of_its_rows(rule: str, window: int | None) -> None:
    """Of real tokens alone; under `block` within documents, as its mask does."""
    model, rows = model_of(sliding_window=window), random_batch(ROWS, LENGTH, VOCAB)
    program = program_of(recipe_of(data={"cross_document": rule}), model)
    mask = causal(LENGTH, window, rows["segment_ids"] if rule == "block" else None)
    wanted = (mask & (rows["segment_ids"] > 0)[:, :, None]).sum()
    assert step.visible_pairs(place(program, rows), model, program.shape) == wanted


# ---- peaks


def test_a_peak_is_looked_up_never_guessed() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", 8) == 8 * 989.4e12
    assert peak_flops("TPU v5 lite", 16) == 16 * 197e12
    assert peak_flops("TPU v5", 4) == 4 * 459e12
    for unknown in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200", "TPU v5x", ""):
        assert peak_flops(unknown, 8) is None, unknown
