"""FSDP on one device: gathers weights, reduce-scatters gradients, runs the attention kernel.

Training runs under `jax.shard_map`, manual over the axes that split rows (`data`, `fsdp`): each device has its rows and
its slice of every weight. FSDP is three explicit collectives: a weight is all-gathered over `fsdp` where it is used, in
the dtype it is used in; the transpose reduce-scatters its gradient in `train.reduce_dtype`, by default the same dtype;
gradients of replicated parameters are summed once in float32, at the end. XLA's partitioner would turn the same
products into rings of permutes on TPUs and move activations for the embedding's lookup.

`tensor` stays with the partitioner: weights and activations carry constraints along it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipt_jax.model.attention import AttentionKernel, attend, attend_cudnn, attend_splash
from ipt_jax.parallel.mesh import ROWS
from ipt_jax.parallel.rules import Axes, mesh_axes

Stages = tuple[tuple[tuple[int, ...], ...] | None, ...]  # of each reduce-scatter: its groups of places along fsdp

Dtypes = tuple[Any, Any, Any]  # of a weight's slice, of the gathered weight, of the sum of its gradients

KERNELS: dict[str, AttentionKernel] = {"xla": attend, "cudnn": attend_cudnn, "splash": attend_splash}


class OnDevice:
    """A device's side of `mesh`, for a model whose weights are split along a dim of `hidden_size` over fsdp."""

    def __init__(self, mesh: Mesh, hidden_size: int, reduce_dtype: Any = None):
        self.mesh, self.reduce_dtype = mesh, reduce_dtype  # None: that of the gradient
        self.fsdp, self.tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        self.divides = self.fsdp > 1 and hidden_size % self.fsdp == 0  # else `place_params` replicates weights
        self.stages = torus_stages(mesh.devices[0, :, 0])
        self.rows = tuple(axis for axis in ROWS if mesh.shape[axis] > 1)  # the axes over which sums are due
        # With tensor alone there is nothing to write out: the partitioner handles all of it.
        self.manual = frozenset(mesh.axis_names if self.tensor == 1 else ROWS if self.rows else ())

    def spec(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` without the axes that the partitioner handles."""

        def kept(part: Any) -> Any:
            names = tuple(name for name in (part if isinstance(part, tuple) else (part,)) if name in self.manual)
            return names[0] if len(names) == 1 else names or None

        return PartitionSpec(*(kept(part) for part in spec))

    def is_split(self, axes: Axes) -> bool:
        """Whether a weight of these logical axes is split over fsdp."""
        return self.divides and any("fsdp" in mesh_axes(name) for name in axes)

    def gather(self, w: Array, axes: Axes, dtype: Any) -> Array:
        """A weight as `dtype`, all-gathered over fsdp. Its gradient is reduce-scattered."""
        if not self.is_split(axes):
            w = w.astype(dtype)
        else:
            dim = next(dim for dim, name in enumerate(axes) if "fsdp" in mesh_axes(name))
            dtypes = (w.dtype, jnp.dtype(dtype), jnp.dtype(self.reduce_dtype or dtype))
            gathered = functools.partial(_gathered, dim, self.stages, dtypes)
            # the partitioner would first gather a weight's tensor parts: each device is limited to its own
            w = gathered(w) if self.tensor == 1 else self._each_part(gathered, self._along_tensor(w.shape, axes))(w)
        return self.constrain(w, axes)

    def _each_part(self, function: Callable[..., Array], spec: PartitionSpec) -> Callable[..., Array]:
        """`function` of an array, run by each device on its own part along tensor."""
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            function, mesh=mesh, axis_names={"tensor"}, in_specs=spec, out_specs=spec, check_vma=False
        )  # fmt: skip

    def _along_tensor(self, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(
            "tensor" if "tensor" in mesh_axes(name) and size % self.tensor == 0 else None
            for size, name in zip(shape, axes, strict=True)
        ))  # fmt: skip

    def add_up(self, x: Any, axes: Axes = ()) -> Any:
        """`x` summed over all rows; of a split weight's gradient, fsdp's part was added where it was gathered."""
        due = tuple(axis for axis in self.rows if not (axis == "fsdp" and self.is_split(axes)))
        return jax.lax.psum(x, due) if due else x

    def constrain(self, x: Array, axes: Axes) -> Array:
        """Pins `x` along `tensor`, where that has more than one device."""
        if self.tensor == 1:
            return x
        mesh = jax.sharding.get_abstract_mesh() if self.manual else self.mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self._along_tensor(x.shape, axes)))

    def attention(self, kernel: str) -> AttentionKernel:
        """The kernel for a device's rows; a fused one is opaque to the partitioner and is given its heads."""
        if kernel == "xla" or self.tensor == 1:
            return KERNELS[kernel]
        return functools.partial(self._on_heads, KERNELS[kernel])

    def _on_heads(
        self, kernel: AttentionKernel, q: Array, k: Array, v: Array, *, window: int | None, segment_ids: Array | None
    ) -> Array:
        divides = k.shape[2] % self.tensor == 0  # else every device computes all heads
        rows = None if self.manual else ROWS
        heads = PartitionSpec(rows, None, "tensor" if divides else None, None)

        def part(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
            return kernel(q, k, v, window=window, segment_ids=segment_ids)

        on_heads = jax.shard_map(
            part, mesh=jax.sharding.get_abstract_mesh() if self.manual else self.mesh, check_vma=False,
            axis_names={"tensor"} if self.manual else set(self.mesh.axis_names),
            in_specs=(heads, heads, heads, PartitionSpec(rows)), out_specs=heads,
        )  # fmt: skip
        return on_heads(q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(dim: int, stages: Stages, dtypes: Dtypes, w: Array) -> Array:
    w = jnp.moveaxis(w.astype(dtypes[1]), dim, 0)
    for groups in reversed(stages):
        w = jax.lax.all_gather(w, "fsdp", axis=0, axis_index_groups=groups, tiled=True)
    return jnp.moveaxis(w, 0, dim)


def _gathered_forward(dim: int, stages: Stages, dtypes: Dtypes, w: Array) -> tuple[Array, None]:
    return _gathered(dim, stages, dtypes, w), None


def _gathered_backward(dim: int, stages: Stages, dtypes: Dtypes, _: None, grad: Array) -> tuple[Array]:
    grad = jnp.moveaxis(grad.astype(dtypes[2]), dim, 0)
    for groups in stages:
        parts = len(groups[0]) if groups else jax.lax.axis_size("fsdp")
        # A device's slice has a leading dim of its own: cutting inside a lane dim, libtpu reduces all and slices.
        cut = grad.reshape(parts, -1, *grad.shape[1:])
        grad = jax.lax.psum_scatter(cut, "fsdp", scatter_dimension=0, axis_index_groups=groups)
    return (jnp.moveaxis(grad, 0, dim).astype(dtypes[0]),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def torus_stages(devices: np.ndarray) -> Stages:
    """The groups in which devices along one mesh axis reduce-scatter, one stage after another.

    One stage of all of them, but on a TPU where they fill a grid of its torus: then one stage a side of that grid, the
    first cut first. libtpu 0.0.52 turns a reduce-scatter over a full square grid into an all-reduce and a slice, twice
    the bytes; over one side it does not, and the stages together send what one would: S (n - 1) / n bytes a device.
    """
    sides = _grid_sides(devices)
    if len(sides) == 1:
        return (None,)
    places = np.arange(devices.size).reshape(sides)
    by_side = (np.moveaxis(places, side, -1).reshape(-1, sides[side]) for side in range(len(sides)))
    return tuple(tuple(map(tuple, groups.tolist())) for groups in by_side)


def _grid_sides(devices: np.ndarray) -> tuple[int, ...]:
    """Sides of the grid that `devices` fill in row-major order of their coordinates, in any order of the axes."""
    coords = [getattr(device, "coords", None) for device in devices]
    if None in coords:
        return (devices.size,)
    table = np.array(coords)  # [n, 3]
    used = [axis for axis in range(table.shape[1]) if len(set(table[:, axis])) > 1]
    if not used:
        return (1,)
    for order in itertools.permutations(used):
        sides = tuple(len(set(table[:, axis])) for axis in order)
        if math.prod(sides) == len(table) and (np.lexsort(table[:, order[::-1]].T) == np.arange(len(table))).all():
            return sides
    return (devices.size,)
