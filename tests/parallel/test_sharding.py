"""The same training on one device, on eight, and on two processes; parameters that are really split; rules that refuse.

The bars: gradients of step 1 within 1e-5 of each tensor's largest entry, three losses within 1e-5, parameters within
1e-5 after three SGD steps of lr 0.1, all in float32.
"""

from __future__ import annotations

import functools
import json
import socket
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trainkit import build, host, model_of, place, program_of, random_batch, recipe_of, run_python, start, worst

from ipt_jax.core.errors import UserError
from ipt_jax.parallel.distributed import ADDRESSES, initialize_distributed
from ipt_jax.parallel.mesh import host_slot, make_mesh, mesh_shape
from ipt_jax.parallel.rules import spec_of
from ipt_jax.train.metrics import loss_metrics
from ipt_jax.train.state import check_layout, fresh_state
from ipt_jax.train.step import Program, make_optimizer

SGD = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}
DEEP = {"layers": 6, "hidden_size": 32, "q_heads": 4, "kv_heads": 2, "vocab_size": 104}  # deep enough to be scanned
LAYOUTS = [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
ROWS, LENGTH = 32, 32
SIZES = ("data", "fsdp", "tensor", "accumulation")


@functools.cache
def matrix_program(data: int, fsdp: int, tensor: int, accumulation: int) -> Program:
    """The real step on plain SGD behind a transformation that keeps the gradients it was given in its state."""
    recipe = recipe_of(
        optimizer=SGD,
        mesh={"data": data, "fsdp": fsdp, "tensor": tensor},
        data={"cross_document": "block"},
        train={"batch_tokens": ROWS * LENGTH, "microbatch": ROWS // (data * fsdp * accumulation), "loss_chunk": 64},
    )
    with pytest.MonkeyPatch.context() as patch:
        keeping = "ipt_jax.train.step.make_optimizer"
        patch.setattr(keeping, lambda *given: optax.chain(optax.trace(0.0), make_optimizer(*given)))
        return build(recipe, model_of(**DEEP, sliding_window=8), data * fsdp * tensor)


@functools.cache
def trained(data: int, fsdp: int, tensor: int, accumulation: int) -> tuple[Any, list[float], Any]:
    """Gradients of step 1, losses of three steps, parameters after them. Windows, blocks and padding included."""
    made = matrix_program(data, fsdp, tensor, accumulation)
    state, grads, losses = start(made), None, []
    slot, slots = host_slot(made.mesh)
    for seed in range(3):
        mine = {name: np.split(rows, slots)[slot] for name, rows in random_batch(ROWS, LENGTH, 104, seed).items()}
        state, metrics = made.step(state, place(made, mine))
        losses.append(loss_metrics(jax.device_get(metrics))["loss"])
        grads = grads or whole(state.optimizer[0].trace)
    return grads, losses, whole(state.params)


def whole(tree: Any) -> Any:
    """On the host, and every process has all of it."""
    return host(multihost_utils.process_allgather(tree, tiled=True))


def check_equal(one: tuple[Any, list[float], Any], other: tuple[Any, list[float], Any]) -> None:
    assert worst(one[0], other[0]) < 1e-5
    np.testing.assert_allclose(one[1], other[1], atol=1e-5)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[2], other[2])
    assert max(jax.tree.leaves(apart)) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eight_devices_train_as_one(layout: dict[str, int], accumulation: int) -> None:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | layout
    check_equal(trained(**sizes, accumulation=accumulation), trained(1, 1, 1, accumulation=1))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_trains_as_one_batch(accumulation: int) -> None:
    check_equal(trained(1, 1, 1, accumulation=accumulation), trained(1, 1, 1, accumulation=1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_matrix_and_its_moments_are_split(layout: dict[str, int]) -> None:
    """Over all of fsdp x tensor, before and after a step; `data` holds copies."""
    made = matrix_program(**({"data": 1, "fsdp": 1, "tensor": 1} | layout), accumulation=1)
    begun = start(made)
    ended, _ = made.step(start(made), place(made, random_batch(ROWS, LENGTH, 104)))
    for state in (begun, ended):
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.optimizer[0].trace)):
            if "norm" not in str(path[-1]):
                parts = layout["fsdp"] * layout.get("tensor", 1)
                assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


def test_parts_lie_where_the_rules_say(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr("ipt_jax.train.state.BIG", 6 * 32 * 48)
    assert check_layout(state, program.shardings) == [
        "layers.down [6, 48, 32]: 8 parts (tensor x fsdp), 0.0 MiB a device",
        "layers.gate [6, 32, 48]: 8 parts (fsdp x tensor), 0.0 MiB a device",
        "layers.up [6, 32, 48]: 8 parts (fsdp x tensor), 0.0 MiB a device",
        "a device holds 0.0 MiB of 0.2 MiB of parameters, 0.1 MiB of moments",
    ]
    copied = jax.device_put(state.params["layers"]["up"], NamedSharding(program.mesh, P()))
    state.params["layers"]["up"] = copied
    with pytest.raises(AssertionError, match=r"up.*holds \(6, 32, 48\), planned was \(6, 8, 24\)"):
        check_layout(state, program.shardings)


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
from ipt_jax.parallel.distributed import initialize_distributed
initialize_distributed()
import jax, numpy as np, test_sharding as of
for name, sizes in json.loads(sys.argv[1]).items():
    grads, losses, params = of.trained(**sizes)
    slot = of.host_slot(of.matrix_program(**sizes).mesh)
    print(json.dumps({"devices": [jax.local_device_count(), jax.device_count()], "slot": slot, "losses": losses}))
    if jax.process_index() == 0:
        np.savez(sys.argv[2] + "/" + name, *jax.tree.leaves((grads, params)))
"""


def run_processes(*arguments: str) -> list[list[dict[str, Any]]]:
    """What each of two children with four devices prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    addresses = [dict(zip(ADDRESSES, (address, str(i), "2"), strict=True)) for i in range(2)]
    children = [run_python(PROCESS, *arguments, JAX_NUM_CPU_DEVICES="4", **names) for names in addresses]
    try:
        outputs = [child.communicate(timeout=250) for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(error for _, error in outputs)[-4000:]
    return [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """First rows and parameters split over the processes, then a tensor axis across them: both read the same rows."""
    layouts = {"fsdp": (1, 8, 1, 2), "tensor": (1, 1, 8, 1)}
    named = {name: dict(zip(SIZES, sizes, strict=True)) for name, sizes in layouts.items()}
    first, second = run_processes(json.dumps(named), str(tmp_path))
    assert [one["slot"] for one in first] == [[0, 2], [0, 1]] and [one["slot"] for one in second] == [[1, 2], [0, 1]]
    grads, losses, params = trained(1, 1, 1, accumulation=1)
    leaves, tree = jax.tree.flatten((grads, params))
    for name, one, other in zip(layouts, first, second, strict=True):
        assert one["devices"] == other["devices"] == [4, 8] and one["losses"] == other["losses"]
        with np.load(tmp_path / f"{name}.npz") as saved:
            found = jax.tree.unflatten(tree, [saved[f"arr_{i}"] for i in range(len(leaves))])
        check_equal((found[0], one["losses"], found[1]), (grads, losses, params))
