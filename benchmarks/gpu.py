"""Measure one GPU: attention numerics, train-step speed, rivals, synthesis and a roofline by part of the step.

    python benchmarks/gpu.py                                   # all parts, at most 8 minutes
    python benchmarks/gpu.py --parts speed,rivals --minutes 5  # some parts; what does not fit the time is dropped
    python benchmarks/gpu.py --tiny                            # every part at toy size on a CPU, at most 2 minutes

Prints one table and writes all figures to a JSON file after every measurement, so a killed run keeps what it has. Each
measurement is a child process: a crash or a full memory costs one row. Our step is the one that `ipt train` runs, with
bfloat16 compute, float32 parameters and float32 moments, on rows of 2,048 random tokens; the loader is not included.
MFU is model FLOPs (recomputation not counted) over the data sheet's dense bfloat16 peak.

The machine needs JAX with its GPU, flax, optax, orbax-checkpoint and, for two rivals, torch and transformers. If one of
the packages in launch/wheels.txt is absent, the script names it and stops; docs/howto/offline.md has the commands
that install them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from gpu_parts import Context, Row, ceilings, numbers, roofline, speed, synthesis  # noqa: E402
from gpu_rivals import RIVALS, rivals  # noqa: E402

WHEELS = ROOT / "launch" / "wheels.txt"
PARTS = {"numbers": numbers, "speed": speed, "rivals": rivals, "synthesis": synthesis, "roofline": roofline}

# ---- the parent: children in order of what matters most, within the time


@dataclass(frozen=True)
class Unit:
    """A child process and the seconds it takes on an H100."""

    part: str
    argument: str
    seconds: float


def units(parts: list[str], tiny: bool) -> list[Unit]:
    """The children of a run, the most wanted first."""
    if tiny:
        every = [
            Unit("numbers", "", 1), Unit("speed", "tiny", 1), Unit("roofline", "tiny", 1), Unit("synthesis", "", 1),
            *(Unit("rivals", f"{name} tiny", 1) for name in RIVALS),
        ]  # fmt: skip
    else:
        every = [
            Unit("speed", "1.3b", 115), Unit("rivals", "torch-compile 1.3b", 100), Unit("roofline", "1.3b", 25),
            Unit("synthesis", "", 65), Unit("speed", "500m", 60), Unit("rivals", "torch-compile 500m", 70),
            Unit("rivals", "torch-eager 1.3b", 30), Unit("rivals", "naive 1.3b", 30), Unit("numbers", "", 60),
            Unit("rivals", "torch-eager 500m", 25), Unit("rivals", "naive 500m", 25),
        ]  # fmt: skip
    return [Unit("ceilings", "", 10), *(unit for unit in every if unit.part in parts)]


def run_units(todo: list[Unit], deadline: float, work: Path, tiny: bool, save: Callable[[list[Row]], None]) -> None:
    """Runs one child after the other; `save` gets all rows so far after every row."""
    rows: list[Row] = []
    for unit in todo:
        left = deadline - time.monotonic()
        if unit.seconds > left:
            rows.append({"part": unit.part, "case": unit.argument, "note": f"dropped: {left:.0f} s left"})
            save(rows)
            continue
        begun = time.monotonic()
        ceilings = next((row for row in rows if row["part"] == "ceilings"), {})
        for row in child_rows(unit, left, work, tiny, ceilings):
            rows.append(row)
            save(rows)
        print(f"gpu: {unit.part} {unit.argument} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def child_rows(unit: Unit, limit: float, work: Path, tiny: bool, ceilings: Row) -> Iterator[Row]:
    """The rows that a child prints, or one row with the reason if it fails or exceeds the time."""
    command = [sys.executable, __file__, "--child", unit.part, "--argument", unit.argument, "--work", str(work)]
    command += ["--ceilings", json.dumps(ceilings), *(["--tiny"] if tiny else [])]
    log = work / f"{unit.part}-{unit.argument.replace(' ', '-') or 'all'}.log"
    with log.open("w") as errors:
        env = environment(work, tiny)
        if unit.part == "numbers":  # which kernel is fastest is of no interest, and finding out takes a minute
            env["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
        child = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=errors)
        timer = threading.Timer(limit, child.kill)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield {"part": unit.part, **json.loads(line)}
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()
    if code:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        reason = "out of time" if code == -9 else f"exit {code}: {tail[0][:200]}"
        yield {"part": unit.part, "case": unit.argument, "note": f"failed, {reason}"}


def environment(work: Path, tiny: bool) -> dict[str, str]:
    """What `launch/pretrain.sh` sets, and one compilation cache for all children."""
    env = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "JAX_PLATFORMS": "cuda",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    } | dict(os.environ)
    return env | ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""} if tiny else {})


# ---- the table and the command line


def table(rows: list[Row]) -> str:
    """One table of all rows."""
    head = ("part", "case", "tokens/s", "MFU", "step s", "peak GiB", "predicted", "compile s", "note")
    body = [
        (
            row["part"], row["case"], number(row.get("tokens_per_second"), ",.0f"), number(row.get("mfu"), ".1%"),
            number(row.get("step_seconds"), ".4f"), gib(row.get("peak_bytes")), gib(row.get("predicted_peak_bytes")),
            number(row.get("compile_seconds"), ".1f"), row.get("note", ""),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = []
    for line in [head, *body]:
        cells = [
            text.ljust(width) if column in (0, 1, 8) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"


def missing_wheels() -> list[str]:
    """Packages of launch/wheels.txt that this Python lacks."""
    lines = (line.strip() for line in WHEELS.read_text(encoding="utf-8").splitlines())
    wheels = [line for line in lines if line and not line.startswith("#")]
    return [wheel for wheel in wheels if importlib.util.find_spec(wheel.replace("-", "_")) is None]


def child(part: str, context: Context) -> None:
    """Prints each row as a JSON line; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = ceilings if part == "ceilings" else PARTS[part]
    for row in run(context):
        print(json.dumps(row), file=answers)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit in minutes (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for logs, programs and profiles (default: a temporary one)")
    for hidden in ("--child", "--argument", "--ceilings"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: unknown part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    if not given.output.parent.is_dir():
        parser.error(f"--output: the folder {given.output.parent} does not exist")
    return given


def main() -> None:
    given = arguments()
    if given.child:
        child(given.child, Context(given.argument, given.work, given.tiny, json.loads(given.ceilings)))
        return
    missing = missing_wheels()
    if missing:
        advice = "install them as docs/howto/offline.md says"
        print(f"gpu: packages are missing: {' '.join(missing)}; {advice}", file=sys.stderr)
        sys.exit(2)
    deadline = time.monotonic() + 60 * given.minutes
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"date": started, "python": platform.python_version(), "versions": versions(), "rows": []}

    def save(rows: list[Row]) -> None:
        report["rows"] = rows
        given.output.write_text(json.dumps(report, indent=1))

    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipt-gpu-")))
        work.mkdir(parents=True, exist_ok=True)
        run_units(units(given.parts.split(","), given.tiny), deadline, work, given.tiny, save)
        shutil.rmtree(work / "cache", ignore_errors=True)
    print(table(report["rows"]))
    if all("note" in row and row["note"].startswith(("failed", "dropped")) for row in report["rows"][1:]):
        sys.exit("gpu: nothing was measured; see the rows above for the reason")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "nvidia-cudnn-cu13", "nvidia-cublas"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
