"""The decoder's masks against literal ones, documents of a row against each other, parameters against their table.

The numbers of transformers: tests/hf/test_transformers.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt_jax.core.errors import UserError
from ipt_jax.hf.config import resolve_model
from ipt_jax.model import attention
from ipt_jax.model.config import PRESETS, ModelConfig, ModelSettings, param_count
from ipt_jax.model.decoder import Execution, Mistral, abstract_params, init_params, logical_axes, params_of

SMALL = ModelConfig(
    vocab_size=61, hidden_size=32, layers=2, q_heads=4, kv_heads=2, head_dim=12, intermediate_size=40,
    initializer_range=0.3,
)  # fmt: skip


def test_window_of_three_sees_three_keys() -> None:
    mask = attention.visible(jnp.arange(5), jnp.arange(5), 3)
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_segments_meet_the_window() -> None:
    segments = jnp.array([[1, 1, 2, 2, 2]])
    mask = attention.visible(jnp.arange(5), jnp.arange(5), 2, (segments, segments))
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None, segments: Any) -> np.ndarray:
    repeats = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, 2), np.repeat(v, repeats, 2)
    rows = np.arange(q.shape[1])
    mask = (rows[None] <= rows[:, None]) & (rows[:, None] - rows[None] < (window or len(rows)))
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[3])
    scores = np.where(np.broadcast_to(mask, (len(q), *mask.shape[-2:]))[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@settings(max_examples=12)
@given(
    length=st.sampled_from([1, 48, 64, 65, 513, 700]),
    window=st.sampled_from([None, 1, 8, 100, 600]),
    documents=st.integers(0, 4),
)
def test_attention_of_any_length_equals_the_plain_one(length: int, window: int | None, documents: int) -> None:
    draw = np.random.default_rng(length)
    q, k, v = (draw.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.sort(draw.integers(0, documents, (2, length)), axis=1) if documents else None
    run = jax.jit(attention.attend, static_argnames="window")
    ours = run(q, k, v, window=window, segment_ids=segments)
    np.testing.assert_allclose(ours, plain_attention(q, k, v, window, segments), atol=2e-6)


@pytest.mark.parametrize("block", [attention.BLOCK, 16])  # 16: the row is longer than a block
def test_documents_of_a_row_do_not_leak(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    params = init_params(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 48), 0, 61)
    other = tokens.at[:, 10:30].set((tokens[:, 10:30] + 7) % 61)  # the middle document, another text
    segments = jnp.repeat(jnp.array([[1, 2, 3]]), jnp.array([10, 20, 18]), axis=1)
    positions = jnp.concatenate([jnp.arange(10), jnp.arange(20), jnp.arange(18)])[None]
    outside = (segments != 2)[..., None]

    def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = Mistral.from_params(SMALL, params)
        logits = jnp.where(outside, model(tokens, segment_ids=segments, positions=positions), 0.0)
        return jnp.square(logits).sum(), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = run(params, tokens)
    (_, others), other_grads = run(params, other)
    np.testing.assert_array_equal(logits, others)
    # The changed document's own embedding rows get gradients of exactly zero, so the whole tree must be equal.
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


def test_without_segments_documents_do_see_each_other() -> None:
    params = init_params(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 48), 0, 61)
    run = jax.jit(lambda tokens: Mistral.from_params(SMALL, params).hidden(tokens))
    assert jnp.abs(run(tokens) - run(tokens.at[0, 0].add(1)))[0, -1].max() > 1e-6


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_alone(remat: str) -> None:
    params = init_params(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 61)

    def loss(params: Any, remat: str) -> jax.Array:
        return jnp.square(Mistral.from_params(SMALL, params).hidden(tokens, execution=Execution(remat=remat))).mean()

    run = jax.jit(jax.grad(loss), static_argnums=1)
    kept, again = (run(params, how) for how in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, again)


def test_bfloat16_stays_near_float32() -> None:
    params = init_params(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 61)
    run = jax.jit(
        lambda dtype: Mistral.from_params(SMALL, params).hidden(tokens, execution=Execution(compute_dtype=dtype)),
        static_argnums=0,
    )
    half, full = run(jnp.bfloat16), run(jnp.float32)
    assert half.dtype == jnp.bfloat16
    assert jnp.abs(half - full).max() / jnp.abs(full).max() < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_declares_shape_axes_and_count(tied: bool) -> None:
    config = SMALL.model_copy(update={"tie_embeddings": tied})
    model = Mistral(config, rngs=nnx.Rngs(0))
    params, axes = params_of(model), logical_axes(config)
    assert sum(value.size for value in jax.tree.leaves(params)) == param_count(config)
    assert jax.tree.map(lambda value: value.shape, params) == jax.tree.map(lambda s: s.shape, abstract_params(config))
    jax.tree.map(lambda value, names: None if value.ndim == len(names) else pytest.fail(str(names)), params, axes)
    declared = {variable.get_metadata()["axes"] for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert declared == set(jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple)))
    assert model.logits(model.hidden(jnp.zeros((1, 3), jnp.int32))).shape == (1, 3, 61)


def test_presets_have_the_sizes_of_the_paper() -> None:
    sizes = {name: param_count(resolve_model(ModelSettings(preset=name), 259)) for name in PRESETS}
    assert round(sizes["mistral-500m"] / 1e6, 1) == 567.9
    assert round(sizes["mistral-1.3b"] / 1e6, 1) == 1347.5
    assert round(sizes["mistral-7b"] / 1e9, 2) == 7.24
    assert round(sizes["llama3-8b"] / 1e9, 2) == 8.03
    assert round(sizes["smollm2-135m"] / 1e6, 1) == 134.5


def test_model_block_is_checked() -> None:
    tiny = resolve_model(ModelSettings(preset="tiny", sliding_window=64), 777, bos_id=5, eos_id=6)
    assert (tiny.vocab_size, tiny.sliding_window, tiny.bos_id, tiny.eos_id) == (777, 64, 5, 6)
    wider = resolve_model(ModelSettings(preset="mistral-1.3b", vocab_size=50_000), 50_000)
    assert wider == resolve_model(ModelSettings(preset="mistral-1.3b")).model_copy(update={"vocab_size": 50_000})
    with pytest.raises(UserError, match="set model.vocab_size to 50000"):
        resolve_model(ModelSettings(preset="mistral-1.3b"), 50_000)
    with pytest.raises(UserError, match="hidden_size, layers, .* are missing"):
        resolve_model(ModelSettings(vocab_size=10))
    with pytest.raises(UserError, match="multiple of kv_heads"):
        resolve_model(ModelSettings(preset="tiny", kv_heads=3), 100)
    with pytest.raises(ValueError, match="there are tiny"):
        ModelSettings(preset="mistral-1b")


@pytest.mark.parametrize(
    ("device", "seq_len", "cross_document", "dtype", "kernel", "reason"),
    [
        ("cpu", 2048, "allow", "float32", "xla", "the only kernel"),
        ("NVIDIA H100 80GB HBM3", 8192, "allow", "bfloat16", "cudnn", "window 4096, documents see each other"),
        ("NVIDIA H100 80GB HBM3", 2048, "block", "bfloat16", "cudnn", "no window inside a row, documents separated"),
        ("NVIDIA H100 80GB HBM3", 2048, "allow", "float32", "xla", "compute_dtype is float32"),
        ("TPU v5 lite", 8192, "block", "bfloat16", "splash", "window 4096, documents separated"),
        ("TPU v5 lite", 2000, "allow", "bfloat16", "xla", "multiple of 128 tokens, seq_len is 2000"),
    ],
)
def test_attention_is_chosen_with_a_reason(
    device: str, seq_len: int, cross_document: str, dtype: str, kernel: str, reason: str
) -> None:
    config = resolve_model(ModelSettings(preset="mistral-7b"))
    chosen, why = attention.choose_attention(device, config, seq_len, cross_document, dtype)
    assert chosen == kernel and reason in why
