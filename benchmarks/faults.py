"""Damage checkpoints of training runs, kill and stop such runs, and compare each with an undisturbed run, bit by bit.

    python benchmarks/faults.py damage --count 200                  200 single-bit flips, then 200 truncations
    python benchmarks/faults.py stop --count 50                     SIGKILL at random moments, saves included
    python benchmarks/faults.py stop --count 50 --processes 2       two processes of four devices; one is killed first
    python benchmarks/faults.py stop --signal SIGTERM --count 12    a signal that saves and ends the run
    python benchmarks/faults.py stop --change --count 12            within a run whose mix, batch and rate change

`damage` changes one bit of one file of the newest checkpoint, or truncates a file. All files are drawn alike. Then it
trains on: the damaged file has to be named, the checkpoint before it used, and the final state equal. `stop` strikes
one run ten times, each time at the start (SIGKILL only), after some progress or within a save, then lets it finish.
With `--change`, runs continue a finished one of 9 steps with other settings.
Prints counts, and exits with code 1 if anything is wrong. The model has 1M parameters, on eight virtual CPU devices.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from token_corpus import write_corpus

from ipt_jax.config import Recipe
from ipt_jax.core.checkpoint_digests import damage, numbered
from ipt_jax.core.checkpoint_path import LiteralPath
from ipt_jax.parallel.distributed import ADDRESSES
from ipt_jax.train.trainer import run_train

MODEL = {
    "vocab_size": 32_000, "hidden_size": 32, "layers": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "tie_embeddings": True,
}  # fmt: skip
ROWS, LENGTH = 16, 32
SHORT, LONG = 11, 40  # steps of a damaged run, and of one that is stopped
STRIKES = 10  # a run, before it may finish
LONGEST_WAIT = 2.0  # seconds from progress to the strike
CLOCKS = "tokens_per_second step_seconds data_seconds train_seconds goodput unix_seconds mfu".split()
BEFORE = ("train.batch_tokens=1024", f"data.sources.0.tokens={9 * 1024}", "optimizer.learning_rate=0.001")
COMMAND = [sys.executable, "-c", "from ipt_jax.cli import main; main()", "train"]


def recipe_of(folder: Path, steps: int, every: int) -> Recipe:
    source = {"name": "raw", "path": str(folder / "raw"), "tokens": steps * ROWS * LENGTH}
    return Recipe.model_validate({
        "model": MODEL,
        "data": {"seq_len": LENGTH, "sources": [source]},
        "train": {"batch_tokens": ROWS * LENGTH, "log_every": 1, "checkpoint_every": every},
        "mesh": {"fsdp": 8},
        "run_dir": str(folder / "run"),
    })  # fmt: skip


def state_of(run_dir: Path) -> list[np.ndarray]:
    """Weights and moments of the newest checkpoint, whatever the devices that saved it."""
    (newest, *_) = numbered(run_dir / "checkpoints")
    found = []
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("params", "optimizer"):
            path = LiteralPath(newest / item)
            tree = reader.metadata(path).item_metadata.tree
            as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            found += jax.tree.leaves(reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_arrays)))
    return found


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def same(run_dir: Path, state: list[np.ndarray], lines: list[dict[str, Any]]) -> bool:
    ours = state_of(run_dir)
    equal = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, state, strict=True))
    return equal and lines_of(run_dir) == lines


# ---- damaged files


def damage_checkpoints(folder: Path, count: int, rng: Random) -> Counter[str]:
    recipe = recipe_of(folder, SHORT, every=4)
    run_dir, straight = Path(recipe.run_dir), folder / "straight"
    run_train(recipe)
    run_dir.rename(straight)
    state, lines, found = state_of(straight), lines_of(straight), Counter[str]()
    newest, before = (path.name for path in numbered(straight / "checkpoints"))
    files = sorted(file for file in (straight / "checkpoints" / newest).rglob("*") if file.is_file())
    for number, kind in enumerate(["flip"] * count + ["truncation"] * count):
        shutil.copytree(straight, run_dir)
        file = run_dir / rng.choice(files).relative_to(straight)
        hurt(file, kind, rng)
        with (folder / "said.txt").open("w") as said, contextlib.redirect_stderr(said):
            run_train(recipe)
        lines_said = (folder / "said.txt").read_text()
        name = file.relative_to(run_dir / "checkpoints" / newest)
        found[kind] += 1
        found["not named"] += f"checkpoint {newest} is skipped: {name} " not in lines_said
        found["not resumed from the one before"] += f"resumes from step {before}," not in lines_said
        found["final state differs"] += not same(run_dir, state, lines)
        shutil.rmtree(run_dir)
        if number % 50 == 49:
            print(f"{number + 1} of {2 * count}", file=sys.stderr)
    return found


def hurt(file: Path, kind: str, rng: Random) -> None:
    size = file.stat().st_size
    if kind == "truncation":
        os.truncate(file, rng.randrange(size))
        return
    bit = rng.randrange(8 * size)
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


# ---- killed and stopped runs


def start(folder: Path, processes: int, run_dir: Path, *words: str) -> list[subprocess.Popen[bytes]]:
    """All processes of a run with these overrides; their output goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    fixed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // processes)}
    fixed["IPT_COMPILE_CACHE"] = str(folder / "compiled")
    children = []
    for process in range(processes):
        names = dict(zip(ADDRESSES, (address, str(process), str(processes)), strict=True)) if processes > 1 else {}
        with (folder / f"log-{process}.txt").open("wb") as log:
            children.append(
                subprocess.Popen(
                    [*COMMAND, str(folder / "run.yaml"), f"run_dir={run_dir}", "--change", *words],
                    env=os.environ | fixed | names, stdout=log, stderr=log,
                )
            )  # fmt: skip
    return children


