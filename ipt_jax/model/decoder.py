"""Mistral and Llama as Flax NNX modules: `Mistral` holds `DecoderLayer`, which holds `SelfAttention` and `FeedForward`.

Guarantees the arithmetic of transformers' MistralForCausalLM and LlamaForCausalLM (logits within 1e-4 in float32,
beyond the window too). Parameters are float32. `Execution.compute_dtype` is the dtype of matrix products and of the
residual stream. Norms, softmax and RoPE angles are always float32: bfloat16 loses the small differences in them.

Training, inference, import and export use these modules. Each `nnx.Param` carries its logical axes, initializer and
weight decay; `ipt_jax.parallel` maps the axes to a mesh. The parameters of all layers are stacked on a leading axis L
and the layers are scanned: one layer's slice is merged into a `DecoderLayer` per iteration. Jitted functions take the
parameters as a nested dict of arrays (`params_of`) and merge them with the modules (`Mistral.from_params`).

Letters, in this project always: B batch, T query position, S key position, D model, F feed-forward, N query heads,
K key-value heads, G = N / K, H head dimension, V vocabulary, L layers; of a step's rows: R all of them, A accumulation
steps, M rows of a micro-batch; of generation: O new tokens, C tokens of a continuation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ipt_jax.model.attention import AttentionKernel, attend
from ipt_jax.model.config import ModelConfig, RopeScaling

Axes = tuple[str | None, ...]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Params = dict[str, Any]  # nested dict of arrays: "embedding", "layers": {"query", ...}, "norm", "head"
Tables = tuple[Array, Array]  # of `rope_tables`
SAVEABLE = ("query", "key", "value", "output", "gate", "up")  # products that `remat` may name
SAVED_BY_NONE = ("dot_general", "exp", "pallas_call", "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")
SHALLOW = 8  # up to this many layers the scan is unrolled: no copies of stacked residuals, a fifth faster


@dataclass(frozen=True)
class Execution:
    """How a forward pass is computed. Changes rounding, speed and memory, never what is computed."""

    compute_dtype: Any = None  # None: the dtype of the parameters
    remat: str | tuple[str, ...] = "none"  # see `rematerialized`
    mlp_chunk: int | None = None  # tokens whose feed-forward products exist at a time; None: all
    # Layers written out instead of scanned: residuals are not copied into arrays [L, ...]; compilation takes longer.
    unroll: bool = False
    attention: AttentionKernel = attend
    constrain: Callable[[Array, Axes], Array] = lambda x, axes: x  # pins an activation to the mesh
    gather: Callable[[Array, Axes, Any], Array] = lambda w, axes, dtype: w.astype(dtype)  # where a weight is used


def _weight(shape: tuple[int, ...], axes: Axes, init: nnx.Initializer, decay: bool) -> nnx.Param[Any]:
    """A parameter without a value: shape, dtype, logical axes, initializer, and whether weight decay applies."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init, decay=decay)


def _matrix(config: ModelConfig, **dims: int) -> nnx.Param[Any]:
    return _weight(tuple(dims.values()), tuple(dims), nnx.initializers.normal(config.initializer_range), decay=True)


def _norm(**dims: int) -> nnx.Param[Any]:
    return _weight(tuple(dims.values()), tuple(dims), nnx.initializers.ones, decay=False)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig):
        L, D, N, K, H = config.layers, config.hidden_size, config.q_heads, config.kv_heads, config.head_dim
        self.query = _matrix(config, layers=L, embed=D, q_heads=N, head_dim=H)
        self.key = _matrix(config, layers=L, embed=D, kv_heads=K, head_dim=H)
        self.value = _matrix(config, layers=L, embed=D, kv_heads=K, head_dim=H)
        self.output = _matrix(config, layers=L, q_heads=N, head_dim=H, embed=D)

    def __call__(self, h: Array, tables: Tables, attend: Callable[..., tuple[Array, Any]]) -> tuple[Array, Any]:
        """h [B, T, D] -> [B, T, D]. `attend(q, k, v)` returns the attention and anything else (a cache), passed on."""
        q = checkpoint_name(rotate(project(h, self.query[...]), tables), "query")  # [B, T, N, H]
        k = checkpoint_name(rotate(project(h, self.key[...]), tables), "key")  # [B, T, K, H]
        v = checkpoint_name(project(h, self.value[...]), "value")  # [B, T, K, H]
        out, carried = attend(q, k, v)
        return checkpoint_name(project(out, self.output[...]), "output"), carried


