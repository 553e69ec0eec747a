"""The learning-rate schedule, AdamW (or plain SGD), gradient clipping, and which parameters are decayed.

Guarantees that every parameter is named in the decay table: one that is not is an error, never a default. Moments are
float32. Clipping scales the whole gradient by its global norm before the optimizer sees it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ipt_jax.config import OptimizerSettings
from ipt_jax.parallel.rules import param_name

DECAYED = {
    "embedding": True,
    "head": True,
    "norm": False,
    "layers.attention_norm": False,
    "layers.query": True,
    "layers.key": True,
    "layers.value": True,
    "layers.output": True,
    "layers.mlp_norm": False,
    "layers.gate": True,
    "layers.up": True,
    "layers.down": True,
}


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay pulls to zero."""

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        name = param_name(path)
        assert name in DECAYED, f"parameter {name} stands in no row of the decay table"
        return DECAYED[name]

    return jax.tree_util.tree_map_with_path(decayed, params)


def learning_rate(settings: OptimizerSettings, step: Array | int, total_steps: int) -> Array:
    """The rate of step `step` (from 0). The first step of a warm-up already moves; the last step has the least rate."""
    done = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (done + 1) / max(1, settings.warmup_steps))
    span = max(1, total_steps - 1 - settings.warmup_steps)
    progress = jnp.clip((done - settings.warmup_steps) / span, 0.0, 1.0)
    shape = {
        "constant": jnp.ones(()),
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    }[settings.schedule]
    if settings.schedule != "constant":
        shape = settings.min_ratio + (1.0 - settings.min_ratio) * shape
    return settings.learning_rate * warmup * shape


def make_optimizer(settings: OptimizerSettings, total_steps: int) -> optax.GradientTransformation:
    """What turns clipped gradients into updates."""
    direction = {
        "adamw": optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps, mu_dtype=jnp.float32),
        "sgd": optax.identity(),
    }[settings.name]
    return optax.chain(
        direction,
        optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(lambda step: learning_rate(settings, step, total_steps)),
    )


def clip(grads: Any, norm: Array, limit: float | None) -> Any:
    """`grads` of global norm `norm`, scaled down to norm `limit` where they exceed it."""
    if limit is None:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda grad: grad * scale, grads)
