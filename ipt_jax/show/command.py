"""Shows rows of a recipe's plan in the terminal, or as one self-contained HTML page."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from ipt_jax.corpus.files import write_whole, writing
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.tokenizer import load_tokenizer
from ipt_jax.data.plan import Plan
from ipt_jax.show.page import html_page
from ipt_jax.show.rows import ShownRow, read_rows
from ipt_jax.show.terminal import print_rows


def run_show(plan: Plan, output: Path | None, *, step: int, rows: int, quiet: bool) -> dict[str, Any]:
    """Writes the page to `output`, or prints the rows unless `quiet`. Returns their figures."""
    if output is not None and output.is_dir():
        raise UserError(f"output {output}: a directory; give the path of a file, such as {output / 'rows.html'}")
    shown = read_rows(plan, load_tokenizer(plan.tokenizer_dir), step=step, rows=rows)
    if output is not None:
        page = html_page(plan.summary(), shown)
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(output, page.encode("utf-8", "replace"))
    elif not quiet:
        print_rows(Console(highlight=False), plan.summary(), shown)
    return figures(plan, shown, output)


def figures(plan: Plan, shown: list[ShownRow], output: Path | None) -> dict[str, Any]:
    kinds = Counter[str]()
    for row in shown:
        for passage in row.passages:
            kinds[passage.kind] += passage.tokens
    return {
        "rows": len(shown),
        "first_row": shown[0].row,
        "step": shown[0].step,
        "passages": sum(len(row.passages) for row in shown),
        "tokens": sum(row.tokens for row in shown),
        "targets": sum(row.targets for row in shown),
        "padding": sum(row.seq_len - row.tokens for row in shown),
        "tokens_by_kind": dict(sorted(kinds.items())),
        "fingerprint": plan.fingerprint,
        "output": None if output is None else str(output),
    }
