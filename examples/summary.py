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
    figures = {
        "texts": f"{synth['texts']:,}",
        "pairs": f"{synth['pairs']:,}",
        "pairs per text": f"{judge['pairs_per_text']:.1f}",
        "well-formed": f"{judge['well_formed']:.1%}",
        "right by the world's facts": f"{judge['right']:.1%}",
    }
    return table("Pairs that the miniature synthesizer wrote on articles it never saw", [figures])


def training_table(found: dict[str, Any]) -> Table:
    rows = []
    for run, short in (("mix", "m"), ("instruct", "i")):
        plan, train, scores = found[f"plan-{short}"], found[run], found[f"eval-{short}"]["tasks"]
        mix = ", ".join(f"{source['name']} {source['share']:.0%}" for source in plan["sources"])
        figures = {"run": run, "tokens": f"{train['tokens']:,}", "mix": mix, "loss": f"{train['loss']:.3f}"}
        rows.append({**figures, **{heading: score(scores[task]) for heading, task in TASKS.items()}})
    return table("Pre-training from scratch at equal tokens, then closed-book questions", rows)


def table(title: str, rows: list[dict[str, str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for heading in rows[0]:
        made.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        made.add_row(*row.values())
    return made


TASKS = {"choice (chance 10%)": "choice", "answer in words": "answer"}


def score(task: dict[str, Any]) -> str:
    return f"{task['value']:.1%} ± {task['stderr']:.1%}"


if __name__ == "__main__":
    main()
