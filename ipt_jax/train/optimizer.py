"""The learning-rate schedule, AdamW (or plain SGD), and gradient clipping.

Weight decay applies to the parameters that the model declares with `decay=True`. Moments are float32. Clipping scales
all gradients by their global norm before the optimizer sees them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ipt_jax.config import OptimizerSettings


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


def make_optimizer(settings: OptimizerSettings, total_steps: int, decay: Any) -> optax.GradientTransformation:
    """What turns clipped gradients into updates. `decay` is a tree of bool, one per parameter."""
    direction = {
        "adamw": optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps, mu_dtype=jnp.float32),
        "sgd": optax.identity(),
    }[settings.name]
    return optax.chain(
        direction,
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
        optax.scale_by_learning_rate(lambda step: learning_rate(settings, step, total_steps)),
    )


def clip(grads: Any, norm: Array, limit: float | None) -> Any:
    """`grads` of global norm `norm`, scaled down to norm `limit` where they exceed it."""
    if limit is None:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda grad: grad * scale, grads)
