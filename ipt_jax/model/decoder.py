"""Mistral and Llama: one decoder for both families, layers stacked on a leading axis and scanned.

Guarantees the arithmetic of transformers' MistralForCausalLM and LlamaForCausalLM (logits within 1e-4 in float32,
beyond the window too). Parameters are float32; `compute_dtype` is what matrix products and the residual stream use;
norms, softmax and RoPE angles are float32 always, since bfloat16 loses the small differences they live on. Says
nothing about devices: parameters carry logical axis names that ipt_jax.parallel maps to a mesh.

Letters, in this project always: B batch, T query position, S key position, D model, F feed-forward, N query heads,
K key-value heads, G = N / K, H head dimension, V vocabulary, L layers; of a step's rows: R all of them, A accumulation
steps, M rows of a micro-batch; of generation: O new tokens, C tokens of a continuation.

Rotary position embedding in Hugging Face's half-split layout, with Llama-3.1's frequency scaling.

Angles are float32 whatever the compute dtype: at position 4,096 a bfloat16 angle is wrong by several radians.
The layout pairs dimension i with i + H/2 (not 2i with 2i + 1); both directions of `ipt_jax.hf` rely on it.

The gated feed-forward block (SwiGLU), whole or in chunks of tokens.

In chunks, only one chunk's products [n, F] exist at a time, forward and backward: the largest activations of a layer
stop growing with the batch. The backward pass computes a chunk's products again, which a layer that keeps nothing but
its input would do anyway; the weights' gradients are added up over chunks in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ipt_jax.model.attention import Attention, attend
from ipt_jax.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """[H/2] float32 radians per position, highest frequency first."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    return frequencies if config.rope_scaling is None else _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly in turns."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions: Array | np.ndarray) -> tuple[Array, Array]:
    """What `rotate` multiplies with at `positions` [B, T]: [c, c] and [-s, s] of the angles, float32 [B, T, H].

    Tables of NumPy positions are constants of the program: XLA else works the angles out again in every rotation.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    angles = positions[..., None].astype(np.float32) * inverse_frequencies(config)  # [B, T, H/2]
    cos, sin = xp.cos(angles), xp.sin(angles)
    return jnp.asarray(xp.concatenate([cos, cos], -1)), jnp.asarray(xp.concatenate([-sin, sin], -1))


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates x [B, T, N, H] by its positions; the products are float32, the result has x's dtype.

    Both halves at once, x turned by half of H beside x: a TPU pads the last dim of each array to 128 lanes, so halves
    would take as much room as the whole.
    """
    cos, sin = (table[:, :, None, :] for table in tables)  # [B, T, 1, H]
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


Weights = tuple[Array, Array, Array]  # gate [D, F], up [D, F], down [F, D]


def gated_mlp(h: Array, weights: Weights, chunk: int | None = None) -> Array:
    """h [B, T, D] -> [B, T, D], `chunk` of its B T tokens at a time (all when None)."""
    tokens = h.size // h.shape[-1]
    flat = h.reshape(tokens, -1)
    if chunk is None or chunk == tokens:
        return _gated(flat, weights).reshape(h.shape)
    assert tokens % chunk == 0, f"chunks of {chunk} tokens do not divide {tokens}"
    return _in_chunks(flat.reshape(-1, chunk, h.shape[-1]), weights).reshape(h.shape)


def _gated(h: Array, weights: Weights) -> Array:
    """h [n, D] -> [n, D]; the activation is float32 between the products."""
    w_gate, w_up, w_down = weights
    gate = checkpoint_name(h @ w_gate, "gate")  # [n, F]
    up = checkpoint_name(h @ w_up, "up")
    gated = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return gated.astype(h.dtype) @ w_down


@jax.custom_vjp
def _in_chunks(h: Array, weights: Weights) -> Array:
    """h [C, n, D]"""
    return jax.lax.map(functools.partial(_gated, weights=weights), h)


def _in_chunks_forward(h: Array, weights: Weights) -> tuple[Array, Any]:
    return _in_chunks(h, weights), (h, weights)


def _in_chunks_backward(kept: tuple[Array, Weights], grad: Array) -> tuple[Array, Weights]:
    h, weights = kept

    def one(total: Weights, chunk: tuple[Array, Array]) -> tuple[Weights, Array]:
        part, part_grad = chunk
        _, pull = jax.vjp(_gated, part, weights)
        back, weight_grads = pull(part_grad)
        return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, weight_grads), back

    nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    total, back = jax.lax.scan(one, nothing, (h, grad))
    return back, jax.tree.map(lambda sum_, w: sum_.astype(w.dtype), total, weights)


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


SAVEABLE = ("query", "key", "value", "output", "gate", "up")  # products that `remat` may name
KEPT = ("dot_general", "exp", "pallas_call", "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")
SHALLOW = 8  # up to so many layers the scan is unrolled: no copies in and out of stacked residuals, a fifth faster

