"""Compiles the train step for devices that are not attached, and reports memory, kernels and collectives.

Guarantees: the program is the one that `ipt train` runs on such devices. The same recipe, model and mesh go through
`build_program`; state and batch exist as shapes only, and data is never opened. Figures are read from the compiled
program, except `ideal` and `model_flops_per_token`, which are arithmetic, and `predicted_*`, which is a roofline.
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from ipt_jax.compile.hlo import Collective, attention_kernels, collectives
from ipt_jax.compile.roofline import predict_step
from ipt_jax.config import Recipe
from ipt_jax.core.errors import UserError
from ipt_jax.model.config import ModelConfig, param_count
from ipt_jax.model.decoder import abstract_params, logical_axes
from ipt_jax.model.flops import model_flops_per_token
from ipt_jax.parallel.mesh import make_mesh
from ipt_jax.parallel.rules import mesh_axes
from ipt_jax.parallel.topology import Topology, describe_devices
from ipt_jax.train.step import Program, build_program, lower

STEP_DUMPS = "*jit_train_step*"
STEPS = 1000  # of the schedule; the program is the same for any number


def compile_recipe(recipe: Recipe, model: ModelConfig, topology: Topology, dumps: Path) -> dict[str, Any]:
    """Compiles the step of `recipe` for `topology`; the object that `--json` prints. The compiler writes to `dumps`."""
    for old in dumps.glob(STEP_DUMPS):
        old.unlink()
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor, describe_devices(topology))
    program = build_program(recipe, model, mesh, STEPS)
    started = time.monotonic()
    try:
        lowered = lower(program)
    except NotImplementedError as error:  # JAX asks the GPU of this process, which has none, what cuDNN may do
        raise UserError(
            f"--topology {topology.name}: JAX traces cuDNN attention for the GPU of this process, which has none "
            f"({str(error).rstrip('.')}); add train.attention=xla to compile without it"
        ) from error
    result = _describe(recipe, topology, program)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return result | {
            "peak_bytes_per_device": needed,
            "fits": False,
            "compile_seconds": round(time.monotonic() - started, 1),
            "refused": "the compiler found no way to fit the program into the device's memory",
        }
    seconds = time.monotonic() - started
    memory, text = compiled.memory_analysis(), program_text(dumps)
    assert memory is not None, "compilers for devices analyse memory"
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    peak = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    kernels, found = attention_kernels(text), collectives(text)
    return {
        **result,
        "argument_bytes": sizes["argument"],
        "temporary_bytes": sizes["temp"],
        "output_bytes": sizes["output"],
        "aliased_bytes": sizes["alias"],
        "peak_bytes_per_device": peak,
        "fits": peak <= topology.usable,
        "attention": next(iter(kernels), "xla"),
        "attention_calls": kernels,
        "collectives": _by_kind(found),
        "collectives_in_loops": _by_kind([one for one in found if one.loops]),
        "reduce_dtypes": sorted({one.dtype for one in found if one.kind == "reduce-scatter"}),
        "ideal": ideal_fsdp(program),
        "compile_seconds": round(seconds, 1),
        **predict_step(
            text, result["device_kind"], result["devices"], result["batch_tokens"], result["model_flops_per_token"]
        ),
    }


def _describe(recipe: Recipe, topology: Topology, program: Program) -> dict[str, Any]:
    """The part of the result that is known before compilation."""
    mesh, shape = program.mesh, program.shape
    return {
        "topology": topology.name,
        "devices": mesh.devices.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "params": param_count(program.model),
        "seq_len": recipe.data.seq_len,
        "microbatch": program.rows // shape.accumulation // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "accumulation": shape.accumulation,
        "batch_tokens": recipe.train.batch_tokens,
        "remat": shape.remat,
        "compute_dtype": shape.compute_dtype,
        "attention_chosen": {"kernel": shape.attention, "reason": program.choices["attention_reason"]},
        "fallbacks": program.choices["fallbacks"],
        "model_flops_per_token": model_flops_per_token(program.model, recipe.data.seq_len),
        "hbm_bytes": topology.memory,
        "usable_bytes": topology.usable,
    }


def program_text(dumps: Path) -> str:
    """The optimized program of the step as its compiler dumped it.

    Not `as_text()`: that uses JAX's own copy of XLA, which cannot parse every program of a newer libtpu.
    """
    found = list(dumps.glob(f"{STEP_DUMPS}after_optimizations.txt"))
    assert len(found) == 1, f"{len(found)} programs among {sorted(one.name for one in dumps.iterdir())}"
    return found[0].read_text(encoding="utf-8")


def _by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for one in found:
        totals[one.kind]["count"] += one.times
        totals[one.kind]["bytes"] += one.sent
    return dict(sorted(totals.items()))


def ideal_fsdp(program: Program) -> dict[str, int]:
    """Bytes that one device sends in an ideal schedule, by kind of collective.

    Each split parameter: two gathers and one reduce-scatter per micro-batch, in the compute dtype. Each parameter of
    which devices hold copies: one float32 all-reduce per step.
    """
    mesh, model = program.mesh, program.model
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    width = 2 if program.shape.compute_dtype == "bfloat16" else 4
    moved = reduced = 0
    flat_axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    for shape, axes in zip(jax.tree.leaves(abstract_params(model)), flat_axes, strict=True):
        size = math.prod(shape.shape)
        if tensor > 1 and any("tensor" in mesh_axes(name) for name in axes):
            size //= tensor
        if fsdp > 1 and any("fsdp" in mesh_axes(name) for name in axes):
            moved += size * width * (fsdp - 1) // fsdp
            size, copies = size // fsdp, mesh.shape["data"]
        else:
            copies = mesh.shape["data"] * fsdp
        reduced += 2 * 4 * size * (copies - 1) // copies
    each = program.shape.accumulation
    return {"all-gather": 2 * moved * each, "reduce-scatter": moved * each, "all-reduce": reduced}


def _needed(message: str) -> int | None:
    """Bytes that a program too large for the device needs: 0 where the message has none, None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    numbers = re.search(
        r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm. Exceeded hbm capacity by ([\d.]+)([KMG]?)", message
    )
    if numbers is None:
        return 0
    used, over = float(numbers[1]) * units[numbers[2]], float(numbers[3]) * units[numbers[4]]
    return int(used + over if used < over else used)
