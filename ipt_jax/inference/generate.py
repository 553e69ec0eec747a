"""Generation with a key-value cache: fixed shapes, continuous batching, one jitted loop.

Guarantees: a row's tokens depend only on its own prompt, seed, temperature and limit, not on the rest of the batch;
greedy tokens are those of the argmax without a cache. Row b's token at position i is at index i of its own cache lines.
Rows of any length share a batch, and a finished row's place goes to the next prompt. The loop returns to the host when
few enough rows are live to admit new ones. The cache has the model's dtype: 2 * L * rows * length * K * H numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipt_jax.model.attention import attend, dense
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import DecoderLayer, Mistral, Params, rms_norm, rope_tables, weights_of, with_weights
from ipt_jax.parallel.mesh import ROWS

TURNS = 64  # tokens per row before the loop returns to the host, which checks its queue
STOP_TURNS = 8  # the same, where the host also searches for stop strings


class Rows(NamedTuple):
    """The state of a batch of B rows that generate together; a place without a row is not live."""

    keys: tuple[Array, ...]  # per layer: [B, K, H, S], rotated; with S last a CPU reads them at twice the speed
    values: tuple[Array, ...]  # per layer: [B, K, S, H]
    output: Array  # [B, O] int32, the new tokens
    produced: Array  # [B] int32, how many of them
    last: Array  # [B] int32, the newest token, not yet in the cache
    position: Array  # [B] int32, its position
    limit: Array  # [B] int32, the most new tokens
    temperature: Array  # [B] float32, 0 is greedy
    seed: Array  # [B, 2] uint32
    live: Any  # [B] bool; the host may set it


def empty_rows(config: ModelConfig, rows: int, length: int, outputs: int, dtype: Any) -> Rows:
    """Places for `rows` rows of up to `length` tokens, of which up to `outputs` are new."""
    K, H = config.kv_heads, config.head_dim

    def cache(*line: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((rows, K, *line), dtype) for _ in range(config.layers))

    return Rows(
        keys=cache(H, length),
        values=cache(length, H),
        output=jnp.zeros((rows, outputs), jnp.int32),
        produced=jnp.zeros(rows, jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        position=jnp.zeros(rows, jnp.int32),
        limit=jnp.zeros(rows, jnp.int32),
        temperature=jnp.zeros(rows, jnp.float32),
        seed=jnp.zeros((rows, 2), jnp.uint32),
        live=jnp.zeros(rows, bool),
    )


class Arrivals(NamedTuple):
    """New prompts, padded on the right to one length; `place` B (one past the end) marks an unused entry."""

    tokens: Any  # [R, T] int32
    length: Any  # [R] int32
    place: Any  # [R] int32
    limit: Any  # [R] int32
    temperature: Any  # [R] float32
    seed: Any  # [R, 2] uint32


def prefill(params: Params, rows: Rows, arrivals: Arrivals, eos_id: Array, *, config: ModelConfig) -> Rows:
    """Runs the new prompts, writes their keys and values to their places and generates the first token of each."""
    model = Mistral.from_params(config, params)
    R, T = arrivals.tokens.shape
    places = arrivals.place
    tables = rope_tables(config, jnp.arange(T)[None])
    stacked = {name: param[...] for name, param in weights_of(model.layers).items()}

    def attend_and_keep(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        out = attend(q, k, v, window=config.sliding_window)
        return out, (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))  # [R, K, H, T], [R, K, T, H]

    def step(x: Array, weights: dict[str, Array]) -> tuple[Array, Any]:
        return with_weights(model.layers, weights)(x, tables, attend_and_keep)

    x = model.embed(arrivals.tokens)
    x, (keys, values) = jax.lax.scan(step, x, stacked)  # [L, R, K, H, T], [L, R, K, T, H]
    x = rms_norm(x[jnp.arange(R), arrivals.length - 1], model.norm[...], config.norm_eps)  # [R, D]
    first = sample(model.logits(x), arrivals.seed, jnp.zeros_like(arrivals.length), arrivals.temperature)

    def put(old: Array, new: Array) -> Array:
        return old.at[places].set(new, mode="drop")

    one = jnp.ones_like(first)
    return Rows(
        keys=tuple(line.at[places, :, :, :T].set(keys[i], mode="drop") for i, line in enumerate(rows.keys)),
        values=tuple(line.at[places, :, :T].set(values[i], mode="drop") for i, line in enumerate(rows.values)),
        output=rows.output.at[places, 0].set(first, mode="drop"),
        produced=put(rows.produced, one),
        last=put(rows.last, first),
        position=put(rows.position, arrivals.length),
        limit=put(rows.limit, arrivals.limit),
        temperature=put(rows.temperature, arrivals.temperature),
        seed=put(rows.seed, arrivals.seed),
        live=put(rows.live, _is_live(first, one, arrivals.limit, eos_id)),
    )


@functools.cache
def programs(mesh: Mesh | None, kv_heads: int) -> tuple[Callable[..., Rows], ...]:
    """`empty_rows`, `prefill` and `decode`, compiled; on a mesh, the caches are split by rows and heads."""
    compiled = partial(jax.jit, static_argnames="config", donate_argnames="rows")
    if mesh is None:
        return empty_rows, compiled(prefill), compiled(decode)
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    everywhere, cache = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(ROWS, heads))
    split = {"keys": cache, "values": cache}
    shardings: Any = Rows(**{name: split.get(name, everywhere) for name in Rows._fields})  # type: ignore[arg-type]
    start = jax.jit(empty_rows, static_argnums=range(5), out_shardings=shardings)
    return start, compiled(prefill, out_shardings=shardings), compiled(decode, out_shardings=shardings)


def _is_live(token: Array, produced: Array, limit: Array, eos_id: Array) -> Array:
    """`eos_id` [E] holds the ids that end a row, -1 for none."""
    return (produced < limit) & (token[..., None] != eos_id).all(-1)


def decode(params: Params, rows: Rows, eos_id: Array, enough: Array, turns: Array, *, config: ModelConfig) -> Rows:
    """Generates one token per live row and turn, until at most `enough` rows are live or `turns` turns are over."""
    model = Mistral.from_params(config, params)
    layers = model.unstacked_layers()  # once per call, not per turn

    def unfinished(state: tuple[Array, Rows]) -> Array:
        return (state[1].live.sum() > enough) & (state[0] < turns)

    def turn(state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        return state[0] + 1, _turn(model, layers, state[1], eos_id)

    return jax.lax.while_loop(unfinished, turn, (jnp.int32(0), rows))[1]


def _turn(model: Mistral, layers: list[DecoderLayer], rows: Rows, eos_id: Array) -> Rows:
    x = model.embed(rows.last[:, None])  # [B, 1, D]
    tables = rope_tables(model.config, rows.position[:, None])
    keys, values = [], []
    for layer, key_line, value_line in zip(layers, rows.keys, rows.values, strict=True):
        attend_cache = partial(_attend_cache, key_line, value_line, rows.position, model.config.sliding_window)
        x, (key_line, value_line) = layer(x, tables, attend_cache)
        keys.append(key_line)
        values.append(value_line)
    x = rms_norm(x[:, 0], model.norm[...], model.config.norm_eps)  # [B, D]
    token = sample(model.logits(x), rows.seed, rows.produced, rows.temperature)
    token = jnp.where(rows.live, token, rows.last)
    step = rows.live.astype(jnp.int32)
    write = jnp.where(rows.live, rows.produced, rows.output.shape[1])  # past the end: dropped
    return rows._replace(
        keys=tuple(keys),
        values=tuple(values),
        output=rows.output.at[jnp.arange(len(token)), write].set(token, mode="drop"),
        produced=rows.produced + step,
        last=token,
        position=rows.position + step,
        live=rows.live & _is_live(token, rows.produced + step, rows.limit, eos_id),
    )


def _attend_cache(
    keys: Array, values: Array, position: Array, window: int | None, q: Array, k: Array, v: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Writes one token's k, v [B, 1, K, H] to the cache lines, then attends over the keys that q [B, 1, N, H] sees."""
    B, _, N, H = q.shape
    K, S = values.shape[1:3]
    row = jnp.arange(B)
    keys = keys.at[row, :, :, position].set(k[:, 0])
    values = values.at[row, :, position].set(v[:, 0])
    age = position[:, None] - jnp.arange(S)[None]  # [B, S]
    mask = age >= 0 if window is None else (age >= 0) & (age < window)
    out = dense(q.reshape(B, K, N // K, 1, H), keys.swapaxes(2, 3), values, mask[:, None])  # [B, K, G, 1, H]
    return out.reshape(B, 1, N, H), (keys, values)


def sample(logits: Array, seed: Array, number: Array, temperature: Array) -> Array:
    """Token [B] from logits [B, V]; the draw for a row's n-th token depends on its seed and n alone."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        def one(words: Array, n: Array, row: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(words[0]), words[1]), n)
            return jax.random.categorical(key, row).astype(jnp.int32)

        warm = jnp.maximum(temperature, 1e-6)[:, None]
        return jnp.where(temperature > 0, jax.vmap(one)(seed, number, logits / warm), best)

    return jax.lax.cond((temperature > 0).any(), drawn, lambda: best)
