"""Rows in the terminal: a colour a kind, bright where the loss counts, dim where text is only read."""

from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from ipt_jax.data.table import plan_summary_table
from ipt_jax.show.rows import Passage, ShownRow

COLOURS = {"raw": "white", "augmented": "cyan", "task": "yellow", "instruction": "magenta"}


def print_rows(console: Console, summary: dict[str, Any], rows: list[ShownRow]) -> None:
    console.print(plan_summary_table(summary))
    console.print(legend())
    for row in rows:
        title = f"row {row.row:,} · step {row.step:,}, slot {row.slot:,} · {row_words(row)}"
        console.print(Rule(Text(title, style="bold"), align="left"))
        for passage in row.passages:
            console.print(passage_text(passage))
        if row.tokens < row.seq_len:
            console.print(Text(f"{row.seq_len - row.tokens:,} tokens of padding", style="dim italic"))


def legend() -> Text:
    words = Text()
    for kind, colour in COLOURS.items():
        words.append(f" {kind} ", style=f"reverse {colour}").append(" ")
    words.append("target of the loss", style="bold").append("  ").append("only read", style="dim")
    return words.append("  ").append("<control>", style="reverse")


def row_words(row: ShownRow) -> str:
    noun = "document" if len(row.passages) == 1 else "documents"
    share = row.targets / max(row.tokens, 1)
    return f"{len(row.passages)} {noun}, {row.tokens:,} tokens, {share:.0%} targets"


def passage_text(passage: Passage) -> Text:
    """Text is printed as it stands, never read as markup; characters that would move the cursor are shown as boxes."""
    colour = COLOURS[passage.kind]
    shown = Text()
    shown.append(f" {passage.kind} ", style=f"reverse {colour}")
    shown.append(f" {passage.tokens:,} tokens, {passage.targets:,} targets\n", style="dim")
    for stretch in passage.stretches:
        weight = "" if stretch.target else "dim "
        if stretch.control:
            shown.append(stretch.text, style=f"{weight}reverse")
        else:
            shown.append(printable(stretch.text), style=f"{weight}{colour}")
    return shown


def printable(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
