"""Meshes over whatever devices exist, and which rows of a batch a process has to read.

Axes, in this order: `data` (copies of the model), `fsdp` (parameters split, gathered layer by layer), `tensor`
(heads, feed-forward and vocabulary split). Rows are split over data and fsdp; devices along `tensor` share rows.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ipt_jax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")


def mesh_shape(data: int, fsdp: int, tensor: int, device_count: int) -> tuple[int, int, int]:
    """The sizes with the one that is -1 filled. Raises UserError when they do not multiply to the devices."""
    sizes = [data, fsdp, tensor]
    stated = f"mesh data {data} x fsdp {fsdp} x tensor {tensor}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{stated}: sizes are 1 or more, and at most one is -1 (all remaining devices)")
    known = math.prod(size for size in sizes if size != -1)
    filled = [device_count // known if size == -1 else size for size in sizes]
    if math.prod(filled) != device_count:
        raise UserError(f"{stated} does not fit {device_count} devices; set the sizes to multiply to {device_count}")
    return filled[0], filled[1], filled[2]


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default), neighbours on the network being neighbours on the last axes."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, tensor, len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        # JAX orders small slices as a ring. Sums over fsdp go by side of the torus, which needs row-major order.
        grid = np.apply_along_axis(lambda line: np.array(sorted(line, key=lambda one: tuple(one.coords))), 1, grid)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh) -> int:
    """Groups of devices that hold different rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches [A, M, T]: accumulation steps, rows, positions."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS, None))


def host_slot(mesh: Mesh) -> tuple[int, int]:
    """(place, number) of this process among the groups of processes that read different rows.

    Processes whose devices differ along `tensor` only hold the same rows and get the same place.
    """
    groups = _row_groups(mesh)
    mine = groups[jax.process_index()]
    distinct = sorted(set(groups.values()), key=min)
    if sum(len(group) for group in distinct) != row_shards(mesh) or len({len(group) for group in distinct}) != 1:
        raise UserError(
            f"mesh {dict(mesh.shape)}: processes would hold overlapping rows; make data x fsdp a multiple of the "
            f"{len(groups)} processes, or tensor a multiple of the devices of a process"
        )
    return distinct.index(mine), len(distinct)


def _row_groups(mesh: Mesh) -> dict[int, frozenset[int]]:
    """The row shards that each process holds."""
    groups: dict[int, set[int]] = {}
    grid = mesh.devices.reshape(row_shards(mesh), -1)  # [row shards, tensor]
    for shard, devices in enumerate(grid):
        for device in devices:
            groups.setdefault(device.process_index, set()).add(shard)
    return {process: frozenset(shards) for process, shards in groups.items()}


def place_batch(batch: dict[str, np.ndarray], accumulation: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows [R / hosts, T] as its part of global arrays [A, M, T]."""

    def place(rows: np.ndarray) -> jax.Array:
        steps = rows.reshape(accumulation, rows.shape[0] // accumulation, rows.shape[1])
        return jax.make_array_from_process_local_data(sharding, steps)

    return {name: place(rows) for name, rows in batch.items()}