class FeedForward(nnx.Module):
    """The gated block (SwiGLU)."""

    def __init__(self, config: ModelConfig):
        L, D, F = config.layers, config.hidden_size, config.intermediate_size
        self.gate = _matrix(config, layers=L, embed=D, mlp=F)
        self.up = _matrix(config, layers=L, embed=D, mlp=F)
        self.down = _matrix(config, layers=L, mlp=F, embed=D)

    def __call__(self, h: Array, chunk: int | None = None) -> Array:
        """h [B, T, D] -> [B, T, D], `chunk` of its B T tokens at a time (all when None)."""
        w_gate, w_up, w_down = (w[...].astype(h.dtype) for w in (self.gate, self.up, self.down))
        return gated_mlp(h, (w_gate, w_up, w_down), chunk)


class DecoderLayer(nnx.Module):
    """One layer. Constructed, it holds the stacked parameters of all layers; merged with a slice, those of one."""

    def __init__(self, config: ModelConfig):
        self.norm_eps = config.norm_eps
        self.attention_norm = _norm(layers=config.layers, norm=config.hidden_size)
        self.attention = SelfAttention(config)
        self.mlp_norm = _norm(layers=config.layers, norm=config.hidden_size)
        self.feed_forward = FeedForward(config)

    def __call__(
        self, x: Array, tables: Tables, attend: Callable[..., tuple[Array, Any]], mlp_chunk: int | None = None
    ) -> tuple[Array, Any]:
        """x [B, T, D] -> [B, T, D], and what else `attend` returned."""
        with jax.named_scope("attention"):
            h = rms_norm(x, self.attention_norm[...], self.norm_eps)
            seen, carried = self.attention(h, tables, attend)
            x = x + seen
        with jax.named_scope("feed_forward"):
            return x + self.feed_forward(rms_norm(x, self.mlp_norm[...], self.norm_eps), mlp_chunk), carried


