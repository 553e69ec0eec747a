"""The plan as a table for people."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def plan_summary_table(summary: dict[str, Any]) -> Table:
    """`summary` is what `Plan.summary()` gives."""
    table = Table(
        title="{tokens:,} tokens in {rows:,} rows of {seq_len:,} ({packing})".format(**summary),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # a plan of 100B tokens fits 80 columns
        pad_edge=False,
        caption=Text(_caption(summary)),
        caption_justify="left",
    )
    for heading in ("source", "kind", "asked"):
        table.add_column(heading, min_width=6, overflow="fold")
    for heading in ("documents", "tokens", "share", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in summary["sources"]:
        table.add_row(
            escape(source["name"]),
            source["kind"],
            source["asked"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['share']:.2%}",
            f"{source['epochs']:.4g}{_cap(source)}",
        )
    return table


def _cap(source: dict[str, Any]) -> str:
    """How often the source may be repeated, where that is stated or was left open."""
    if source["max_epochs"]:
        return f" of {source['max_epochs']:g}"
    return " (no cap)" if source["epochs"] > 1 and not source["asked"].startswith("epochs") else ""


def _caption(summary: dict[str, Any]) -> str:
    steps = "{steps:,} steps of {rows_per_step:,} rows, padding {padding_fraction:.3%}".format(**summary)
    cut = "{truncated_tokens:,} tokens cut from last documents, plan {fingerprint:.12}".format(**summary)
    left_out = (
        "{name}: {converted_tokens:,} tokens of {converted_documents:,} converted documents left out; "
        "{converted_elsewhere:,} converted texts are of other sources"
    )
    lines = [left_out.format(**source) for source in summary["sources"] if source["converted_documents"]]
    return "\n".join([f"{steps}, {cut}", *lines])
