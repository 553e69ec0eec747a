"""The train state: step, float32 parameters, optimizer state; their shapes, shardings and initial values.

Guarantees equal initial parameters on every mesh: each tensor is drawn from its own key, inside jit, directly into its
shards, so that no device holds the full model. Moments are sharded as their parameters. A run whose parameters or
moments are not sharded as planned ends before its first step, with the name: a tensor replicated by accident costs
memory and traffic and shows in no loss. Each process checks its own devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import abstract_params, init_params
from ipt_jax.parallel.rules import param_name


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
    """Shardings of the state from those of the parameters. Counters are replicated."""
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


BIG = 2**20  # elements; smaller tensors (norms) are not printed


def check_layout(state: TrainState, planned: TrainState) -> list[str]:
    """Lines for people: each big parameter's parts, and bytes a device; none for one device. Fails where a shard is
    not as planned."""
    jax.tree_util.tree_map_with_path(_check, state, planned)
    if planned.step.mesh.size == 1:
        return []
    named = jax.tree_util.tree_leaves_with_path(state.params)
    split = [(param_name(path), leaf) for path, leaf in named if leaf.size >= BIG]
    held = {what: _held(tree) / 2**20 for what, tree in (("parameters", state.params), ("moments", state.optimizer))}
    whole = sum(leaf.nbytes for _, leaf in named) / 2**20
    total = f"a device holds {held['parameters']:,.1f} MiB of {whole:,.1f} MiB of parameters"
    return [*(_tell(name, leaf) for name, leaf in split), f"{total}, {held['moments']:,.1f} MiB of moments"]


def _check(path: tuple[Any, ...], leaf: jax.Array, planned: NamedSharding) -> None:
    wanted = planned.shard_shape(leaf.shape)
    name = jax.tree_util.keystr(path)
    devices = {shard.device for shard in leaf.addressable_shards}
    assert devices == planned.addressable_devices, f"state{name} is on {len(devices)} devices of this process"
    for shard in leaf.addressable_shards:
        assert shard.data.shape == wanted, f"state{name}: {shard.device} holds {shard.data.shape}, planned was {wanted}"


def _held(tree: Any) -> int:
    """Bytes of the arrays of `tree` on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _tell(name: str, leaf: jax.Array) -> str:
    part = leaf.addressable_shards[0].data
    axes = [str(axis) for axis in leaf.sharding.spec if axis is not None]  # type: ignore[attr-defined]
    parts = math.prod(leaf.shape) // part.size
    how = f"{parts} parts ({' x '.join(axes)})" if parts > 1 else "replicated"
    return f"{name} {list(leaf.shape)}: {how}, {part.nbytes / 2**20:,.1f} MiB a device"
