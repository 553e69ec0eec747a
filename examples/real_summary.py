"""Print the summary table of launch/real.sh: synthesized pairs, and the loss before and after 20 steps.

python examples/real_summary.py OUT
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> None:
    out = Path(sys.argv[1])
    steps = {path.stem: json.loads(path.read_text()) for path in (out / "steps").glob("*.json")}
    losses = [json.loads(line)["loss"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    synth, plan, greedy = steps["synth"], steps["plan"], steps["greedy"]
    rejected = sum(synth["rejected"].values())
    accepted = synth["pairs"]
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    table = Table(show_header=False, title="The real slice", title_justify="left")
    table.add_row("texts", f"{synth['texts']:,}")
    table.add_row("pairs per text", f"{accepted / max(synth['texts'], 1):.2f}")
    table.add_row("well-formed", f"{accepted / max(accepted + rejected, 1):.1%} of {accepted + rejected:,}")
    table.add_row("refused", ", ".join(f"{reason} {count}" for reason, count in synth["rejected"].items()) or "none")
    table.add_row("mix by tokens", ", ".join(f"{one['name']} {one['share']:.1%}" for one in plan["sources"]))
    table.add_row("loss", f"{losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}")
    table.add_row("", f"mean of four: {first:.3f} before, {last:.3f} after")
    table.add_row("same greedy tokens", f"{greedy['equal']} of {greedy['prompts']} texts x {greedy['tokens']} tokens")
    Console(highlight=False).print(table)
    print(f"model    {(out / 'model').resolve()} (Hugging Face)\npairs    synth inspect {out / 'groups'}")


if __name__ == "__main__":
    main()
