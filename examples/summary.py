"""Print the summary tables of launch/quickstart.sh from the results of its steps.

python examples/summary.py STEPS
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def main() -> None:
    steps = Path(sys.argv[1])
    found = {path.stem: json.loads(path.read_text()) for path in steps.glob("*.json")}
    console = Console(highlight=False)
    console.print()
    console.print(synthesis_table(found))
    console.print(training_table(found))


def synthesis_table(found: dict[str, Any]) -> Table:
    judge, synth = found["judge"], found["synth"]
    table = Table(title="Pairs that the miniature synthesizer wrote on articles it never saw", title_justify="left")
    for name in ("texts", "pairs", "pairs per text", "well-formed", "right by the world's facts"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{synth['texts']:,}",
        f"{synth['pairs']:,}",
        f"{judge['pairs_per_text']:.1f}",
        f"{judge['well_formed']:.1%}",
        f"{judge['right']:.1%}",
    )
    return table


def training_table(found: dict[str, Any]) -> Table:
    table = Table(title="Pre-training from scratch at equal tokens, then closed-book questions", title_justify="left")
    table.add_column("run")
    for name in ("tokens", "mix", "loss", "choice (chance 25%)", "answer in words"):
        table.add_column(name, justify="right")
    for run, short in (("vanilla", "v"), ("instruct", "i")):
        plan, train, scores = found[f"plan-{short}"], found[run], found[f"eval-{short}"]["tasks"]
        mix = ", ".join(f"{source['name']} {source['share']:.0%}" for source in plan["sources"])
        cells = [f"{train['tokens']:,}", mix, f"{train['loss']:.3f}", *(score(scores[task]) for task in TASKS)]
        table.add_row(run, *cells)
    return table


TASKS = ("choice", "answer")


def score(task: dict[str, Any]) -> str:
    return f"{task['value']:.1%} ± {task['stderr']:.1%}"


if __name__ == "__main__":
    main()
