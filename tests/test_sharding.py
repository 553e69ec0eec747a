"""The same training on one device, on eight, and on two processes; parameters that are really split; rules that refuse.

The bars: gradients of step 1 within 1e-5 of each tensor's largest entry, three losses within 1e-5, parameters within
1e-5 after three SGD steps of lr 0.1, all in float32.
"""

from __future__ import annotations

import functools
import json
import socket
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from trainkit import host, model_of, place, program_of, random_batch, recipe_of, run_python, start, worst

from ipt_jax.corpus.settings import UserError
from ipt_jax.parallel.mesh import host_slot, make_mesh, mesh_shape
from ipt_jax.parallel.process import ADDRESSES, initialize_distributed
from ipt_jax.parallel.rules import spec_of
from ipt_jax.train.metrics import loss_metrics
from ipt_jax.train.state import fresh_state
from ipt_jax.train.step import gradients

SGD = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}
DEEP = {"layers": 6, "hidden_size": 32, "q_heads": 4, "kv_heads": 2, "vocab_size": 104}  # deep enough to be scanned
LAYOUTS = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@functools.cache
def trained(data: int, fsdp: int, tensor: int) -> tuple[Any, list[float], Any]:
    """Gradients of step 1, losses of three steps, parameters after them. Windows, blocks and padding included."""
    model = model_of(**DEEP, sliding_window=8)
    recipe = recipe_of(
        optimizer=SGD,
        mesh={"data": data, "fsdp": fsdp, "tensor": tensor},
        data={"cross_document": "block"},
        train={"microbatch": 8 // (data * fsdp), "loss_chunk": 32},
    )
    program = program_of(recipe, model, data * fsdp * tensor)
    state, batch = start(program), place(program, random_batch(16, 32, 104))
    shapes = {"model": model, "shape": program.shape, "mesh": program.mesh, "shardings": program.shardings.params}
    options = {"xla_backend_optimization_level": 0}
    grads, _ = jax.jit(functools.partial(gradients, **shapes), compiler_options=options)(state.params, batch)
    losses = []
    for seed in range(3):
        state, metrics = program.step(state, place(program, random_batch(16, 32, 104, seed)))
        losses.append(loss_metrics(jax.device_get(metrics))["loss"])
    return host(grads), losses, host(state.params)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eight_devices_train_as_one(layout: dict[str, int]) -> None:
    grads, losses, params = trained(**({"data": 1, "fsdp": 1, "tensor": 1} | layout))
    wanted_grads, wanted_losses, wanted_params = trained(1, 1, 1)
    assert worst(grads, wanted_grads) < 1e-5
    np.testing.assert_allclose(losses, wanted_losses, atol=1e-5)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, wanted_params)
    assert max(jax.tree.leaves(apart)) < 1e-5


