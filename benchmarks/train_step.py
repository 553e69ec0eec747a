"""One train step on this CPU: this project, torch with transformers (eager and compiled), and a naive JAX step.

    python benchmarks/train_step.py                      # both shapes: about ten minutes on two cores
    python benchmarks/train_step.py --shapes A --systems ours,naive-scan,naive-loop --rounds 5

Every system trains the same decoder in float32 with AdamW, two float32 moments, no remat and no logger, on one batch of
8 x 512 random tokens. Each is a child process of its own on the same cores. All children of a shape start and compile
one after the other, then take turns of a few steps, so that other load affects all alike. A step ends when its loss is
on the host. Ours is the step that `ipt train` runs. It is compared with the better naive step and the better torch.
Losses are printed, because a wrong step may be a fast one. Does not apply to accelerators.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROWS, LENGTH = 8, 512
SHAPES: dict[str, dict[str, int]] = {
    "A": dict(vocab_size=32_000, hidden_size=256, layers=4, q_heads=8, kv_heads=2, head_dim=32, intermediate_size=688),
    "B": dict(vocab_size=4096, hidden_size=384, layers=8, q_heads=6, kv_heads=2, head_dim=64, intermediate_size=1024),
}
RATE, BETA1, BETA2, EPS, DECAY, INIT = 3e-4, 0.9, 0.95, 1e-8, 0.1, 0.02
PACKAGES = ("jax", "jaxlib", "optax", "torch", "transformers", "numpy")

Step = Callable[[], float]  # trains on the batch once and returns the loss before the update


# ---- the systems, each made in a process of its own


def our_program(shape: dict[str, int], tokens: np.ndarray, compute_dtype: str = "float32") -> tuple[Any, Any, Any]:
    """`build_program` of the recipe that the common settings amount to, on one device, with its state and batch."""
    import jax

    from ipt_jax.config import Recipe
    from ipt_jax.model.config import ModelConfig
    from ipt_jax.parallel.mesh import batch_sharding, make_mesh, place_batch
    from ipt_jax.train.state import fresh_state
    from ipt_jax.train.step import build_program

    recipe = Recipe.model_validate(
        {
            "model": shape,
            "data": {"seq_len": LENGTH, "sources": [{"name": "raw", "path": "unread", "epochs": 1}]},
            "train": {"batch_tokens": ROWS * LENGTH, "compute_dtype": compute_dtype, "remat": "none"},
            "optimizer": {
                "learning_rate": RATE, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY,
                "schedule": "constant", "clip_norm": None,
            },
            "run_dir": "unwritten",
        }
    )  # fmt: skip
    model = ModelConfig(**shape, initializer_range=INIT)
    program = build_program(recipe, model, make_mesh(devices=jax.devices()[:1]), total_steps=1000)
    fields = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": np.tile(np.arange(LENGTH) < LENGTH - 1, (ROWS, 1)),
        "segment_ids": np.ones_like(tokens),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "kinds": np.ones_like(tokens),
    }
    batch = place_batch(fields, program.shape.accumulation, batch_sharding(program.mesh))
    return program, fresh_state(model, program.optimizer, program.shardings, seed=0), batch


def ours(shape: dict[str, int], tokens: np.ndarray, threads: int) -> Step:
    program, state, batch = our_program(shape, tokens)

    def step() -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(metrics["loss_sums"].sum() / metrics["targets"].sum())

    return step


def naive(shape: dict[str, int], tokens: np.ndarray, threads: int, loop: bool) -> Step:
    from naive_step import make_step

    adamw = {"learning_rate": RATE, "b1": BETA1, "b2": BETA2, "eps": EPS, "weight_decay": DECAY}
    return make_step(shape, tokens, loop, INIT, adamw)


def torch_step(shape: dict[str, int], tokens: np.ndarray, threads: int, compiled: bool, fused: bool) -> Step:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["q_heads"], num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        intermediate_size=shape["intermediate_size"], max_position_embeddings=LENGTH, sliding_window=None,
        tie_word_embeddings=False, initializer_range=INIT, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, fused=fused
    )
    run = torch.compile(model) if compiled else model
    ids = torch.tensor(tokens, dtype=torch.int64)

    def step() -> float:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


SYSTEMS: dict[str, Callable[[dict[str, int], np.ndarray, int], Step]] = {
    "naive-scan": lambda *given: naive(*given, loop=False),
    "naive-loop": lambda *given: naive(*given, loop=True),
    "ours": ours,
    "torch-eager": lambda *given: torch_step(*given, compiled=False, fused=False),
    "torch-compile": lambda *given: torch_step(*given, compiled=True, fused=False),
    "torch-compile-fused": lambda *given: torch_step(*given, compiled=True, fused=True),
}


# ---- a child: makes its step, then takes the turns that stdin asks for


def child(system: str, shape: dict[str, int], threads: int) -> None:
    """Answers each line of stdin, a number of steps, with one JSON line; the first answer is that of the start."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries is not an answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    step = SYSTEMS[system](shape, tokens, threads)
    seconds, losses = timed(step, 2)  # torch.compile and allocators settle in the second step
    print(json.dumps({"seconds": seconds, "losses": losses}), file=answers)
    for line in sys.stdin:
        seconds, losses = timed(step, int(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_mib": peak}), file=answers)


def timed(step: Step, steps: int) -> tuple[list[float], list[float]]:
    seconds, losses = [], []
    for _ in range(steps):
        begun = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begun)
    return seconds, losses


# ---- the parent: starts the children, runs them in turn, prints the table


def start(system: str, shape: str, threads: int) -> subprocess.Popen[str]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", system, "--shapes", shape, "--threads", str(threads)]
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)


