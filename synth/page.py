"""The HTML page of `synth inspect`: one file, no scripts, no links, everything from the records escaped."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.parse import REASONS
from synth.prompt import final_answer

STYLE = Path(__file__).parent / "templates" / "groups.css"
SHORTEST_MARK = 3  # shorter answers occur by chance


def html_page(groups: Sequence[SynthGroup], total: int, rejected: bool) -> str:
    sections = "\n".join(group_section(group, rejected) for group in groups)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Synthesized pairs</title><style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><h1>Synthesized pairs</h1>
<p>{len(groups):,} of {total:,} groups. An answer that stands in its text word for word is marked there with the number
of its pair.</p>
{sections}
</body></html>
"""


def group_section(group: SynthGroup, rejected: bool) -> str:
    facts = [
        ("synthesizer", group.synthesizer),
        ("weights", group.weights[:12]),
        ("config", group.fingerprint[:12]),
        *((name, str(value)) for name, value in group.sampling.items()),
    ]
    line = " ".join(f"<span><b>{escape(name)}</b> {escape(value)}</span>" for name, value in facts)
    texts = "\n".join(text_article(text, rejected) for text in group.texts)
    return f'<section><h2>Group {escape(group.id)}</h2><p class="facts">{line}</p>\n{texts}</section>'


def text_article(text: GroupText, rejected: bool) -> str:
    pairs = "\n".join(
        pair_block(number, pair) for number, pair in enumerate(text.pairs, 1) if rejected or pair.verdict == "accepted"
    )
    return f"""<article><div class="text"><h3>{escape(text.raw_id)} <small>{escape(text.source)},
characters {text.start:,}–{text.end:,}</small></h3><p class="raw">{marked(text)}</p>
<p class="facts"><span><b>round</b> {text.round}</span> <span><b>prompt</b> {text.prompt_tokens:,} tokens,
{text.cached_prompt_tokens:,} cached</span> <span><b>completion</b> {text.completion_tokens:,}</span>
<span><b>ended by</b> {escape(text.finish_reason)}</span></p></div>
<ol class="pairs">{pairs or "<li class=none>no pairs</li>"}</ol></article>"""


def marked(text: GroupText) -> str:
    pieces, last = [], 0
    for start, end, number in answer_marks(text.text, text.pairs):
        pieces.append(escape(text.text[last:start]))
        pieces.append(f"<mark>{escape(text.text[start:end])}<sup>{number}</sup></mark>")
        last = end
    return "".join([*pieces, escape(text.text[last:])])


def pair_block(number: int, pair: Pair) -> str:
    if pair.verdict == "accepted":
        chips = [pair.format, *(f"{name} {score:.2f}" for name, score in pair.scores.items())]
    else:
        chips = [pair.reason or "rejected"]
    told = escape(REASONS.get(pair.reason or "", ""), quote=True)
    labels = " ".join(f'<span class="chip" title="{told}">{escape(chip)}</span>' for chip in chips)
    return (
        f'<li class="{pair.verdict}" value="{number}"><p class="question">{escape(pair.question)}</p>'
        f'<p class="answer">{escape(pair.answer)}</p><p>{labels}</p></li>'
    )


def answer_marks(text: str, pairs: Sequence[Pair]) -> list[tuple[int, int, int]]:
    """(start, end, pair number) where accepted answers stand in the text word for word, in order, none overlapping."""
    found: list[tuple[int, int, int]] = []
    for number, pair in enumerate(pairs, 1):
        answer = final_answer(pair).removesuffix(".")
        if pair.verdict == "rejected" or len(answer) < SHORTEST_MARK:
            continue
        match = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
        if match and all(match.end() <= start or end <= match.start() for start, end, _ in found):
            found.append((match.start(), match.end(), number))
    return sorted(found)