def test_parameters_and_moments_are_split() -> None:
    program = program_of(recipe_of(mesh={"fsdp": 4, "tensor": 2}), model_of(**DEEP), 8)
    state = start(program)
    mean = state.optimizer[0].mu

    def parts(leaf: jax.Array) -> set[tuple[int, ...]]:
        return {shard.data.shape for shard in leaf.addressable_shards}

    for tree in (state.params, mean):
        assert parts(tree["embedding"]) == {(104 // 2, 32 // 4)}
        assert parts(tree["layers"]["query"]) == {(6, 32 // 4, 4 // 2, 8)}
        assert parts(tree["layers"]["key"]) == {(6, 32 // 4, 2 // 2, 8)}
        assert parts(tree["layers"]["output"]) == {(6, 4 // 2, 8, 32 // 4)}
        assert parts(tree["layers"]["down"]) == {(6, 48 // 2, 32 // 4)}
        assert parts(tree["head"]) == {(32 // 4, 104 // 2)}
    state, _ = program.step(state, place(program, random_batch(16, 32, 104)))
    assert parts(state.params["layers"]["down"]) == {(6, 48 // 2, 32 // 4)}, "a step leaves them split"


def test_parameters_begin_equal_on_every_mesh() -> None:
    one, eight = (program_of(recipe_of(mesh={"fsdp": n}), model_of(), n) for n in (1, 8))
    begun = [fresh_state(model_of(), program.optimizer, program.shardings, seed=3) for program in (one, eight)]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(state.params) for state in begun))


# ---- rules and meshes


def test_specs() -> None:
    mesh = make_mesh(1, 4, 2)
    assert spec_of(("layers", "embed", "q_heads", "head_dim"), (6, 32, 4, 8), mesh) == (
        P(None, "fsdp", "tensor", None),
        [],
    )
    assert spec_of(("batch", "length", None), (8, 32, 32), mesh) == (P("fsdp", None, None), [])
    assert spec_of(("embed", "kv_heads"), (32, 3), mesh) == (P("fsdp", None), ["kv_heads"])
    assert spec_of(("batch", None), (8, 2), make_mesh(2, 2, 2)) == (P(("data", "fsdp"), None), [])


def test_rules_refuse_unknown_axes_and_collisions() -> None:
    mesh = make_mesh(1, 4, 2)
    with pytest.raises(KeyError, match="logical axis 'heads' has no rule"):
        spec_of(("heads",), (8,), mesh)
    with pytest.raises(ValueError, match="two dims on one mesh axis"):
        spec_of(("q_heads", "mlp"), (8, 8), mesh)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((8, 1, 1), (8, 1, 1)), ((2, 2, -1), (2, 2, 2))],
)
def test_mesh_shapes(sizes: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    assert mesh_shape(*sizes, 8) == shape


@given(st.tuples(*[st.integers(-2, 9)] * 3), st.integers(1, 32))
def test_a_mesh_holds_all_devices_or_is_refused(sizes: tuple[int, int, int], devices: int) -> None:
    try:
        shape = mesh_shape(*sizes, devices)
    except UserError as error:
        assert "mesh data" in str(error) and "\n" not in str(error)
    else:
        assert np.prod(shape) == devices and all(a in (b, -1) for a, b in zip(sizes, shape, strict=True))


def test_one_process_reads_all_rows() -> None:
    assert host_slot(make_mesh(1, 4, 2)) == (0, 1)


# ---- processes


def test_half_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPT_COORDINATOR", "localhost:1")
    with pytest.raises(UserError, match="IPT_PROCESS_ID, IPT_NUM_PROCESSES is not set"):
        initialize_distributed()
    for name, value in zip(ADDRESSES, ("localhost:1", "2", "2"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="IPT_PROCESS_ID is '2' and IPT_NUM_PROCESSES is '2'"):
        initialize_distributed()


PROCESS = """
import json, sys
from ipt_jax.parallel.process import initialize_distributed
found = initialize_distributed()
import jax
from trainkit import *
from ipt_jax.train.metrics import loss_metrics
from ipt_jax.parallel.mesh import host_slot
for mesh in ({"fsdp": 4}, {"fsdp": 1, "tensor": 4}):
    program = program_of(recipe_of(mesh=mesh, optimizer={"warmup_steps": 0}), model_of(), 4)
    host, hosts = host_slot(program.mesh)
    state, losses = start(program), []
    for seed in range(2):
        mine = {name: np.split(rows, hosts)[host] for name, rows in random_batch(16, 32, 104, seed).items()}
        state, metrics = program.step(state, place(program, mine))
        losses.append(loss_metrics(jax.device_get(metrics))["loss"])
    print(json.dumps({"local": jax.local_device_count(), "slot": [host, hosts], "losses": losses}))
"""


def run_processes(processes: int) -> list[list[dict[str, Any]]]:
    """What each of `processes` children with four devices between them prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    addresses = [dict(zip(ADDRESSES, (address, str(i), str(processes)), strict=True)) for i in range(processes)]
    children = [run_python(PROCESS, JAX_NUM_CPU_DEVICES=str(4 // processes), **names) for names in addresses]
    try:
        outputs = [child.communicate(timeout=250) for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(error for _, error in outputs)[-4000:]
    return [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]


def test_two_processes_train_as_one() -> None:
    """First rows split over the processes, then a tensor axis across them: there both read the same rows."""
    first, second = run_processes(2)
    assert [one["slot"] for one in first] == [[0, 2], [0, 1]] and [one["slot"] for one in second] == [[1, 2], [0, 1]]
    program = program_of(recipe_of(mesh={"fsdp": 1}, optimizer={"warmup_steps": 0}), model_of())
    state, wanted = start(program), []
    for seed in range(2):
        state, metrics = program.step(state, place(program, random_batch(16, 32, 104, seed)))
        wanted.append(loss_metrics(jax.device_get(metrics))["loss"])
    for one in first + second:
        assert one["local"] == 2
        np.testing.assert_allclose(one["losses"], wanted, atol=1e-5)
