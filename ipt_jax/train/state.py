"""The train state: step, float32 parameters, optimizer state; its shapes, where it lies, and how it begins.

Guarantees equal initial parameters on every mesh (each tensor is drawn from its own key, inside jit, straight into its
shards: no device ever holds the whole model), and moments that lie where their parameters lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipt_jax.model.config import ModelConfig
from ipt_jax.model.mistral import abstract_params, init_params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: Any  # int32 array: steps done
    params: dict[str, Any]
    optimizer: Any


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without any memory."""
    params = abstract_params(config)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, params: dict[str, Any], mesh: Mesh
) -> TrainState:
    """Shardings of the whole state from those of the parameters; counters are whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, state.optimizer, params, transform_non_params=lambda _: whole
    )
    return TrainState(whole, params, moments)


def fresh_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, shardings: TrainState, seed: int
) -> TrainState:
    """A state with freshly drawn parameters."""

    def draw() -> TrainState:
        params = init_params(config, jax.random.key(seed))
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    # run once: LLVM's highest level takes four seconds to compile this on a CPU, its first one
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    return jax.jit(draw, out_shardings=shardings, compiler_options=options)()


def state_from_params(
    params: dict[str, Any], optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """A state at step 0 with given parameters, which it takes over."""

    def begin(params: dict[str, Any]) -> TrainState:
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params)
