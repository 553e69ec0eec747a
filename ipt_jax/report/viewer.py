"""`ipt show`: rows of a plan, decoded, in the terminal or as one self-contained HTML page.

The passages of a row are its parts of documents. The text of a passage is split into spans: control tokens by
themselves, and targets of the loss separate from text that is only read. A token is a target when the position before
it predicts it. For the first token of a passage that continues a document from another row, the next token decides.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.html import render_page, write_page
from ipt_jax.corpus.records import KIND_CODES
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.plan import Plan, plan_summary_table
from ipt_jax.report.training import kind_style, mix_bar

KIND_OF_CODE = {code: str(kind) for kind, code in KIND_CODES.items()}
KIND_NAMES = {"raw": "raw text", "augmented": "augmented", "task": "tuning tasks", "instruction": "instructions"}
COLOURS = {"raw": "white", "augmented": "cyan", "task": "yellow", "instruction": "magenta"}
STRIP_WIDTH = 1000  # units of the picture of a row


@dataclass(frozen=True)
class TokenSpan:
    """Adjacent tokens that are all targets or all only read. `control`: one control token, named by `text`."""

    text: str
    tokens: int
    target: bool
    control: bool = False


@dataclass(frozen=True)
class Passage:
    """A part of one document. `targets` counts the positions that predict a target."""

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

    @property
    def share(self) -> float:
        return self.targets / max(self.tokens, 1)

    @property
    def padding(self) -> int:
        return self.seq_len - self.tokens

    @property
    def documents(self) -> str:
        return f"{len(self.passages)} document{'s' if len(self.passages) != 1 else ''}"


def read_rows(plan: Plan, tokenizer: Tokenizer, *, step: int, rows: int) -> list[ShownRow]:
    """The first `rows` rows of the plan from `step` on. Raises UserError for a step beyond its end."""
    first = plan.first_row(step)
    if first >= plan.rows:
        raise UserError(f"--step {step}: the plan has {plan.steps:,} steps, 0 to {plan.steps - 1:,}; give one of them")
    numbers = range(first, min(first + rows, plan.rows))
    batch = plan.batch(numbers)
    return [
        ShownRow(
            number,
            *plan.place(number),
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
        kind = KIND_OF_CODE[int(row["kinds"][here[0]])]
        passages.append(Passage(kind, len(here), int(predicts.sum()), _token_spans(tokens, target, tokenizer)))
    return passages


def _token_spans(tokens: np.ndarray, target: np.ndarray, tokenizer: Tokenizer) -> list[TokenSpan]:
    control = np.isin(tokens, [one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None])
    changes = np.flatnonzero((np.diff(target) != 0) | control[1:] | control[:-1]) + 1
    found = []
    for start, stop in pairwise([0, *changes.tolist(), len(tokens)]):
        if control[start]:
            name = tokenizer.control_name(int(tokens[start]))
            found.append(TokenSpan(name, 1, bool(target[start]), control=True))
        else:
            text = tokenizer.spell(tokens[start:stop].tolist(), first=start == 0 or bool(control[start - 1]))
            found.append(TokenSpan(text, stop - start, bool(target[start])))
    return found


def print_rows(summary: dict[str, Any], rows: list[ShownRow]) -> None:
    console = Console(highlight=False)
    console.print(plan_summary_table(summary))
    legend = Text()
    for kind, colour in COLOURS.items():
        legend.append(f" {kind} ", style=f"reverse {colour}").append(" ")
    legend.append("target of the loss", style="bold").append("  ").append("only read", style="dim")
    console.print(legend.append("  ").append("<control>", style="reverse"))
    for row in rows:
        title = (
            f"row {row.row:,} · step {row.step:,}, slot {row.slot:,} · "
            f"{row.documents}, {row.tokens:,} tokens, {row.share:.0%} targets"
        )
        console.print(Rule(Text(title, style="bold"), align="left"))
        for passage in row.passages:
            console.print(passage_text(passage))
        if row.padding:
            console.print(Text(f"{row.padding:,} tokens of padding", style="dim italic"))


def passage_text(passage: Passage) -> Text:
    """The passage in colours. Its text is not parsed as markup; characters that would move the cursor are replaced."""
    colour = COLOURS[passage.kind]
    shown = Text()
    shown.append(f" {passage.kind} ", style=f"reverse {colour}")
    shown.append(f" {passage.tokens:,} tokens, {passage.targets:,} targets\n", style="dim")
    for span in passage.spans:
        text = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in span.text)
        style = "reverse" if span.control else colour
        shown.append(span.text if span.control else text, style=style if span.target else f"dim {style}")
    return shown


def html_page(summary: dict[str, Any], rows: Sequence[ShownRow]) -> str:
    first, last = rows[0], rows[-1]
    numbers = f"Rows {first.row:,} to {last.row:,}" if len(rows) > 1 else f"Row {first.row:,}"
    words = "{name}: {tokens:,} tokens, {epochs:.3g} epochs"
    return render_page(
        Path(__file__).with_name("rows.html.j2"),
        title=f"{numbers} of {summary['rows']:,}",
        plan=summary,
        steps=f"step {first.step:,}" if first.step == last.step else f"steps {first.step:,}–{last.step:,}",
        kinds=KIND_NAMES,
        mix=mix_bar("Token mix of the plan", summary["sources"]),
        sources=[(kind_style(source), words.format_map(source)) for source in summary["sources"]],
        strip_width=STRIP_WIDTH,
        rows=[(row, _strip(row)) for row in rows],
    )


def _strip(row: ShownRow) -> list[tuple[list[tuple[float, float, str]], str, float]]:
    """(bars, words, end) of each passage in order. A bar is faded where tokens are only read."""
    unit, left, strip = STRIP_WIDTH / row.seq_len, 0.0, []
    for passage in row.passages:
        bars = []
        for span in passage.spans:
            style = f"k-{passage.kind}" if span.target else f"k-{passage.kind} faded"
            bars.append((left, span.tokens * unit, style))
            left += span.tokens * unit
        strip.append((bars, f"{passage.kind}, {passage.tokens:,} tokens, {passage.targets:,} targets", left))
    return strip


def run_show(
    plan: Plan, output: Path | None, *, step: int, rows: int
) -> tuple[dict[str, Any], Callable[[], None] | None]:
    """Counts of the shown rows, and without `output` the function that prints them. Writes the page to `output`."""
    shown, summary = read_rows(plan, load_tokenizer(plan.tokenizer_dir), step=step, rows=rows), plan.summary()
    if output is not None:
        write_page(output, html_page(summary, shown))
    kinds = Counter[str]()
    for row in shown:
        for passage in row.passages:
            kinds[passage.kind] += passage.tokens
    counts = {
        "rows": len(shown),
        "first_row": shown[0].row,
        "step": shown[0].step,
        "passages": sum(len(row.passages) for row in shown),
        "tokens": sum(row.tokens for row in shown),
        "targets": sum(row.targets for row in shown),
        "padding": sum(row.padding for row in shown),
        "tokens_by_kind": dict(sorted(kinds.items())),
        "fingerprint": plan.fingerprint,
        "output": None if output is None else str(output),
    }
    return counts, None if output else partial(print_rows, summary, shown)
