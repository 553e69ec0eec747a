"""The plan as a table for people."""

from typing import Any

from rich import box
from rich.table import Table


def plan_summary_table(summary: dict[str, Any]) -> Table:
    """`summary` is what `Plan.summary()` gives."""
    table = Table(
        title="{tokens:,} tokens in {rows:,} rows of {seq_len:,} ({packing})".format(**summary),
        box=box.SIMPLE_HEAD,
        caption=_caption(summary),
        caption_justify="left",
    )
    for heading in ("source", "kind", "asked"):
        table.add_column(heading)
    for heading in ("documents", "tokens", "share", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in summary["sources"]:
        table.add_row(
            source["name"],
            source["kind"],
            source["asked"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['share']:.2%}",
            f"{source['epochs']:.4g}" + (f" of {source['max_epochs']:g}" if source["max_epochs"] else ""),
        )
    return table


def _caption(summary: dict[str, Any]) -> str:
    steps = "{steps:,} steps of {rows_per_step:,} rows, padding {padding_fraction:.3%}".format(**summary)
    cut = "{truncated_tokens:,} tokens cut from last documents, plan {fingerprint:.12}".format(**summary)
    left_out = (
        "{name}: {converted_tokens:,} tokens of {converted_documents:,} converted documents left out; "
        "{converted_elsewhere:,} converted texts are of other sources"
    )
    lines = [left_out.format(**source) for source in summary["sources"] if source["converted_documents"]]
    return "\n".join([f"{steps}, {cut}", *lines])