class Mistral(nnx.Module):
    """The decoder. `Mistral(config)` declares its parameters; `rngs` draws them, `from_params` sets them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None = None):
        D, V = config.hidden_size, config.vocab_size
        self.config = config
        self.embedding = _matrix(config, vocab=V, embed=D)
        self.layers = DecoderLayer(config)
        self.norm = _norm(norm=D)
        if not config.tie_embeddings:
            self.head = _matrix(config, embed=D, vocab=V)
        if rngs is not None:
            drawn = init_params(config, rngs.params())
            for name, param in weights_of(self).items():
                param.set_value(drawn["layers"][name] if name in drawn["layers"] else drawn[name])

    @classmethod
    def from_params(cls, config: ModelConfig, params: Params) -> Mistral:
        """The model with these parameters, keys as `params_of` returns them."""
        others = {name: value for name, value in params.items() if name != "layers"}
        return with_weights(cls(config), {**others, **params["layers"]})

    def __call__(self, tokens: Array, *, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """float32 logits [B, T, V] of tokens [B, T]. Training computes its loss in chunks from `hidden` instead."""
        return self.logits(self.hidden(tokens, segment_ids=segment_ids, positions=positions))

    def hidden(
        self,
        tokens: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        execution: Execution = Execution(),  # noqa: B008 - frozen
    ) -> Array:
        """Final hidden states [B, T, D] of tokens [B, T]. Without segment ids, a query sees all earlier tokens."""
        tables = rope_tables(self.config, np.arange(tokens.shape[1])[None] if positions is None else positions)
        layers = weights_of(self.layers)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return execution.attention(q, k, v, window=self.config.sliding_window, segment_ids=segment_ids), None

        def prepare(name: str, w: Array, dtype: Any) -> Array:
            """Casts before the gather, which halves the bytes sent; norms stay float32."""
            axes = layers[name].axes
            return execution.gather(w, axes[1:], jnp.float32 if "norm" in axes else dtype)

        def step(x: Array, weights: dict[str, Array]) -> tuple[Array, None]:
            layer = with_weights(self.layers, {name: prepare(name, w, x.dtype) for name, w in weights.items()})
            x, _ = layer(x, tables, attend, execution.mlp_chunk)
            return execution.constrain(x, ("batch", "length", None)), None

        x = self.embed(tokens, execution.compute_dtype)  # [B, T, D]
        x = execution.constrain(x, ("batch", "length", None))
        unroll = self.config.layers if execution.unroll or self.config.layers <= SHALLOW else 1
        step = rematerialized(step, execution.remat, prevent_cse=execution.unroll)
        x, _ = jax.lax.scan(step, x, {name: param[...] for name, param in layers.items()}, unroll=unroll)
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def embed(self, tokens: Array, dtype: Any = None) -> Array:
        """[B, T, D] of tokens [B, T], in `dtype` (None: that of the parameters)."""
        with jax.named_scope("embedding"):
            return _look_up(self.config.vocab_size, self.embedding[...], tokens).astype(dtype or self.norm.dtype)

    def output_projection(self) -> Array:
        """[D, V]: the head, or the transposed embedding where the two are tied."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def logits(self, hidden: Array) -> Array:
        """float32 [..., V] of hidden states [..., D]. The product has the dtype of `hidden` and sums in float32."""
        head = self.output_projection().astype(hidden.dtype)
        return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)

    def unstacked_layers(self) -> list[DecoderLayer]:
        """The layers as modules of their own, each with its slice of the stacked parameters."""
        stacked = weights_of(self.layers)
        return [
            with_weights(self.layers, {name: param[i] for name, param in stacked.items()})
            for i in range(self.config.layers)
        ]


# ---- parameters as a nested dict


def weights_of(module: nnx.Module) -> dict[str, nnx.Param[Any]]:
    """The parameters of a module and of those in it, by name. No two modules of a model use one name."""
    return {str(path[-1]): param for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def with_weights(module: ModuleT, weights: dict[str, Any]) -> ModuleT:
    """The same module with these parameters, by name."""
    graph, state = nnx.split(module)
    values = {path: weights[str(path[-1])] for path, _ in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.traversals.unflatten_mapping(values))


def params_of(model: Mistral) -> Params:
    """The parameters of a model: what checkpoints hold and jitted functions take."""
    return _nested(model, lambda param: param[...])


def logical_axes(config: ModelConfig) -> Params:
    """Axis names of every parameter."""
    return _nested(Mistral(config), lambda param: param.axes)


def decay_mask(config: ModelConfig) -> Params:
    """Whether weight decay applies, for every parameter."""
    return _nested(Mistral(config), lambda param: param.decay)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shape and dtype of every parameter."""
    return _nested(Mistral(config), lambda param: jax.ShapeDtypeStruct(param.shape, dtype))


def init_params(config: ModelConfig, key: Array) -> Params:
    """New float32 parameters. Each tensor has a key of its own."""
    declared, tree = jax.tree.flatten(_nested(Mistral(config), lambda param: param), is_leaf=_is_param)
    keys = jax.random.split(key, len(declared))
    drawn = [param.init(one, param.shape, jnp.float32) for param, one in zip(declared, keys, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Param)


def _nested(model: Mistral, read: Callable[[nnx.Param[Any]], Any]) -> Params:
    """`read` of every parameter, those of the layers under "layers"."""
    layers = {name: read(param) for name, param in weights_of(model.layers).items()}
    others = {name: read(param) for name, param in weights_of(model).items() if name not in layers}
    return {**others, "layers": layers}


def rematerialized(
    step: Callable[..., Any], remat: str | tuple[str, ...], prevent_cse: bool = False
) -> Callable[..., Any]:
    """`step` of one layer, with what it keeps for its backward pass.

    none: products and attention. dots: products with weights. A tuple: the products of these names. full: its input.
    Norms, RoPE and the activation are recomputed in all of them. Gathered weights are never kept, which would undo
    FSDP: the backward pass gathers them again.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        policy = _saved_by_none
    elif remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    elif remat == "full":
        policy = policies.nothing_saveable
    else:
        assert set(remat) <= set(SAVEABLE), f"remat {remat}; known: {SAVEABLE}"
        policy = policies.save_only_these_names(*remat)
    return jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)


