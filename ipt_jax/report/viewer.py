"""`ipt show`: rows of a plan as a person reads them, before anything is trained on them.

Rows of a plan, decoded: what stands where, of which kind, and which tokens the loss counts.

A row's passages are its pieces of documents. A passage's text is cut into stretches: control tokens apart, and text
that is a target apart from text that is only read. A token is a target when the position before it predicts it; what
was predicted before a passage began (its document goes on from another row) is told by the token after.

Rows in the terminal: a colour a kind, bright where the loss counts, dim where text is only read.

The HTML page of `ipt show`: one file, no scripts, no links, all text from documents escaped.

It looks like the report's pages and takes their style; a row is a card with a strip that maps it token by token.

Shows rows of a recipe's plan in the terminal, or as one self-contained HTML page.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole, writing
from ipt_jax.core.html import Markup, tag, whole_page
from ipt_jax.core.svg import BarSegment, share_bar
from ipt_jax.corpus.records import KIND_CODES
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.plan import Plan, plan_summary_table

KIND_NAMES = {code: str(kind) for kind, code in KIND_CODES.items()}


@dataclass(frozen=True)
class TokenSpan:
    """Tokens side by side that are alike. `control`: one control token, named by `text`."""

    text: str
    tokens: int
    target: bool
    control: bool = False


@dataclass(frozen=True)
class Passage:
    """A piece of one document. `targets` are the positions that predict one."""

    kind: str
    tokens: int
    targets: int
    spans: list[TokenSpan]


@dataclass(frozen=True)
class ShownRow:
    row: int
    step: int
    slot: int
    seq_len: int
    passages: list[Passage]

    @property
    def tokens(self) -> int:
        return sum(passage.tokens for passage in self.passages)

    @property
    def targets(self) -> int:
        return sum(passage.targets for passage in self.passages)


def read_rows(plan: Plan, tokenizer: Tokenizer, *, step: int, rows: int) -> list[ShownRow]:
    """The first `rows` rows of the plan from `step` on. Raises UserError for a step beyond its end."""
    first = step * plan.rows_per_step
    if first >= plan.rows:
        raise UserError(f"--step {step}: the plan has {plan.steps:,} steps, 0 to {plan.steps - 1:,}; give one of them")
    numbers = range(first, min(first + rows, plan.rows))
    batch = plan.batch(numbers)
    return [
        ShownRow(
            number,
            *divmod(number, plan.rows_per_step),
            plan.settings.seq_len,
            _passages({name: array[place] for name, array in batch.items()}, tokenizer),
        )
        for place, number in enumerate(numbers)
    ]


def _passages(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> list[Passage]:
    passages = []
    segments = row["segment_ids"]
    for number in range(1, int(segments.max(initial=0)) + 1):
        here = np.flatnonzero(segments == number)
        span = slice(here[0], here[-1] + 1)
        tokens, predicts = row["tokens"][span], row["loss_mask"][span]
        target = np.concatenate([predicts[:1], predicts[:-1]])
        if tokens[0] == tokenizer.bos_id:
            target[0] = False
        kind = KIND_NAMES[int(row["kinds"][here[0]])]
        passages.append(Passage(kind, len(here), int(predicts.sum()), _token_spans(tokens, target, tokenizer)))
    return passages


def _token_spans(tokens: np.ndarray, target: np.ndarray, tokenizer: Tokenizer) -> list[TokenSpan]:
    control = np.isin(tokens, [one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None])
    changes = np.flatnonzero((np.diff(target) != 0) | control[1:] | control[:-1]) + 1
    found = []
    for start, stop in _spans([0, *changes.tolist(), len(tokens)]):
        if control[start]:
            name = tokenizer.control_name(int(tokens[start]))
            found.append(TokenSpan(name, 1, bool(target[start]), control=True))
        else:
            text = tokenizer.spell(tokens[start:stop].tolist(), first=start == 0 or bool(control[start - 1]))
            found.append(TokenSpan(text, stop - start, bool(target[start])))
    return found


def _spans(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return [(low, high) for low, high in zip(bounds, bounds[1:], strict=False) if low < high]


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
    for token_span in passage.spans:
        weight = "" if token_span.target else "dim "
        if token_span.control:
            shown.append(token_span.text, style=f"{weight}reverse")
        else:
            shown.append(printable(token_span.text), style=f"{weight}{colour}")
    return shown


def printable(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


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
        BarSegment(
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
        for token_span in passage.spans:
            style = f"k-{passage.kind}" if token_span.target else f"k-{passage.kind} faded"
            bars.append(tag("rect", x=at, y=0, width=token_span.tokens * unit, height=18, class_=style))
            at += token_span.tokens * unit
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
            token_span.text,
            class_=("control " if token_span.control else "") + ("target" if token_span.target else "read"),
            title=None if token_span.target else "only read: no target of the loss",
        )
        for token_span in passage.spans
    ]
    share = f"{passage.targets:,} targets" if passage.targets else "no targets"
    return tag(
        "article",
        tag("p", tag("b", str(number)), f" {KINDS[passage.kind]} · {passage.tokens:,} tokens, {share}", class_="facts"),
        tag("p", *pieces, class_="tokens"),
        class_=f"passage-card {passage.kind}",
    )


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