def finish(folder: Path, processes: int, run_dir: Path, *words: str) -> None:
    children = start(folder, processes, run_dir, *words)
    if any([child.wait(timeout=600) for child in children]):
        print("".join((folder / f"log-{process}.txt").read_text()[-3000:] for process in range(processes)))
        sys.exit(f"{run_dir} does not finish")


def saving(run_dir: Path) -> bool:
    return any(".saving" in entry.name for entry in (run_dir / "checkpoints").glob("*"))


def progress(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else 0


def wait_for_moment(children: list[subprocess.Popen[bytes]], run_dir: Path, seconds: float, rng: Random) -> None:
    """Returns at a random moment, or when the run has ended. `seconds` is how long a start takes; 0: not then."""
    drawn, before = rng.random(), progress(run_dir)
    if drawn < 0.15 and seconds:
        return time.sleep(rng.uniform(0, seconds))
    while progress(run_dir) == before or (drawn < 0.6 and not saving(run_dir)):
        if any(child.poll() is not None for child in children):
            return None
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3 if drawn < 0.6 else LONGEST_WAIT))


def strike(children: list[subprocess.Popen[bytes]], number: signal.Signals, rng: Random) -> list[int]:
    """The exit codes. A process of two is struck first; SIGKILL meets the other within a second, as a job ends."""
    for place, child in enumerate(rng.sample(children, len(children))):
        if place == 0 or number == signal.SIGKILL:
            time.sleep(place * rng.random())
            child.send_signal(number)
    return [child.wait(timeout=300) for child in children]


def stop_runs(
    folder: Path, count: int, processes: int, number: signal.Signals, change: bool, rng: Random, deadline: float
) -> Counter[str]:
    recipe = recipe_of(folder, LONG, every=3)
    (folder / "run.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_unset=True))
    finish(folder, processes, folder / "warm-up")  # compiles

    def begin(run_dir: Path) -> Path:
        if change:
            shutil.copytree(folder / "before", run_dir)
        return run_dir

    if change:
        finish(folder, processes, folder / "before", *BEFORE)
    started = time.monotonic()
    finish(folder, processes, begin(folder / "straight"))
    seconds = (time.monotonic() - started) / 2 if number == signal.SIGKILL else 0.0
    state, lines, found = state_of(folder / "straight"), lines_of(folder / "straight"), Counter[str]()
    while found["strikes"] < count and time.monotonic() < deadline:
        run_dir = begin(folder / f"run-{found['runs']}")
        for _ in range(min(STRIKES, count - found["strikes"])):
            if time.monotonic() > deadline:
                break
            children = start(folder, processes, run_dir)
            wait_for_moment(children, run_dir, seconds, rng)
            if any(child.poll() is not None for child in children):
                for child in children:
                    child.wait(timeout=300)
                break  # it was over before the strike
            inside = saving(run_dir)
            codes = strike(children, number, rng)
            found["strikes"] += 1
            found["within a save"] += inside
            expected = 0 not in codes if number == signal.SIGKILL else {143, 0} >= set(codes)  # a lost peer: 1 or 134
            found["unexpected exit codes"] += not expected
        finish(folder, processes, run_dir)
        found["runs"] += 1
        found["final state differs"] += not same(run_dir, state, lines)
        found["damaged checkpoints"] += len(list((run_dir / "checkpoints").glob("*.damaged*")))
        found["leftovers"] += len([entry for entry in (run_dir / "checkpoints").iterdir() if not entry.name.isdigit()])
        found["damaged checkpoints"] += sum(damage(step) is not None for step in numbered(run_dir / "checkpoints"))
        shutil.rmtree(run_dir)
        print(f"{found['strikes']} of {count}", file=sys.stderr)
    return found


GOOD = ("flip", "truncation", "strikes", "within a save", "runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("damage", "stop"))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--signal", type=signal.Signals.__getitem__, default=signal.SIGKILL, help="default SIGKILL")
    parser.add_argument("--change", action="store_true", help="strike runs whose settings have changed")
    parser.add_argument("--seed", type=int, default=0, help="of files, bits and moments")
    parser.add_argument("--minutes", type=float, default=1e9, help="strike no more after this time")
    arguments = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns of metadata that it does not need
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    begun, rng = time.monotonic(), Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="ipt-faults-") as name:
        folder = Path(name)
        os.environ["IPT_COMPILE_CACHE"] = str(folder / "compiled")
        write_corpus(folder / "raw", np.full(LONG * ROWS, LENGTH + 8), "raw", seed=0)
        if arguments.what == "damage":
            found = damage_checkpoints(folder, arguments.count, rng)
        else:
            found = stop_runs(
                folder, arguments.count, arguments.processes, arguments.signal, arguments.change, rng,
                begun + 60 * arguments.minutes,
            )  # fmt: skip
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{' '.join(sys.argv[1:])}: {time.monotonic() - begun:.0f} s ({where})")
    for what, number in found.items():
        print(f"  {number:4d}  {what}")
    sys.exit(any(number for what, number in found.items() if what not in GOOD))


if __name__ == "__main__":
    main()
