"""The tables of docs/compile.md: the train step of four models compiled for six topologies, none of which is here.

    python benchmarks/compile_table.py --ipt .venv-compile/bin/ipt -o docs/compile.md

Each line is one `ipt compile … --json` in a child process. Results lie in out/compile/ and are not made twice, so a
run that was stopped goes on; delete the folder after a change to the step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/pretrain/1.3b_vanilla.yaml"
TOPOLOGIES = ("h100:8", "h100:64", "a100:8", "v5e:4x4", "v5p:4x4x4", "v6e:4x4")
# Model: row length, and rows a device for each topology. Stated, not searched: `--fit` searches.
MODELS: dict[str, tuple[int, tuple[int, ...]]] = {
    "mistral-500m": (2048, (32, 32, 32, 16, 32, 16)),
    "mistral-1.3b": (2048, (16, 16, 16, 8, 16, 8)),
    "mistral-7b": (8192, (2, 2, 2, 1, 2, 1)),
    "llama3-8b": (8192, (2, 2, 2, 1, 2, 1)),
}


HEAD = (
    "| devices | rows a device | batch tokens | arguments GiB | temporaries GiB | peak GiB (of usable) | "
    "attention calls | all-gather MB (ratio) | reduce-scatter MB (ratio) | compile s |"
)
RULE = "|---" * 10 + "|"


def compiled(ipt: str, model: str, topology: str, seq_len: int, rows: int, cache: Path) -> dict[str, Any]:
    path = cache / f"{model}_{topology.replace(':', '_')}_{rows}.json"
    if path.exists():
        return json.loads(path.read_text())
    devices = 1
    for side in topology.split(":")[1].split("x"):
        devices *= int(side)
    command = [
        ipt, "compile", CONFIG, f"model.preset={model}", f"data.seq_len={seq_len}",
        f"train.microbatch={rows}", f"train.batch_tokens={rows * devices * seq_len}", "--topology", topology, "--json",
    ]  # fmt: skip
    print(f"{model} on {topology} …", end=" ", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    result = json.loads(done.stdout)
    print(f"{result['peak_bytes_per_device'] / 2**30:.2f} GiB, {result['compile_seconds']} s", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(done.stdout)
    return result


def line(result: dict[str, Any], topology: str) -> str:
    gib = 2**30
    head = f"| {topology} | {result['microbatch']} | {result['batch_tokens']:,} |"
    if "argument_bytes" not in result:
        return f"{head} – | – | {result['peak_bytes_per_device'] / gib:.2f}: does not fit | – | – | – | – |"
    calls = result["attention_calls"].get(result["attention"], {"forward": 0, "backward": 0})
    moved = [
        f"{total['bytes'] / 1e6:,.0f} ({total['bytes'] / result['ideal'][kind]:.3f})"
        for kind in ("all-gather", "reduce-scatter")
        for total in [result["collectives"].get(kind, {"bytes": 0})]
    ]
    share = result["peak_bytes_per_device"] / result["usable_bytes"]
    return (
        f"{head} {result['argument_bytes'] / gib:.2f} | {result['temporary_bytes'] / gib:.2f} | "
        f"**{result['peak_bytes_per_device'] / gib:.2f}** ({share:.0%}) | "
        f"{result['attention']} {calls['forward']} + {calls['backward']} | {moved[0]} | {moved[1]} | "
        f"{result['compile_seconds']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipt", default="ipt", help="of the environment with compile-gpu and compile-tpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("-o", "--output", type=Path, help="a page whose tables are replaced (default: stdout)")
    options = parser.parse_args()
    tables = []
    for model in options.models.split(","):
        seq_len, rows = MODELS[model]
        wanted = [one for one in zip(TOPOLOGIES, rows, strict=True) if one[0] in options.topologies.split(",")]
        results = [
            (topology, compiled(options.ipt, model, topology, seq_len, each, ROOT / "out" / "compile"))
            for topology, each in wanted
        ]
        first = results[0][1]
        flops = f"{first['model_flops_per_token'] / 1e9:.2f} GFLOP a token"
        title = f"### {model}: {first['params']:,} parameters, rows of {seq_len:,}, {flops}"
        tables += [title, "", HEAD, RULE, *(line(result, topology) for topology, result in results), ""]
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    tables += [f"Compiled on {datetime.date.today()}, {machine}, no accelerator; compile seconds beside other work."]
    text = "\n".join(tables) + "\n"
    if options.output is None:
        print(text)
        return
    begin, end = "<!-- tables: made by benchmarks/compile_table.py -->\n", "<!-- end of tables -->\n"
    page = options.output.read_text(encoding="utf-8")
    before, after = page.split(begin)[0], page.split(end)[1]
    options.output.write_text(before + begin + text + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
