"""Write the tables of docs/reference/compile.md: the train step of four models compiled for six absent topologies, and
the predicted speed of every recipe on eight H100s.

    python benchmarks/compile_table.py --ipt .venv-compile/bin/ipt -o docs/reference/compile.md
    python benchmarks/compile_table.py --ipt .venv-compile/bin/ipt -o docs/reference/compile.md --tables recipes

Each line is one `ipt compile … --json` in a child process. Results are stored in out/compile/. Rerun the same command
to resume. Delete the folder after a change to the step.
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
# Recipes, and overrides where a model is read from a folder: the preset has the same shapes.
RECIPES: dict[str, tuple[str, ...]] = {
    f"configs/pretrain/{name}.yaml": ()
    for name in ("500m_vanilla", "500m_mix", "500m_instruct", "1.3b_vanilla", "1.3b_mix", "1.3b_instruct")
} | {"configs/synthesizer/mistral_7b.yaml": ("model={preset: mistral-7b}",)}
RECIPES_TOPOLOGY = "h100:8"
TABLES = ("recipes", "tables")  # names of the page's markers

HEAD = (
    "| devices | rows a device | batch tokens | arguments GiB | temporaries GiB | peak GiB (of usable) | "
    "attention calls | all-gather MB (ratio) | reduce-scatter MB (ratio) | compile s |"
)
RULE = "|---" * 10 + "|"


def compiled(ipt: str, config: str, overrides: tuple[str, ...], topology: str, path: Path) -> dict[str, Any]:
    """The result of one compilation, kept at `path`."""
    if path.exists():
        return json.loads(path.read_text())
    command = [ipt, "compile", config, *overrides, "--topology", topology, "--json"]
    print(f"{path.stem} …", end=" ", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    result = json.loads(done.stdout)
    print(f"{result['peak_bytes_per_device'] / 2**30:.2f} GiB, {result['compile_seconds']} s", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(done.stdout)
    return result


def compiled_model(ipt: str, model: str, topology: str, seq_len: int, rows: int) -> dict[str, Any]:
    devices = 1
    for side in topology.split(":")[1].split("x"):
        devices *= int(side)
    overrides = (
        "train.remat=full", f"model.preset={model}", f"data.seq_len={seq_len}",
        f"train.microbatch={rows}", f"train.batch_tokens={rows * devices * seq_len}",
    )  # fmt: skip
    path = ROOT / "out" / "compile" / f"{model}_{topology.replace(':', '_')}_{rows}.json"
    return compiled(ipt, CONFIG, overrides, topology, path)


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


def models_tables(ipt: str, models: list[str], topologies: list[str]) -> list[str]:
    tables = []
    for model in models:
        seq_len, rows = MODELS[model]
        wanted = [one for one in zip(TOPOLOGIES, rows, strict=True) if one[0] in topologies]
        results = [(topology, compiled_model(ipt, model, topology, seq_len, each)) for topology, each in wanted]
        first = results[0][1]
        flops = f"{first['model_flops_per_token'] / 1e9:.2f} GFLOP a token"
        title = f"### {model}: {first['params']:,} parameters, rows of {seq_len:,}, {flops}"
        tables += [title, "", HEAD, RULE, *(line(result, topology) for topology, result in results), ""]
    return tables


def recipes_table(ipt: str) -> list[str]:
    """What each recipe is predicted to reach on RECIPES_TOPOLOGY."""
    head = (
        f"| recipe on {RECIPES_TOPOLOGY} | batch tokens | rows a GPU x steps | remat | peak GiB | predicted step s | "
        "predicted tokens/s | predicted tokens/s a GPU | predicted MFU | predicted limit | "
        "predicted s: products, memory, exposed collectives | "
        "predicted share: attention, feed-forward, loss, optimizer |"
    )
    lines = []
    for config, overrides in RECIPES.items():
        name = Path(config).stem
        path = ROOT / "out" / "compile" / f"recipe_{name}_{RECIPES_TOPOLOGY.replace(':', '_')}.json"
        lines.append(recipe_line(name, compiled(ipt, config, overrides, RECIPES_TOPOLOGY, path)))
    return [
        head,
        "|---" * 12 + "|",
        *lines,
        "",
        "Predicted from rates measured on one H100; eight in one node have not been met.",
    ]


def recipe_line(name: str, result: dict[str, Any]) -> str:
    seconds = result["predicted_step_seconds"]
    spent = [result[f"predicted_{limit}_seconds"] for limit in ("products", "memory", "exposed_collective")]
    parts = [
        result["predicted_parts"][part]["seconds"] / seconds
        for part in ("attention", "feed_forward", "loss", "optimizer")
    ]
    return (
        f"| {name} | {result['batch_tokens']:,} | {result['microbatch']} x {result['accumulation']} | "
        f"{result['remat']} | {result['peak_bytes_per_device'] / 2**30:.2f} | **{seconds:.3f}** | "
        f"{result['predicted_tokens_per_second']:,.0f} | {result['predicted_tokens_per_second_per_device']:,.0f} | "
        f"{result['predicted_mfu']:.1%} | {result['predicted_limit']} | "
        f"{', '.join(f'{one:.3f}' for one in spent)} | {', '.join(f'{part:.0%}' for part in parts)} |"
    )


def replaced(page: str, name: str, text: str) -> str:
    """`page` with the text between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: made by benchmarks/compile_table.py -->\n", f"<!-- end of {name} -->\n"
    return page.split(begin)[0] + begin + text + end + page.split(end)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipt", default="ipt", help="of the environment with compile-gpu and compile-tpu")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: both")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("-o", "--output", type=Path, help="a page whose tables are replaced (default: stdout)")
    options = parser.parse_args()
    makers = {
        "recipes": lambda: recipes_table(options.ipt),
        "tables": lambda: models_tables(options.ipt, options.models.split(","), options.topologies.split(",")),
    }
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    dated = f"Compiled on {datetime.date.today()}, {machine}, no accelerator; compile seconds under other load."
    page = options.output.read_text(encoding="utf-8") if options.output else ""
    for name in options.tables:
        text = "\n".join([*makers[name](), dated]) + "\n"
        if options.output is None:
            print(text)
        else:
            page = replaced(page, name, text)
            options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
