"""A plain JAX train step, written from scratch: the rival in benchmarks/train_step.py.

Plain einsums, a mask, full logits, optax.adamw, jitted with the state donated. The layers are scanned over stacked
weights (`loop=False`) or unrolled by a Python loop over a list of them (`loop=True`). Uses no code of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_step(
    shape: dict[str, int],
    tokens: np.ndarray,
    loop: bool,
    init: float,
    adamw: dict[str, float],
    compute_dtype: str = "float32",
) -> Callable[[], float]:
    """A function that trains on `tokens` [B, T] once and returns the loss before the update."""
    params = jax.jit(init_params, static_argnums=(0, 1, 2))(tuple(shape.items()), loop, init)
    optimizer = optax.adamw(**adamw)
    state = params, jax.jit(optimizer.init)(params)
    batch = jnp.asarray(tokens)

    @jax.jit(donate_argnums=0)
    def train(state: Any, tokens: Any) -> Any:
        params, moments = state

        def loss_in_dtype(params: Any) -> Any:
            return loss_of(jax.tree.map(lambda w: w.astype(compute_dtype), params), tokens)

        loss, grads = jax.value_and_grad(loss_in_dtype)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def step() -> float:
        nonlocal state
        state, loss = train(state, batch)
        return float(loss)

    return step


def init_params(fields: tuple[tuple[str, int], ...], loop: bool, init: float) -> dict[str, Any]:
    shape = dict(fields)
    V, D, L, F = (shape[name] for name in ("vocab_size", "hidden_size", "layers", "intermediate_size"))
    N, K, H = (shape[name] for name in ("q_heads", "kv_heads", "head_dim"))
    keys = iter(jax.random.split(jax.random.key(1), 7 * L + 2))

    def normal(*size: int) -> Any:
        return init * jax.random.normal(next(keys), size)

    layers = [
        dict(
            norm1=jnp.ones(D), wq=normal(D, N, H), wk=normal(D, K, H), wv=normal(D, K, H), wo=normal(N, H, D),
            norm2=jnp.ones(D), gate=normal(D, F), up=normal(D, F), down=normal(F, D),
        )
        for _ in range(L)
    ]  # fmt: skip
    stacked = layers if loop else jax.tree.map(lambda *each: jnp.stack(each), *layers)
    return {"embedding": normal(V, D), "layers": stacked, "norm": jnp.ones(D), "head": normal(D, V)}


def loss_of(params: dict[str, Any], tokens: Any) -> Any:
    T = tokens.shape[1]
    layers = params["layers"]
    H = (layers[0] if isinstance(layers, list) else layers)["wq"].shape[-1]
    angles = jnp.arange(T)[:, None] * 10_000.0 ** (-jnp.arange(0, H, 2) / H)  # [T, H/2]
    dtype = params["embedding"].dtype
    cos, sin = jnp.cos(angles)[:, None].astype(dtype), jnp.sin(angles)[:, None].astype(dtype)
    mask = jnp.tril(jnp.ones((T, T), bool))
    x = params["embedding"][tokens]  # [B, T, D]
    if isinstance(layers, list):
        for layer in layers:
            x = decoder_layer(x, layer, cos, sin, mask)
    else:
        x, _ = jax.lax.scan(lambda x, layer: (decoder_layer(x, layer, cos, sin, mask), None), x, layers)
    logits = (rms_norm(x, params["norm"]) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def decoder_layer(x: Any, w: dict[str, Any], cos: Any, sin: Any, mask: Any) -> Any:
    h = rms_norm(x, w["norm1"])
    q = rope(jnp.einsum("btd,dnh->btnh", h, w["wq"]), cos, sin)
    k = rope(jnp.einsum("btd,dkh->btkh", h, w["wk"]), cos, sin)
    v = jnp.einsum("btd,dkh->btkh", h, w["wv"])
    q = q.reshape(*k.shape[:3], -1, k.shape[3])  # [B, T, K, G, H]
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / k.shape[3] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    seen = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(*x.shape[:2], -1, k.shape[3])
    x = x + jnp.einsum("btnh,nhd->btd", seen, w["wo"])
    h = rms_norm(x, w["norm2"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def rms_norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def rope(x: Any, cos: Any, sin: Any) -> Any:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
