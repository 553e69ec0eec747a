"""`ipt compile`: compile a recipe once or search what fits, and print the result as tables.

The search (`--fit`) tries the micro-batches that divide the batch, for each way of recomputing, by bisection: memory
grows with the rows, so a few compilations find the largest that fits. The choice is the one of all tried and fitting
with the most predicted tokens/s, not the largest: where memory is short, XLA adds recomputation by itself.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ipt_jax.compile.roofline import PREDICTION_ERROR
from ipt_jax.config import Recipe, rows_per_step
from ipt_jax.core.errors import UserError
from ipt_jax.hf.config import resolve_model
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.flops import model_flops_per_token, recomputed_flops_per_token
from ipt_jax.parallel.topology import Topology, parse_topology, prepare_environment

Remat = str | tuple[str, ...]
Compile = Callable[[Recipe, ModelConfig, Topology], dict[str, Any]]
REMATS: tuple[Remat, ...] = (
    "none",
    ("query", "key", "value", "output", "gate", "up"),
    ("query", "key", "value", "output"),
    "full",
)


def run_compile(recipe: Recipe, topology_name: str, fit: bool) -> dict[str, Any]:
    """Compiles `recipe` for the topology, once or (`fit`) as often as the search needs."""
    topology = parse_topology(topology_name)
    model = resolve_model(recipe.model)
    with tempfile.TemporaryDirectory(prefix="ipt-compile-") as dumps:
        prepare_environment(topology, dumps)
        from ipt_jax.compile.measure import compile_recipe  # imports JAX, which reads the environment then
        from ipt_jax.parallel.mesh import mesh_shape

        compile_step = functools.partial(compile_recipe, dumps=Path(dumps))
        if not fit:
            return compile_step(recipe, model, topology)
        data, fsdp, _ = mesh_shape(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor, topology.devices)
        frontier, compilations = search(recipe, model, topology, data * fsdp, compile_step)
    if not frontier:
        raise UserError(
            f"--topology {topology.name}: not even one row of {recipe.data.seq_len} with everything recomputed fits; "
            "use more devices, a tensor axis, or a shorter data.seq_len"
        )
    return frontier[0] | {"frontier": frontier, "compilations": compilations}


# ---- search


def search(
    recipe: Recipe, model: ModelConfig, topology: Topology, shards: int, compile_step: Compile
) -> tuple[list[dict[str, Any]], int]:
    """The results that fit, by predicted tokens/s in descending order, and the number of compilations.

    Each result is that of `compile_step` with `recomputed`, a share of the model's FLOPs.
    """
    tried: list[dict[str, Any]] = []
    flops = model_flops_per_token(model, recipe.data.seq_len)
    for remat in REMATS:

        def is_too_large(microbatch: int, remat: Remat = remat) -> bool:
            settings = recipe.train.model_copy(update={"microbatch": microbatch, "remat": remat})
            result = compile_step(recipe.model_copy(update={"train": settings}), model, topology)
            result["recomputed"] = recomputed_flops_per_token(model, recipe.data.seq_len, remat) / flops
            tried.append(result)
            fits = "fits, predicted {predicted_tokens_per_second:,.0f} tokens/s" if result["fits"] else "does not fit"
            figures = f"{_gib(result['peak_bytes_per_device'])}, {fits} (compiled in {{compile_seconds}} s)"
            line = f"ipt compile: remat {_label(remat)}, microbatch {microbatch}: {figures.format_map(result)}"
            print(line, file=sys.stderr, flush=True)
            return not result["fits"]

        bisect_left(sizes(rows_per_step(recipe), shards), True, key=is_too_large)
    fitting = [one for one in tried if one["fits"]]
    return sorted(fitting, key=lambda one: one["predicted_tokens_per_second"], reverse=True), len(tried)


def sizes(rows: int, shards: int) -> list[int]:
    """Micro-batches that divide the rows per shard, ascending."""
    each = rows // shards
    return [size for size in range(1, each + 1) if each % size == 0]


# ---- tables


def print_result(result: dict[str, Any]) -> None:
    """Prints one compilation, and after a search all that fit."""
    console = Console(highlight=False)
    if "frontier" in result:
        console.print(_frontier(result["frontier"]))
        console.print("Chosen: the first line, which has the most predicted tokens/s.\n")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(result):
        table.add_row(name, value)
    console.print(table)
    if "collectives" in result:
        console.print()
        console.print(_predicted_parts(result))
        console.print()
        console.print(_collectives(result))


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    batch = "{microbatch} rows of {seq_len:,} per shard x {accumulation} accumulation steps = {batch_tokens:,} tokens"
    lines = [
        ("devices", f"{result['devices']} x {result['device_kind']}, mesh {mesh}"),
        ("model", f"{result['params']:,} parameters, {result['model_flops_per_token'] / 1e9:.2f} GFLOP per token"),
        ("batch", batch.format_map(result)),
        ("remat", f"{_label(result['remat'])}, {result['compute_dtype']} compute"),
        ("attention", "{kernel} ({reason})".format_map(result["attention_chosen"])),
    ]
    if "attention_calls" in result:
        calls = result["attention_calls"].get(result["attention"], {})
        counted = f", {calls['forward']} forward and {calls['backward']} backward calls" if calls else ""
        lines.append(("in the program", f"{result['attention']}{counted}"))
        lines.append(("arguments", _gib(result["argument_bytes"])))
        lines.append(("temporaries", _gib(result["temporary_bytes"])))
    room = f"{_gib(result['hbm_bytes'])} of the device, {_gib(result['usable_bytes'])} of them usable"
    lines.append(("peak", f"{_gib(result['peak_bytes_per_device'])} per device ({room})"))
    lines.append(("fits", "yes" if result["fits"] else f"no: {result.get('refused', 'more than is usable')}"))
    lines.extend(("fallback", note) for note in result["fallbacks"])
    if "predicted_step_seconds" in result:
        lines.extend(_predicted(result))
    return [*lines, ("compiled in", f"{result['compile_seconds']} s")]


def _predicted(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The predicted speed: an estimate where the device's rates were measured, else a bound."""
    least, most = ("about", "about") if result["predicted_from"]["measured"] else ("at least", "at most")
    step = (
        "{predicted_step_seconds:.3f} s (products {predicted_products_seconds:.3f}, memory "
        "{predicted_memory_seconds:.3f}, exposed collectives {predicted_exposed_collective_seconds:.3f} of "
        "{predicted_collective_seconds:.3f})"
    )
    speed = "{predicted_tokens_per_second:,.0f} tokens/s, {predicted_tokens_per_second_per_device:,.0f} per device"
    return [
        ("predicted step", f"{least} {step.format_map(result)}"),
        ("predicted speed", f"{most} {speed.format_map(result)}"),
        ("predicted MFU", f"{most} {result['predicted_mfu']:.1%}"),
        ("predicted limit", result["predicted_limit"]),
    ]


