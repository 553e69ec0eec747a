"""The loss against the formula in the textbook, whatever the chunks; the schedule as literal numbers; AdamW by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainkit import model_of, random_batch, worst

from ipt_jax.config import OptimizerSettings
from ipt_jax.model.decoder import decay_mask
from ipt_jax.train.loss import chunk_size, cross_entropy
from ipt_jax.train.step import clip, learning_rate, make_optimizer

ROWS, LENGTH, D, VOCAB = 4, 12, 8, 11


def draws(seed: int = 0) -> tuple[jax.Array, jax.Array, dict[str, np.ndarray]]:
    first, second = jax.random.split(jax.random.key(seed))
    hidden = 2 * jax.random.normal(first, (ROWS, LENGTH, D))
    return hidden, jax.random.normal(second, (D, VOCAB)), random_batch(ROWS, LENGTH, VOCAB, seed)


def plain(hidden: jax.Array, head: jax.Array, batch: dict[str, np.ndarray], z_loss: float) -> jax.Array:
    """Full logits, a gather, automatic differentiation."""
    logits = hidden @ head
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    loss = normalizer - jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(batch["loss_mask"], loss + z_loss * normalizer**2, 0.0))


def ours(hidden: jax.Array, head: jax.Array, batch: dict[str, np.ndarray], **options: float) -> tuple:
    return cross_entropy(hidden, head, batch["targets"], batch["loss_mask"], batch["kinds"], **options)


@pytest.mark.parametrize("chunk", [None, 1, 6, 48])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients_against_the_formula(chunk: int | None, z_loss: float) -> None:
    hidden, head, batch = draws()
    options = {"chunk": chunk, "z_loss": z_loss}
    wanted, wanted_grads = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head, batch, z_loss)
    (loss, _), grads = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head, batch, **options)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(ours(hidden, head, batch, **options)[0], wanted, rtol=1e-6)  # without a gradient
    assert worst(grads, wanted_grads) < 1e-6


def test_loss_by_kind_adds_up() -> None:
    hidden, head, batch = draws(1)
    _, sums = ours(hidden, head, batch, chunk=16)
    for kind in range(5):
        only = batch | {"loss_mask": batch["loss_mask"] & (batch["kinds"] == kind)}
        np.testing.assert_allclose(sums["loss"][kind], plain(hidden, head, only, 0.0), rtol=1e-6, atol=1e-6)
        assert sums["targets"][kind] == only["loss_mask"].sum()


def test_extreme_logits_stay_finite() -> None:
    hidden, head, batch = draws()
    (loss, _), grads = jax.value_and_grad(ours, has_aux=True)(1e4 * hidden, head, batch, chunk=12)
    assert np.isfinite(loss) and np.isfinite(grads).all()


def test_bfloat16_sums_in_float32() -> None:
    hidden, head, batch = draws()
    (loss, sums), grads = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(
        hidden.astype(jnp.bfloat16), head, batch, chunk=12
    )
    assert loss.dtype == sums["loss"].dtype == jnp.float32
    assert (grads[0].dtype, grads[1].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(loss, plain(hidden, head, batch, 0.0), rtol=2e-2)


@given(st.integers(1, 20_000), st.integers(1, 5000))
def test_chunks_divide_the_tokens_and_keep_the_limit(tokens: int, limit: int) -> None:
    size = chunk_size(tokens, limit)
    assert tokens % size == 0 and size <= limit


# ---- schedule


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1, 1, 0.775, 0.325, 0.1]),
        ("wsd", [0.5, 1, 1, 1, 1, 0.1]),
    ],
)
def test_schedule(schedule: str, rates: list[float]) -> None:
    options = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=2, min_ratio=0.1)
    np.testing.assert_allclose([learning_rate(options, step, 6) for step in range(6)], 2 * np.array(rates), rtol=1e-6)


@given(st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_schedule_rises_then_falls(warmup: int, decay: int, min_ratio: float) -> None:
    options = OptimizerSettings(learning_rate=1.0, warmup_steps=warmup, min_ratio=min_ratio)
    total = warmup + decay
    rates = np.asarray(learning_rate(options, jnp.arange(81), total))[:total]  # one shape: one compilation
    assert (np.diff(rates[: warmup + 1]) >= 0).all() and (np.diff(rates[warmup:]) <= 1e-6).all()
    assert rates.max() == 1.0
    if decay > 1:
        np.testing.assert_allclose(rates[-1], min_ratio, atol=1e-6)


# ---- optimizer


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_norms_do_not(tied: bool) -> None:
    mask = decay_mask(model_of(tie_embeddings=tied))
    matrices = {
        "embedding": True,
        "layers": {
            **{"query": True, "key": True, "value": True, "output": True, "gate": True, "up": True, "down": True},
            **{"attention_norm": False, "mlp_norm": False},  # stacked: [L, D], yet not decayed
        },
        "norm": False,
    }
    assert mask == matrices | ({} if tied else {"head": True})


def test_adamw_by_hand() -> None:
    options = OptimizerSettings(learning_rate=0.1, schedule="constant", weight_decay=0.2, beta1=0.9, beta2=0.99)
    optimizer = make_optimizer(options, decay={"head": True, "norm": False})
    params = {"head": jnp.array([[1.0, -2.0]]), "norm": jnp.array([3.0])}
    state, grads = optimizer.init(params), {"head": jnp.array([[0.5, 0.25]]), "norm": jnp.array([-1.0])}
    mean, square, update = np.zeros(3), np.zeros(3), jax.jit(optimizer.update)
    values, slopes = np.array([1.0, -2.0, 3.0]), np.array([0.5, 0.25, -1.0])
    for step in range(1, 4):
        directions, state = update(grads, state, params)
        params = jax.tree.map(lambda param, direction: param - 0.1 * direction, params, directions)
        mean, square = 0.9 * mean + 0.1 * slopes, 0.99 * square + 0.01 * slopes**2
        direction = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        values = values - 0.1 * (direction + 0.2 * values * [1, 1, 0])  # the norm is not decayed
    np.testing.assert_allclose([*params["head"][0], *params["norm"]], values, rtol=1e-5)


def test_sgd_is_plain() -> None:
    options = OptimizerSettings(name="sgd", learning_rate=0.1, schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(options, decay={"norm": False})
    params = {"norm": jnp.array([3.0])}
    directions, _ = optimizer.update({"norm": jnp.array([2.0])}, optimizer.init(params), params)
    np.testing.assert_array_equal(directions["norm"], [2.0])


def test_clipping() -> None:
    grads = {"norm": jnp.array([3.0, 4.0])}
    np.testing.assert_allclose(clip(grads, jnp.float32(5.0), 1.0)["norm"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clip(grads, jnp.float32(5.0), 6.0)["norm"], [3.0, 4.0])
    np.testing.assert_array_equal(clip(grads, jnp.float32(5.0), None)["norm"], [3.0, 4.0])