def answer(system: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{system} ended with code {process.wait()} before its answer; see its output above")
    return json.loads(line)


def measure(shape: str, systems: list[str], rounds: int, steps: int, threads: int) -> dict[str, dict[str, Any]]:
    """Of each system: seconds of every step, compile seconds, peak MiB, losses."""
    children: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for system in systems:
            begun = time.perf_counter()
            children[system] = start(system, shape, threads)
            first = answer(system, children[system])
            results[system] = {
                "start_seconds": time.perf_counter() - begun,
                "compile_seconds": first["seconds"][0] - first["seconds"][1],
                "losses": first["losses"],
                "seconds": [],
            }
            print(f"  {shape} {system}: ready after {results[system]['start_seconds']:.0f} s", file=sys.stderr)
        for _ in range(rounds):
            for system, process in children.items():
                assert process.stdin is not None
                process.stdin.write(f"{steps}\n")
                got = answer(system, process)
                results[system]["seconds"].append(got["seconds"])
                results[system]["losses"] += got["losses"]
                results[system]["peak_mib"] = got["peak_mib"]
    finally:
        for process in children.values():
            process.kill()
            process.wait()
    return results


def summary(shape: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians and ratios. A ratio is the median of the rounds' own, each of neighbours in time."""
    for result in results.values():
        steps = sorted(second for turn in result["seconds"] for second in turn)
        result["median_seconds"] = statistics.median(steps)
        result["range_seconds"] = [steps[0], steps[-1]]
        result["tokens_per_second"] = ROWS * LENGTH / result["median_seconds"]
    ratios = {}
    if "ours" in results:
        mine = [statistics.median(turn) for turn in results["ours"]["seconds"]]
        for name, result in results.items():
            theirs = [statistics.median(turn) for turn in result["seconds"]]
            ratios[name] = statistics.median(other / own for other, own in zip(theirs, mine, strict=True))
    held: dict[str, float | None] = {}
    for family in ("naive", "torch"):
        members = [ratio for name, ratio in ratios.items() if name.startswith(family)]
        held[f"ours_over_best_{family}"] = min(members, default=None)
    return {"shape": shape, **SHAPES[shape], "systems": results, "speedup_of_ours_over": ratios, **held}


def describe(report: dict[str, Any]) -> str:
    """The table of one shape."""
    lines = [
        f"shape {report['shape']}: " + ", ".join(f"{name} {report[name]}" for name in SHAPES["A"]),
        f"{'system':20} {'tokens/s':>9} {'s/step':>7} {'range':>13} {'ours is':>8} {'compile s':>9} {'MiB':>6}  losses",
    ]
    for name, row in report["systems"].items():
        low, high = row["range_seconds"]
        ratio = report["speedup_of_ours_over"].get(name)
        times = "" if ratio is None else f"{ratio:.2f}x"
        lines.append(
            f"{name:20} {row['tokens_per_second']:9.0f} {row['median_seconds']:7.3f} {low:6.3f}-{high:6.3f} {times:>8} "
            f"{row['compile_seconds']:9.1f} {row['peak_mib']:6d}  {row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}"
        )
    for family in ("naive", "torch"):
        ratio = report[f"ours_over_best_{family}"]
        lines += [] if ratio is None else [f"ours over the best {family}: {ratio:.2f}x"]
    return "\n".join(lines)


def machine(threads: int) -> str:
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(line.split(":")[1].strip() for line in facts if line.startswith("model name"))
    load = os.getloadavg()[0]
    return f"{model}, {threads} of {os.cpu_count()} cores, load before {load:.1f}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="A,B", help="of A, B (default: both)")
    parser.add_argument("--systems", default="naive-scan,naive-loop,ours,torch-eager,torch-compile", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each system (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="cores of every system (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, SHAPES[options.shapes], options.threads)
        return
    systems, shapes = options.systems.split(","), options.shapes.split(",")
    for given, known in ((systems, SYSTEMS), (shapes, SHAPES)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))} is unknown; there are {', '.join(known)}")
    where = machine(options.threads)
    reports = [
        summary(shape, measure(shape, systems, options.rounds, options.steps, options.threads)) for shape in shapes
    ]
    versions = {name: version(name) for name in PACKAGES}
    date = datetime.date.today().isoformat()
    if options.json:
        print(json.dumps({"date": date, "machine": where, "versions": versions, "shapes": reports}))
        return
    print(f"{date} · {where} · " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    print(f"float32, AdamW, {ROWS} x {LENGTH} tokens a step, {options.rounds} rounds of {options.steps} steps")
    for report in reports:
        print("\n" + describe(report))


if __name__ == "__main__":
    main()