def _saved_by_none(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in SAVED_BY_NONE


# ---- functions of arrays


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


def project(x: Array, w: Array) -> Array:
    """x [B, T, *inputs] times w [*inputs, *outputs] -> [B, T, *outputs], as one product of two matrices.

    Equal to the einsum, but its gradients are plain matrix products too, where XLA otherwise transposes what it fuses:
    half the time of an MLP's forward and backward pass on a CPU.
    """
    batch, inputs = x.shape[:2], x.shape[2:]
    flat = x.reshape(math.prod(batch), -1) @ w.astype(x.dtype).reshape(math.prod(inputs), -1)
    return flat.reshape(*batch, *w.shape[len(inputs) :])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """[H/2] float32 radians per position, highest frequency first."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    return frequencies if config.rope_scaling is None else _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated linearly in turns."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions: Array | np.ndarray) -> Tables:
    """What `rotate` multiplies with at `positions` [B, T]: [c, c] and [-s, s] of the angles, float32 [B, T, H].

    Angles are float32 whatever the compute dtype: at position 4,096 a bfloat16 angle is off by several radians.
    Tables of NumPy positions are constants of the program; otherwise XLA computes the angles in every rotation.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    angles = positions[..., None].astype(np.float32) * inverse_frequencies(config)  # [B, T, H/2]
    cos, sin = xp.cos(angles), xp.sin(angles)
    return jnp.asarray(xp.concatenate([cos, cos], -1)), jnp.asarray(xp.concatenate([-sin, sin], -1))


def rotate(x: Array, tables: Tables) -> Array:
    """Rotates x [B, T, N, H] by its positions; the products are float32, the result has x's dtype.

    Hugging Face's half-split layout: dimension i is paired with i + H/2, which both directions of `ipt_jax.hf` rely on.
    Both halves at once, with x rolled by H/2: a TPU pads the last dim of each array to 128 lanes, so that a half
    takes as much memory as the full array.
    """
    cos, sin = (table[:, :, None, :] for table in tables)  # [B, T, 1, H]
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


Weights = tuple[Array, Array, Array]  # gate [D, F], up [D, F], down [F, D]


def gated_mlp(h: Array, weights: Weights, chunk: int | None = None) -> Array:
    """h [B, T, D] -> [B, T, D], `chunk` of its B T tokens at a time (all when None).

    In chunks, only one chunk's products [n, F] exist at a time, forward and backward: the largest activations of a
    layer stop growing with the batch. The backward pass computes a chunk's products again, which a layer that keeps
    only its input does anyway. The weights' gradients are summed over chunks in float32.
    """
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


def _in_chunks_backward(residuals: tuple[Array, Weights], grad: Array) -> tuple[Array, Weights]:
    h, weights = residuals

    def one(total: Weights, chunk: tuple[Array, Array]) -> tuple[Weights, Array]:
        part, part_grad = chunk
        _, pull = jax.vjp(_gated, part, weights)
        back, weight_grads = pull(part_grad)
        return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, weight_grads), back

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    total, back = jax.lax.scan(one, zeros, (h, grad))
    return back, jax.tree.map(lambda sum_, w: sum_.astype(w.dtype), total, weights)


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)
