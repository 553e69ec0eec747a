"""The HTML page of `ipt show`: one file, no scripts, no links, all text from documents escaped.

It looks like the report's pages and takes their style; a row is a card with a strip that maps it token by token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipt_jax.corpus.markup import Markup, tag, whole_page
from ipt_jax.report.bars import Part, share_bar
from ipt_jax.show.rows import Passage, ShownRow

STYLE = Path(__file__).parent / "rows.css"
KINDS = {"raw": "raw text", "augmented": "augmented", "task": "tuning tasks", "instruction": "instructions"}
STRIP = 1000  # the strip's own width in units


def html_page(summary: dict[str, Any], rows: Sequence[ShownRow]) -> str:
    span = f"Rows {rows[0].row:,} to {rows[-1].row:,}" if len(rows) > 1 else f"Row {rows[0].row:,}"
    title = f"{span} of {summary['rows']:,}"
    body = [
        tag("header", tag("h1", title), tag("p", _plan_words(summary, rows), class_="note"), _legend()),
        _mix(summary),
        *(_row(row) for row in rows),
        tag("footer", f"Written by ipt show, plan {summary['fingerprint'][:12]}. This page loads nothing."),
    ]
    return whole_page(title, body, style=STYLE)


def _plan_words(summary: dict[str, Any], rows: Sequence[ShownRow]) -> str:
    steps = f"step {rows[0].step:,}" if rows[0].step == rows[-1].step else f"steps {rows[0].step:,}–{rows[-1].step:,}"
    return (
        f"{steps} of {summary['steps']:,}, {summary['rows_per_step']:,} rows each · {summary['seq_len']:,} tokens "
        f"a row, {summary['packing']} · {summary['tokens']:,} tokens in all"
    )


def _legend() -> Markup:
    kinds = [
        tag("li", tag("span", class_=f"swatch k-{kind}"), tag("span", name, class_=f"sample {kind}"))
        for kind, name in KINDS.items()
    ]
    return tag(
        "ul",
        *kinds,
        tag("li", tag("span", "target of the loss", class_="target sample raw")),
        tag("li", tag("span", "only read", class_="read sample raw")),
        tag("li", tag("span", "control token", class_="control")),
        tag("li", tag("span", class_="swatch padded"), "padding"),
        class_="legend key",
    )


def _mix(summary: dict[str, Any]) -> Markup:
    parts = [
        Part(
            source["name"], _kind(source["kind"]), source["share"], f"{source['name']}: {source['share']:.1%} of tokens"
        )
        for source in summary["sources"]
    ]
    facts = [
        tag(
            "li",
            tag("span", class_=f"swatch k-{_kind(source['kind'])}"),
            f"{source['name']}: {source['tokens']:,} tokens, {source['epochs']:.3g} epochs",
        )
        for source in summary["sources"]
    ]
    bar = share_bar("Token mix of the plan", parts)
    return tag("div", tag("h3", "The whole plan"), bar, tag("ul", *facts, class_="legend"), class_="card mix")


def _kind(kind: str) -> str:
    return kind if kind in KINDS else "other"


def _row(row: ShownRow) -> Markup:
    padding = row.seq_len - row.tokens
    facts = [
        f"{len(row.passages)} document{'s' if len(row.passages) != 1 else ''}",
        f"{row.tokens:,} tokens",
        f"{row.targets:,} targets ({row.targets / max(row.tokens, 1):.0%})",
        f"{padding:,} padding" if padding else None,
    ]
    return tag(
        "section",
        tag(
            "h2",
            f"Row {row.row:,} ",
            tag("small", f"step {row.step:,}, slot {row.slot:,} · {', '.join(fact for fact in facts if fact)}"),
        ),
        _strip(row),
        *(_passage(passage, number) for number, passage in enumerate(row.passages, start=1)),
        class_="row",
    )


def _strip(row: ShownRow) -> Markup:
    """The row from its first token to its last: full colour where tokens are targets, faint where they are read."""
    unit, at, drawn = STRIP / row.seq_len, 0.0, []
    for number, passage in enumerate(row.passages, start=1):
        bars = []
        for stretch in passage.stretches:
            style = f"k-{passage.kind}" if stretch.target else f"k-{passage.kind} faded"
            bars.append(tag("rect", x=at, y=0, width=stretch.tokens * unit, height=18, class_=style))
            at += stretch.tokens * unit
        words = f"{number}: {passage.kind}, {passage.tokens:,} tokens, {passage.targets:,} targets"
        drawn += [tag("g", *bars, tag("title", words)), tag("line", x1=at, x2=at, y1=0, y2=18, class_="seam")]
    return tag(
        "svg",
        *drawn,
        viewBox=f"0 0 {STRIP} 18",
        preserveAspectRatio="none",
        role="img",
        class_="strip",
        aria_label=f"row {row.row}: {len(row.passages)} passages",
    )


def _passage(passage: Passage, number: int) -> Markup:
    pieces = [
        tag(
            "span",
            stretch.text,
            class_=("control " if stretch.control else "") + ("target" if stretch.target else "read"),
            title=None if stretch.target else "only read: no target of the loss",
        )
        for stretch in passage.stretches
    ]
    share = f"{passage.targets:,} targets" if passage.targets else "no targets"
    return tag(
        "article",
        tag("p", tag("b", str(number)), f" {KINDS[passage.kind]} · {passage.tokens:,} tokens, {share}", class_="facts"),
        tag("p", *pieces, class_="tokens"),
        class_=f"passage-card {passage.kind}",
    )
