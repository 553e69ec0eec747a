"""The one table from logical axes to mesh axes, and the shardings that follow from it.

Model code names logical axes only. Guarantees: an unknown name, or two dims on one mesh axis, is an error; a dim that
does not divide is not split, and `Placement.notes` reports it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "norm": (),  # a few kB: gathering them in every layer would cost latency alone
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
}

Axes = tuple[str | None, ...]


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes of one logical axis; None is a dim that is never split."""
    if name is None:
        return ()
    if name not in RULES:
        raise KeyError(f"logical axis {name!r} has no rule; known: {', '.join(RULES)}")
    return RULES[name]


def spec_of(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> tuple[PartitionSpec, list[str]]:
    """The partition spec of a tensor, and the logical axes that are not split because they do not divide."""
    assert len(axes) == len(shape), f"axes {axes} for shape {shape}"
    parts: list[str | tuple[str, ...] | None] = []
    whole: list[str] = []
    for name, size in zip(axes, shape, strict=True):
        split = tuple(axis for axis in mesh_axes(name) if mesh.shape[axis] > 1)
        if size % math.prod(mesh.shape[axis] for axis in split):
            whole.append(str(name))
            split = ()
        parts.append(split[0] if len(split) == 1 else split or None)
    used = [axis for part in parts for axis in (part if isinstance(part, tuple) else (part,)) if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes}: two dims on one mesh axis in {parts}")
    return PartitionSpec(*parts), whole


@dataclass(frozen=True)
class Placement:
    """The sharding of every parameter."""

    shardings: dict[str, Any]  # the parameters' nested dict, of NamedSharding
    notes: list[str]  # what could not be split


def place_params(axes: dict[str, Any], shapes: dict[str, Any], mesh: Mesh) -> Placement:
    """Shardings of all parameters, from their logical axes and shapes in equal nested dicts."""
    notes: list[str] = []

    def place(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, names: Axes) -> NamedSharding:
        spec, whole = spec_of(names, shape.shape, mesh)
        for name in whole:
            size, parts = shape.shape[names.index(name)], mesh_axes(name)
            notes.append(f"{param_name(path)}: {name} {size} does not divide over {'x'.join(parts)}, not split")
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, shapes, axes)
    return Placement(shardings, notes)


def param_name(path: tuple[Any, ...]) -> str:
    """`layers.query` of a tree path."""
    return ".".join(str(part.key) for part in path)


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """Bytes of one device's part of a tree of abstract arrays."""

    def part(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(part, shapes, shardings)))
