"""`synth inspect`: prints groups in the terminal, or writes them as one self-contained HTML page.

Guarantees: texts and pairs are never parsed as markup; the words that ground an answer are marked in its text;
rejected pairs show their reason. Reads only the shown groups and, for the page, a sample for the distributions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.html import write_page
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from ipt_jax.corpus.shards import Shards
from synth.groups import decode_group
from synth.inspect.html_page import highlighted_spans, html_page
from synth.inspect.statistics import count_groups

EXCERPT = 1200  # characters of a text in the terminal


def run_inspect(
    path: Path, output: Path | None, limit: int, sample: int, rejected: bool
) -> tuple[dict[str, Any], Callable[[], None] | None]:
    """Counts of the first `limit` groups, and without `output` the function that prints these groups.

    Writes the page to `output`. Its distributions are over `sample` groups.
    """
    shards = Shards(path, verify=False)
    groups = [decode_group(record, shards) for record in islice(shards, limit)]
    if not groups:
        raise UserError(f"groups {path}: holds no groups; run synth run on a corpus that is not empty")
    if output is not None:
        write_page(output, html_page(groups, count_groups(shards, sample), rejected))
    texts = [text for group in groups for text in group.texts]
    pairs = [pair for text in texts for pair in text.pairs]
    accepted = [pair for pair in pairs if pair.accepted]
    counts = {
        "groups": len(shards),
        "shown": len(groups),
        "texts": len(texts),
        "pairs": len(accepted),
        "formats": dict(sorted(Counter(pair.format for pair in accepted).items())),
        "rejected": dict(sorted(Counter(pair.rejection for pair in pairs if pair.rejection).items())),
        "output": None if output is None else str(output),
    }
    return counts, None if output else partial(show_groups, groups, rejected)


def show_groups(groups: Sequence[SynthGroup], rejected: bool) -> None:
    console = Console()
    for group in groups:
        console.print(Rule(Text(f"group {group.id}", style="bold"), align="left"))
        sampling = " ".join(f"{key}={value}" for key, value in group.sampling.items())
        weights, config = group.weights[:12], group.fingerprint[:12]
        provenance = f"{group.synthesizer} · weights {weights} · config {config} · {sampling}"
        console.print(Text(provenance, style="dim"))
        for text in group.texts:
            console.print(Group(text_panel(text), pair_table(text.pairs, rejected), Text("")))


def text_panel(text: GroupText) -> Panel:
    shown = Text(text.text[:EXCERPT])
    for part in highlighted_spans(text.text[:EXCERPT], text.pairs):
        shown.stylize("underline" if part.exact else "dim underline", part.start, part.end)
    if len(text.text) > EXCERPT:
        shown.append(f" … {len(text.text) - EXCERPT:,} more characters", style="dim")
    title = Text(f"{text.raw_id} [{text.start:,}–{text.end:,}] · {text.source}")
    tokens = Text(
        f"round {text.round} · prompt {text.prompt_tokens:,} tokens, {text.cached_prompt_tokens:,} cached · "
        f"completion {text.completion_tokens:,} · {text.finish_reason}"
    )
    return Panel(shown, title=title, title_align="left", subtitle=tokens, subtitle_align="left")


def pair_table(pairs: Sequence[Pair], rejected: bool) -> Table | Text:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for name, ratio in (("#", None), ("format", None), ("question", 4), ("answer", 3), ("verdict", None)):
        table.add_column(name, ratio=ratio, overflow="fold", no_wrap=ratio is None)
    for number, pair in enumerate(pairs, 1):
        if pair.accepted:
            scores = "\n".join(f"{name} {score:.2f}" for name, score in pair.scores.items()) or "accepted"
            table.add_row(str(number), pair.format, Text(pair.question), Text(pair.answer), Text(scores))
        elif rejected:
            cells = (Text(pair.question), Text(pair.answer), Text(str(pair.rejection), style="not dim red"))
            table.add_row(str(number), "–", *cells, style="dim")
    return table if table.row_count else Text("no pairs", style="dim")