def _predicted_parts(result: dict[str, Any]) -> Table:
    """Seconds, products and bytes of a device's step, by part."""
    table = _table("part", "predicted seconds", "predicted share", "TFLOP per device", "GB of memory")
    for part, total in sorted(result["predicted_parts"].items(), key=lambda item: -item[1]["seconds"]):
        share = total["seconds"] / result["predicted_step_seconds"]
        counted = (f"{total['flops'] / 1e12:,.2f}", f"{total['bytes'] / 1e9:,.2f}")
        table.add_row(part, f"{total['seconds']:.4f}", f"{share:.1%}", *counted)
    peaks = result["predicted_from"]
    between = f", {peaks['network_bytes_per_second'] / 1e9:,.0f} GB/s between nodes" if result["devices"] > 8 else ""
    source = f"links from data sheets, the rest measured; {PREDICTION_ERROR}" if peaks["measured"] else "data sheets"
    table.caption = (
        f"Predicted from {peaks['flops_per_second'] / 1e12:,.1f} TFLOP/s, "
        f"{peaks['memory_bytes_per_second'] / 1e9:,.0f} GB/s of memory and "
        f"{peaks['link_bytes_per_second'] / 1e9:,.0f} GB/s of links per device{between}: {source}."
    )
    return table


def _collectives(result: dict[str, Any]) -> Table:
    """Bytes that a device sends per step, compared with an ideal schedule."""
    table = _table("collective", "per step", "of them in loops", "MB sent per device", "ideal FSDP", "ratio")
    for kind, total in result["collectives"].items():
        ideal = result["ideal"].get(kind, 0)
        inside = result["collectives_in_loops"].get(kind, {"count": 0})["count"]
        table.add_row(
            kind, f"{total['count']:,}", f"{inside:,}", f"{total['bytes'] / 1e6:,.1f}", f"{ideal / 1e6:,.1f}",
            f"{total['bytes'] / ideal:.3f}" if ideal else "–",
        )  # fmt: skip
    dtypes = ", ".join(result["reduce_dtypes"]) or "none"
    table.caption = f"Ideal: each split parameter gathered twice, reduce-scattered once per micro-batch ({dtypes})."
    return table


def _frontier(frontier: list[dict[str, Any]]) -> Table:
    predicted = ("predicted tokens/s", "predicted MFU")
    table = _table("remat", "microbatch", "peak per device", "FLOPs recomputed", *predicted)
    for one in frontier:
        settings = (_label(one["remat"]), str(one["microbatch"]), _gib(one["peak_bytes_per_device"]))
        speed = (f"{one['predicted_tokens_per_second']:,.0f}", f"{one['predicted_mfu']:.1%}")
        table.add_row(*settings, f"{one['recomputed']:.1%}", *speed)
    return table


def _table(*columns: str) -> Table:
    """The first column left-aligned, the others right-aligned."""
    table = Table(*columns, box=None, caption_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _label(remat: str | list[str] | tuple[str, ...]) -> str:
    return remat if isinstance(remat, str) else "+".join(remat)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
