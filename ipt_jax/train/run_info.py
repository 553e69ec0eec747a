"""The description of a run: the lines printed at the start, and run.json.

Guarantees that both hold every choice that the recipe leaves open (attention kernel and reason, loss chunk, dtype,
mesh, fallbacks), with versions, git commit and the plan's fingerprint. No environment variable is written.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ipt_jax.config import Recipe
from ipt_jax.core.files import write_whole
from ipt_jax.data.plan import Plan, held_out_lines, plan_warnings
from ipt_jax.train.step import Program

PACKAGES = ("instruction-pretraining", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe(recipe: Recipe, plan: Plan, program: Program, processes: str) -> dict[str, Any]:
    """The content of run.json, but for its segments."""
    return {
        "recipe": recipe.model_dump(by_alias=True),
        "model": program.model.model_dump(),
        "plan": plan.summary(),
        "plan_fingerprint": plan.fingerprint,
        **program.choices,
        "processes": processes,
        "started_unix_seconds": first_start(Path(recipe.run_dir)),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the code that runs; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


SEGMENT = ("plan_fingerprint", "git_commit", "versions", "devices", "mesh", "processes")  # what a segment records


def write_record(run_dir: Path, described: dict[str, Any]) -> None:
    write_whole(run_dir / "run.json", json.dumps(described, indent=1, ensure_ascii=False).encode())


def first_start(run_dir: Path) -> float:
    """When the run was started for the first time, in Unix seconds: now where run.json does not say."""
    try:
        described = json.loads((run_dir / "run.json").read_bytes())
    except (FileNotFoundError, ValueError):  # this start writes it
        return time.time()
    return float(described.get("started_unix_seconds", time.time()))


def write_best(run_dir: Path, loss: float, step: int) -> None:
    """Adds the lowest held-out loss and its step to run.json."""
    described = json.loads((run_dir / "run.json").read_bytes())
    write_record(run_dir, described | {"best": {"step": step, "held_out_loss": loss}})


def copy_tokenizer(plan: Plan, run_dir: Path) -> None:
    """The tokenizer travels with the run, so that an export finds it."""
    if not plan.tokenizer_dir.is_dir():
        report(f"no tokenizer files in {plan.tokenizer_dir}: an export of this run will lack them")
        return
    target = run_dir / "tokenizer"
    target.mkdir(exist_ok=True)
    for file in sorted(plan.tokenizer_dir.iterdir()):
        write_whole(target / file.name, file.read_bytes())


def report_start(described: dict[str, Any], run_dir: Path, start_step: int, steps: int) -> None:
    """The choices, for people."""
    plan = described["plan"]
    report(f"{run_dir}: step {start_step} of {steps}, {plan['tokens']:,} tokens, plan {plan['fingerprint'][:12]}")
    moments = described["recipe"]["optimizer"]["moments_dtype"]
    dtypes = f"{described['compute_dtype']} compute, {described['reduce_dtype']} reduction of gradients, "
    dtypes += f"float32 parameters, {moments} moments"
    report(f"model: {described['parameters']:,} parameters, {dtypes}")
    report(f"devices: {described['devices']}, {described['processes']}, mesh {described['mesh']}")
    report(f"attention: {described['attention']} ({described['attention_reason']}); remat: {described['remat']}")
    rows, accumulation = described["rows_per_step"], described["accumulation"]
    report(f"batch: {rows} rows of {plan['seq_len']}, {accumulation} accumulation steps")
    report(f"loss: logits of {described['loss_chunk']} tokens a device at a time ({described['loss_chunk_reason']})")
    report(f"state: {described['state_bytes_per_device'] / 2**20:,.1f} MiB a device")
    for line in [*held_out_lines(plan), *plan_warnings(plan)]:
        report(line)
    for note in described["fallbacks"]:
        report(f"fallback: {note}")


def report(line: str) -> None:
    print(f"ipt train: {line}", file=sys.stderr, flush=True)
