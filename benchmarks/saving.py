"""Measure what saving costs a training run, and how much sooner the first step comes with a compile cache.

    python benchmarks/saving.py share --rounds 3        saving every 10 steps against never, interleaved
    python benchmarks/saving.py start --rounds 3        empty compile cache, then the same command again

`share` prints two figures. `blocked` is the time that the loop spends in the call that saves, over the time of the
steps between two saves. `slower` is how much longer all steps take than in a run without saves: on CPUs it contains the
threads that write and hash, which take the cores of the step; on accelerators they do not. `start` prints the seconds
from the start of the process to the end of its first step, and those of compiling the step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from token_corpus import write_corpus

from ipt_jax.config import Recipe
from ipt_jax.train.checkpoint import Checkpoints
from ipt_jax.train.trainer import run_train

MODEL = {
    "vocab_size": 32_000, "hidden_size": 128, "layers": 8, "q_heads": 4, "kv_heads": 2, "head_dim": 32,
    "intermediate_size": 352, "tie_embeddings": True,
}  # 5.6M parameters, 67 MB of state  # fmt: skip
ROWS, LENGTH, STEPS, EVERY, WARM = 4, 256, 25, 10, 5  # WARM steps are left out
COMMAND = [sys.executable, "-c", "from ipt_jax.cli import main; main()", "train"]


def recipe_of(folder: Path, every: int) -> Recipe:
    source = {"name": "raw", "path": str(folder / "raw"), "tokens": STEPS * ROWS * LENGTH}
    return Recipe.model_validate({
        "model": MODEL,
        "data": {"seq_len": LENGTH, "sources": [source]},
        "train": {"batch_tokens": ROWS * LENGTH, "log_every": 1, "checkpoint_every": every},
        "run_dir": str(folder / "run"),
    })  # fmt: skip


def seconds_a_step(run_dir: Path) -> float:
    """From step WARM to the step before the last, whose save the run waits for."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return float(lines[-2]["unix_seconds"] - lines[WARM - 1]["unix_seconds"]) / (len(lines) - 1 - WARM)


def measure_share(folder: Path, rounds: int) -> dict[str, Any]:
    save, blocked = Checkpoints.save, list[float]()

    def timed(self: Checkpoints, state: Any, record: Any, *, last: bool) -> None:
        jax.block_until_ready(state)
        begun = time.monotonic()
        save(self, state, record, last=last)
        if not last:
            blocked.append(time.monotonic() - begun)

    Checkpoints.save = timed  # type: ignore[method-assign]
    found: dict[int, list[float]] = {EVERY: [], 1000: []}
    for round_ in range(rounds + 1):
        for every, seconds in found.items():
            run_train(recipe_of(folder, every))
            if round_:  # the first round compiles
                seconds.append(seconds_a_step(folder / "run"))
            shutil.rmtree(folder / "run")
    saving, never = (statistics.median(found[every]) for every in (EVERY, 1000))
    return {
        "step_seconds_without_saves": never,
        "step_seconds_with_saves": saving,
        "slower": saving / never - 1,
        "blocked_seconds_a_save": statistics.median(blocked),
        "blocked": statistics.median(blocked) / (EVERY * never),
        "steps_between_saves": EVERY,
    }


def measure_start(folder: Path, rounds: int) -> dict[str, Any]:
    recipe = recipe_of(folder, 1000)
    (folder / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    found: dict[str, list[tuple[float, float]]] = {"empty": [], "filled": []}
    for _ in range(rounds):
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        for cache in found.values():
            begun = time.time()
            shutil.rmtree(folder / "run", ignore_errors=True)
            done = subprocess.run(
                [*COMMAND, str(folder / "run.yaml"), "train.stop_at_step=1"], capture_output=True, text=True, check=True
            )
            (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
            (compiled,) = re.findall(r"step compiled in ([\d.]+) s", done.stderr)
            cache.append((json.loads(line)["unix_seconds"] - begun, float(compiled)))
    start, compiling = (
        {name: statistics.median(one[at] for one in cache) for name, cache in found.items()} for at in (0, 1)
    )
    return {
        "seconds_to_first_step": start,
        "sooner": start["empty"] / start["filled"],
        "seconds_of_compiling_the_step": compiling,
        "compiling_sooner": compiling["empty"] / max(compiling["filled"], 0.1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("share", "start"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="ipt-saving-") as name:
        os.environ["IPT_COMPILE_CACHE"] = f"{name}/compiled"
        write_corpus(Path(name) / "raw", np.full(STEPS * ROWS, LENGTH + 8), "raw", seed=0)
        measure = measure_share if arguments.what == "share" else measure_start
        found = measure(Path(name), arguments.rounds)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(json.dumps(found | {"machine": machine}, indent=1))


if __name__ == "__main__":
    main()