Axes = tuple[str | None, ...]
Constrain = Callable[[Array, Axes], Array]  # pins an activation to the mesh
Gather = Callable[[Array, Axes], Array]  # makes a weight whole where it is used
Initializer = Callable[..., Array]
Tables = tuple[Array, Array]


@dataclass(frozen=True)
class Weight:
    """One row of the parameter table."""

    shape: tuple[int, ...]
    axes: Axes
    init: Initializer


def weights(config: ModelConfig) -> dict[str, Any]:
    """The parameter table: shape, logical axes and initializer of every tensor, as the nested dict the model holds."""
    L, D, F, V = config.layers, config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H = config.q_heads, config.kv_heads, config.head_dim
    normal, ones = nnx.initializers.normal(config.initializer_range), nnx.initializers.ones
    table: dict[str, Any] = {
        "embedding": Weight((V, D), ("vocab", "embed"), normal),
        "layers": {
            "attention_norm": Weight((L, D), ("layers", "norm"), ones),
            "query": Weight((L, D, N, H), ("layers", "embed", "q_heads", "head_dim"), normal),
            "key": Weight((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), normal),
            "value": Weight((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), normal),
            "output": Weight((L, N, H, D), ("layers", "q_heads", "head_dim", "embed"), normal),
            "mlp_norm": Weight((L, D), ("layers", "norm"), ones),
            "gate": Weight((L, D, F), ("layers", "embed", "mlp"), normal),
            "up": Weight((L, D, F), ("layers", "embed", "mlp"), normal),
            "down": Weight((L, F, D), ("layers", "mlp", "embed"), normal),
        },
        "norm": Weight((D,), ("norm",), ones),
    }
    if not config.tie_embeddings:
        table["head"] = Weight((D, V), ("embed", "vocab"), normal)
    return table


def _map_weights(function: Callable[[Weight], Any], config: ModelConfig) -> dict[str, Any]:
    return jax.tree.map(function, weights(config), is_leaf=lambda node: isinstance(node, Weight))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Axis names of every parameter, in the structure of `params_of(model)`."""
    return _map_weights(lambda weight: weight.axes, config)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shape and dtype of every parameter, in the structure of `params_of(model)`."""
    return _map_weights(lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype), config)


def init_params(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Fresh float32 parameters; each tensor draws from its own key."""
    table, tree = jax.tree.flatten(weights(config), is_leaf=lambda node: isinstance(node, Weight))
    keys = jax.random.split(key, len(table))
    drawn = [row.init(one, row.shape, jnp.float32) for row, one in zip(table, keys, strict=True)]
    return jax.tree.unflatten(tree, drawn)


class Mistral(nnx.Module):
    """The decoder. Its parameters are the nested dict of `weights(config)`, each an nnx.Param with logical `axes`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None = None, params: dict[str, Any] | None = None):
        self.config = config
        if params is None:
            assert rngs is not None, "give rngs for fresh parameters, or the parameters themselves"
            params = init_params(config, rngs.params())
        axes = logical_axes(config)
        for name, value in params.items():
            setattr(self, name, _as_params(value, axes[name]))

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as a plain nested dict of arrays."""
        return params_of(self)

    def hidden(
        self,
        tokens: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        compute_dtype: Any = jnp.float32,
        remat: str | tuple[str, ...] = "none",
    ) -> Array:
        """Final hidden states [B, T, D] of tokens [B, T]. Without segment ids documents of a row see each other."""
        return forward(
            self.params, self.config, tokens, segment_ids=segment_ids, positions=positions,
            compute_dtype=compute_dtype, remat=remat,
        )  # fmt: skip

    def head(self) -> Array:
        """The output projection [D, V]; the transposed embedding where the two are tied."""
        return head_of(self.params, self.config)

    def logits(self, hidden: Array) -> Array:
        """float32 [B, T, V]; large: training computes its loss in chunks from `head()` instead."""
        return logits_of(self.params, self.config, hidden)


def _as_params(value: Any, axes: Any) -> Any:
    if isinstance(value, dict):
        return nnx.Dict({name: _as_params(inner, axes[name]) for name, inner in value.items()})
    return nnx.Param(value, axes=axes)


def params_of(model: Mistral) -> dict[str, Any]:
    """The parameters of a model as a plain nested dict of arrays: what checkpoints hold and `forward` takes."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def head_of(params: dict[str, Any], config: ModelConfig) -> Array:
    """[D, V]"""
    return params["embedding"].T if config.tie_embeddings else params["head"]


