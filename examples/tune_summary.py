"""Print the table of launch/tune_synthesizer.sh: the scores of each synthesizer on each data set.

python examples/tune_summary.py EVAL [--markdown]
"""

import argparse
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from synth.evaluate.quality import TABLES, cell

ORDER = ("untuned", "zero-shot", "few-shot", "rules")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("eval", type=Path, help="directory with one output of synth eval per synthesizer")
    parser.add_argument("--markdown", action="store_true", help="print Markdown (default: tables for a terminal)")
    options = parser.parse_args()
    found = {
        name: json.loads(path.read_text()) for name in ORDER if (path := options.eval / name / "results.json").exists()
    }
    sets = list(dict.fromkeys(name for results in found.values() for name in results["sets"]))
    console = Console(highlight=False, width=200 if options.markdown else None)
    for title, columns in TABLES.items():
        table = Table(title=title, title_justify="left", box=box.MARKDOWN if options.markdown else None)
        for heading in ("data set", "synthesizer", *(heading for _, heading, _ in columns)):
            table.add_column(heading, overflow="fold")
        for data_set in sets:
            for name, results in found.items():
                if data_set in results["sets"]:
                    table.add_row(data_set, name, *(cell(results["sets"][data_set], *column) for column in columns))
        console.print(table, "")


if __name__ == "__main__":
    main()
