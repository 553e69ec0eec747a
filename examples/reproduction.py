"""Parts of launch/reproduce.sh.

    python examples/reproduction.py pairs DOCUMENTS OUTPUT.jsonl
    python examples/reproduction.py results STEPS

`pairs` writes the documents of `synth render` that hold detached pairs, without the texts. `results` prints the tables
of docs/reproduction.md in Markdown, with date, machine and commit, from the results of the steps.
"""

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from ipt_jax.ablate.comparison import difference_table, score_table
from ipt_jax.corpus import read_documents


def main() -> None:
    match sys.argv[1:]:
        case ["pairs", documents, output]:
            print(json.dumps(select_pairs(documents, Path(output))))
        case ["results", steps]:
            print("\n".join(results(Path(steps))))
        case _:
            sys.exit(__doc__)


def select_pairs(documents: str, output: Path) -> dict[str, int]:
    rows = [
        {"id": one.id, "text": "".join(segment.text for segment in one.segments)}
        for one in read_documents(documents)
        if one.meta.get("layout") == "detached"
    ]
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {"documents": len(rows)}


def results(steps: Path) -> list[str]:
    found: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in steps.glob("*.json")}
    main, judge = found["main"], found["judge"]
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    made = f"Python {main['versions']['python']}, jax {main['versions']['jax']}"
    lines = [
        f"{datetime.date.today()}, {machine}, {made}, commit {main['git_commit']}, seeds {main['seeds']}.",
        "",
        f"Pairs of the synthesizer: {judge['pairs']:,}, {judge['right']:.1%} right by the facts of the world.",
    ]
    for name in ("main", "layouts"):
        for title, head, rows in (score_table(found[name]), difference_table(found[name])):
            lines += ["", f"{title} (`{name}`):", "", *markdown(head, rows)]
    return lines


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