def logits_of(params: dict[str, Any], config: ModelConfig, hidden: Array) -> Array:
    """float32 [..., V] of hidden states [..., D]; the product takes the hidden states' dtype and sums in float32."""
    head = head_of(params, config).astype(hidden.dtype)
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def forward(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions: Array | None = None,
    compute_dtype: Any = jnp.float32,
    remat: str | tuple[str, ...] = "none",
    mlp_chunk: int | None = None,
    unroll: bool = False,
    attention: Attention = attend,
    constrain: Constrain = lambda x, axes: x,
    gather: Gather = lambda w, axes: w,
) -> Array:
    """`Mistral.hidden` as a pure function of the parameters, and of the mesh through its last three arguments.

    `unroll` writes the layers out instead of scanning them. What the backward pass keeps is then not copied into and
    out of arrays [L, ...]; compilation takes longer.
    """
    tables = rope_tables(config, np.arange(tokens.shape[1])[None] if positions is None else positions)
    axes = logical_axes(config)["layers"]

    def see(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attention(q, k, v, window=config.sliding_window, segment_ids=segment_ids), None

    def step(x: Array, layer: dict[str, Array]) -> tuple[Array, None]:
        layer = {name: gather(w.astype(_dtype_of(name, x)), axes[name][1:]) for name, w in layer.items()}
        x, _ = decoder_layer(layer, config, x, tables, see, mlp_chunk)
        return constrain(x, ("batch", "length", None)), None

    x = embed(params, tokens, compute_dtype)  # [B, T, D]
    x = constrain(x, ("batch", "length", None))
    at_once = config.layers if unroll or config.layers <= SHALLOW else 1
    x, _ = jax.lax.scan(rematerialized(step, remat, unroll), x, params["layers"], unroll=at_once)
    return rms_norm(x, params["norm"], config.norm_eps)


def rematerialized(
    step: Callable[..., Any], remat: str | tuple[str, ...], prevent_cse: bool = False
) -> Callable[..., Any]:
    """What a layer keeps for its backward pass: products and attention, products, the named ones, or its input alone.

    What is cheap to compute again (norms, RoPE, the activation) is, in all of them. Whole weights are never kept: they
    would undo FSDP; the backward pass gathers them again.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        policy = _products_and_attention
    elif remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    elif remat == "full":
        policy = policies.nothing_saveable
    else:
        assert set(remat) <= set(SAVEABLE), f"remat {remat}; known: {SAVEABLE}"
        policy = policies.save_only_these_names(*remat)
    return jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)


def _products_and_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in KEPT


def _dtype_of(name: str, x: Array) -> Any:
    """Matrices take x's dtype before they are gathered, which halves the bytes that move; norms stay float32."""
    return jnp.float32 if name.endswith("norm") else x.dtype


def embed(params: dict[str, Any], tokens: Array, compute_dtype: Any) -> Array:
    """[B, T, D]"""
    table = params["embedding"]
    with jax.named_scope("embedding"):
        return _look_up(table.shape[0], table, tokens).astype(compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(vocab_size: int, table: Array, tokens: Array) -> Array:
    """table[tokens]; the gradient is summed in float32: a frequent token adds up thousands of rows."""
    return table[tokens]


def _look_up_forward(vocab_size: int, table: Array, tokens: Array) -> tuple[Array, Array]:
    return table[tokens], tokens


def _look_up_backward(vocab_size: int, tokens: Array, grad: Array) -> tuple[Array, None]:
    total = jnp.zeros((vocab_size, grad.shape[-1]), jnp.float32).at[tokens].add(grad.astype(jnp.float32))
    return total.astype(grad.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def decoder_layer(
    layer: dict[str, Array],
    config: ModelConfig,
    x: Array,
    tables: Tables,
    see: Callable[..., tuple[Array, Any]],
    mlp_chunk: int | None = None,
) -> tuple[Array, Any]:
    """One layer on x [B, T, D]. `see(q, k, v)` is the attention; what else it returns (a cache) is handed through."""
    w = {name: value.astype(x.dtype) for name, value in layer.items()}
    with jax.named_scope("attention"):
        h = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q = checkpoint_name(rotate(project(h, w["query"]), tables), "query")  # [B, T, N, H]
        k = checkpoint_name(rotate(project(h, w["key"]), tables), "key")  # [B, T, K, H]
        v = checkpoint_name(project(h, w["value"]), "value")  # [B, T, K, H]
        seen, carried = see(q, k, v)
        x = x + checkpoint_name(project(seen, w["output"]), "output")
    with jax.named_scope("feed_forward"):
        h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
        return x + gated_mlp(h, (w["gate"], w["up"], w["down"]), mlp_chunk), carried


def project(x: Array, w: Array) -> Array:
    """x [B, T, *inputs] times w [*inputs, *outputs] -> [B, T, *outputs], as one product of two matrices.

    Equal to the einsum, but its gradients are plain matrix products too, where XLA else transposes what it fuses:
    half the time of an MLP's forward and backward pass on a CPU.
    """
    batch, inputs = x.shape[:2], x.shape[2:]
    flat = x.reshape(math.prod(batch), -1) @ w.reshape(math.prod(inputs), -1)
    return flat.reshape(*batch, *w.shape[len(inputs) :])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)
