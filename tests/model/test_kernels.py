"""Every attention kernel against a plain one, window x documents x grouped heads: values and gradients, in float32.

cuDNN takes no float32 and no CPU: what its program holds is tested in test_compile.py, its numbers are unproved.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipt_jax.model.attention import attend, attend_cudnn, attend_splash, fits_splash
from ipt_jax.parallel.fsdp import OnDevice, _gathered_backward, torus_stages
from ipt_jax.parallel.mesh import make_mesh

KERNELS = {"xla": attend, "splash": functools.partial(attend_splash, interpret=True)}


def plain(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, segments: jax.Array | None) -> jax.Array:
    """The formula, in float64 where JAX allows: every query against every key."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, G, axis=2), jnp.repeat(v, G, axis=2)
    age = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    seen = (age >= 0) & (age < (window or T))
    seen = seen[None] if segments is None else seen[None] & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / np.sqrt(q.shape[3])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")


def draws(T: int, N: int, K: int, H: int, documents: int, rows: int = 3) -> tuple[Any, ...]:
    rng = np.random.default_rng(T + N + documents)
    q, k, v, up = (jnp.asarray(rng.normal(size=(rows, T, heads, H)), jnp.float32) for heads in (N, K, K, N))
    segments = jnp.asarray(np.sort(rng.integers(0, documents, (rows, T)), axis=1)) if documents else None
    return q, k, v, up, segments


GROUPED = [((6, 2), window, documents) for window in (None, 1, 100, 384) for documents in (0, 4)]
CORNERS = [(heads, *rest) for heads in ((4, 4), (4, 1)) for rest in ((100, 4), (None, 0))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("heads", "window", "documents"), GROUPED + CORNERS)
def test_kernels_equal_the_plain_formula(
    kernel: str, heads: tuple[int, int], window: int | None, documents: int
) -> None:
    """Rows of 384: three blocks of 128, and a window that ends inside a block."""
    q, k, v, up, segments = draws(384, *heads, 16, documents)

    def loss(run: Any, *qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = run(*qkv)
        return (out * up).sum(), out

    ours = functools.partial(loss, lambda *qkv: KERNELS[kernel](*qkv, window=window, segment_ids=segments))
    wanted = functools.partial(loss, lambda *qkv: plain(*qkv, window, segments))
    (_, out), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    (_, wanted_out), wanted_grads = jax.jit(jax.value_and_grad(wanted, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(out, wanted_out, atol=2e-5)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(grad, wanted_grad, atol=2e-5 * max(1.0, float(jnp.abs(wanted_grad).max())))


@pytest.mark.parametrize("kernel", KERNELS)
def test_neighbours_of_a_changed_document_stay_bit_equal(kernel: str) -> None:
    q, k, v, up, _ = draws(256, 4, 2, 16, 0, rows=1)
    segments = jnp.repeat(jnp.array([[1, 2, 3]]), jnp.array([90, 60, 106]), axis=1)
    others = (segments != 2)[..., None, None]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = jnp.where(others, KERNELS[kernel](q, k, v, window=50, segment_ids=segments), 0.0)
        return (out * up).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(q, k, v)
    changed = [jnp.where(others, x, -x) for x in (q, k, v)]
    (_, other_out), other_grads = run(*changed)
    np.testing.assert_array_equal(out, other_out)
    for grad, other in zip(grads, other_grads, strict=True):
        np.testing.assert_array_equal(jnp.where(others, grad, 0.0), jnp.where(others, other, 0.0))


def test_splash_wants_whole_lanes() -> None:
    assert [fits_splash(length) for length in (128, 2048, 2000, 100)] == [True, True, False, False]


def test_cudnn_is_asked_for_what_the_rows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: asked.update(options) or q)
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    attend_cudnn(q, q, q, window=3)
    assert (asked["local_window_size"], asked["mask"], asked["is_causal"]) == ((2, 0), None, True)
    attend_cudnn(q, q, q, window=4, segment_ids=jnp.array([[1, 1, 2, 2]]))
    assert asked["local_window_size"] is None, "a window as long as the row is none"
    assert asked["mask"].dtype == jnp.bool_ and "bias" not in asked, "no gradient flows through a mask"
    assert asked["mask"].astype(int).tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]]


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_kernels_on_a_mesh_with_a_tensor_axis(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight devices share rows and split heads; a kernel gets its own heads of its own rows."""
    monkeypatch.setattr("ipt_jax.parallel.fsdp.KERNELS", KERNELS)
    mesh = make_mesh(2, 2, 2)
    device = OnDevice(mesh, 32)
    q, k, v, _, segments = draws(128, 4, 2, 16, 3, rows=4)
    rows = jax.sharding.PartitionSpec(("data", "fsdp"))
    on_mesh = jax.shard_map(
        functools.partial(device.attention(kernel), window=20), mesh=mesh, axis_names=device.manual, check_vma=False,
        in_specs=(rows, rows, rows), out_specs=rows,
    )  # fmt: skip
    without = jax.jit(lambda q, k, v: on_mesh(q, k, v) if kernel == "xla" else _with_segments(device, mesh, q, k, v))
    np.testing.assert_allclose(without(q, k, v), plain(q, k, v, 20, None), atol=2e-5)


def _with_segments(device: OnDevice, mesh: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    rows = jax.sharding.PartitionSpec(("data", "fsdp"))
    run = jax.shard_map(
        lambda q, k, v, ids: device.attention("splash")(q, k, v, window=20, segment_ids=ids), mesh=mesh,
        axis_names=device.manual, check_vma=False, in_specs=(rows, rows, rows, rows), out_specs=rows,
    )  # fmt: skip
    return run(q, k, v, jnp.ones(q.shape[:2], jnp.int32))


# ---- reduce-scatter by the sides of a torus


class Chip:
    def __init__(self, *coords: int):
        self.coords = coords


def test_stages_follow_the_sides_of_the_torus() -> None:
    grid = np.array([Chip(x, y, 0) for x in range(2) for y in range(3)], object)
    assert torus_stages(grid) == (((0, 3), (1, 4), (2, 5)), ((0, 1, 2), (3, 4, 5)))
    assert torus_stages(grid[:3]) == (None,), "a line is one stage"
    assert torus_stages(grid[[0, 2, 1, 3, 4, 5]]) == (None,), "and so is what is in no row-major order"
    assert torus_stages(np.array(jax.devices(), object)) == (None,), "CPUs and GPUs have no coordinates"


@pytest.mark.parametrize("dim", [0, 1])
def test_stages_add_up_to_one_reduce_scatter(dim: int) -> None:
    mesh = make_mesh(1, 8, 1)
    chips = np.array([Chip(x, y, z) for x in range(2) for y in range(2) for z in range(2)], object)
    grads = np.random.default_rng(0).integers(-9, 9, (8, 16, 24)).astype(np.float32)
    split = jax.sharding.PartitionSpec("fsdp")
    out = jax.sharding.PartitionSpec(*([None] * dim), "fsdp")

    def scattered(stages: Any) -> np.ndarray:
        run = jax.shard_map(
            lambda grad: _gathered_backward(dim, stages, ("float32",) * 3, None, grad[0])[0],
            mesh=mesh, in_specs=split, out_specs=out, check_vma=False,
        )  # fmt: skip
        return np.asarray(run(grads))

    np.testing.assert_array_equal(scattered((None,)), grads.sum(0))
    np.testing.assert_array_equal(scattered(torus_stages(chips)), grads.sum(0))
