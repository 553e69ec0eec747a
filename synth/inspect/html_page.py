"""The HTML page of `synth inspect`: texts beside their pairs, and distributions.

Guarantees: records are escaped; the words that ground an answer are marked. The page's script filters by verdict,
format, reason and words, and keeps the choice in the address (`#verdict=rejected`). Without scripts all pairs show.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ipt_jax.core.html import Markup, render_page
from ipt_jax.core.svg import Column, bar_chart, column_chart
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.format.parser import REASONS
from synth.format.wire import final_answer, question_stem
from synth.groups import contaminated_places
from synth.inspect.statistics import GroupStatistics
from synth.text.words import sentence_spans

MOST_PAIRS = 24  # texts with more share a column
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 31, 51, 101)  # a column of answer lengths begins at each
NAMES = 10  # rows of a bar chart
BINS = 20
SHORTEST = 3  # characters of an answer
LONG_WORD = re.compile(r"\w{4,}|\d+")
SHARED = 0.5  # of an answer's words that a sentence must have


class ChartCard(NamedTuple):
    title: str
    note: str
    chart: Markup
    meanings: dict[str, str] | None = None  # of the names in the chart


def html_page(groups: Sequence[SynthGroup], stats: GroupStatistics, rejected: bool) -> str:
    texts = [text for group in groups for text in group.texts]
    pairs = [pair for text in texts for pair in text.pairs if rejected or pair.accepted]
    return render_page(
        Path(__file__).with_name("groups.html.j2"),
        title="Synthesized pairs",
        synthesizers=dict.fromkeys(f"{group.synthesizer} (weights {group.weights[:12]})" for group in groups),
        sources=dict.fromkeys(text.source for text in texts),
        stats=stats,
        cards=distribution_cards(stats),
        filters={
            "verdict": Counter(pair.verdict for pair in pairs),
            "format": Counter(pair.format for pair in pairs if pair.accepted),
            "reason": Counter(pair.rejection for pair in pairs if pair.rejection),
        },
        groups=[(group, shown_texts(group, rejected)) for group in groups],
        reasons=REASONS,
    )


# ---- distributions


def distribution_cards(stats: GroupStatistics) -> list[ChartCard]:
    cards = [ChartCard("Pairs a text", f"accepted pairs of {stats.texts:,} texts", pairs_chart(stats.pairs_a_text))]
    if stats.accepted:
        note = "final answers, without their reasoning"
        cards.append(ChartCard("Words an answer", note, length_chart(stats.answer_words)))
        for title, note, counts, colour in (
            ("First words of questions", f"the {NAMES} most frequent", stats.first_words, "c4"),
            ("Task categories", "what questions ask for, told by how they begin", stats.categories, "c3"),
            ("Formats", "as the parser read them", stats.formats, "c6"),
        ):
            cards.append(ChartCard(title, note, names_chart(title, counts, colour, stats.accepted)))
    for name, scores in sorted(stats.scores.items()):
        note = f"a score of {len(scores):,} accepted pairs, mean {sum(scores) / len(scores):.3g}"
        cards.append(ChartCard(name.replace("_", " "), note, score_chart(name, scores)))
    if refused := stats.reasons.total():
        note = f"{refused:,} beside {stats.accepted:,} accepted"
        chart = names_chart("Refused pairs", stats.reasons, "refused", refused)
        meanings = {name: REASONS[name] for name in stats.reasons if name in REASONS}
        cards.append(ChartCard("Refused pairs", note, chart, meanings))
    return cards


def names_chart(title: str, counts: Counter[str], colour: str, total: int) -> Markup:
    rows = [(name.replace("_", " "), count) for name, count in counts.most_common(NAMES)]
    return bar_chart(title, rows, colour=colour, total=total)


def pairs_chart(counts: Counter[int]) -> Markup:
    top = min(max(counts), MOST_PAIRS)
    columns = [Column(str(pairs), f"{pairs} pairs" if pairs != 1 else "1 pair", counts[pairs]) for pairs in range(top)]
    rest = sum(count for pairs, count in counts.items() if pairs >= top)
    more = "+" if max(counts) > top else ""
    return column_chart("Pairs a text", [*columns, Column(f"{top}{more}", f"{top}{more} pairs", rest)], colour="c2")


def length_chart(counts: Counter[int]) -> Markup:
    longest = max(counts)
    starts = [start for start in LENGTHS if start <= longest]
    columns = []
    for start, end in pairwise([*starts, longest + 1 if len(starts) == len(LENGTHS) else LENGTHS[len(starts)]]):
        label = str(start) if end - start == 1 else f"{start}–{end - 1}"
        count = sum(number for length, number in counts.items() if start <= length < end)
        columns.append(Column(label, f"{label} word{'' if label == '1' else 's'}", count))
    return column_chart("Words an answer", columns if counts[0] else columns[1:], colour="c0")


def score_chart(name: str, scores: Sequence[float]) -> Markup:
    """Twenty columns from 0 to 1, or over the range of the scores where they exceed it."""
    low, high = min(0.0, *scores), max(1.0, *scores)
    width = (high - low) / BINS
    bins = Counter(min(int((score - low) / width), BINS - 1) for score in scores)
    edges = [low + place * width for place in range(BINS + 1)]
    columns = [Column(f"{edges[i]:.2g}", f"{edges[i]:.2g} to {edges[i + 1]:.2g}", bins[i]) for i in range(BINS)]
    return column_chart(name, columns, colour="c1")


# ---- evidence: for highlighting only, `synth verify` scores grounding


class Evidence(NamedTuple):
    start: int
    end: int
    exact: bool


class HighlightedSpan(NamedTuple):
    """A span of text inside the evidence of the pairs `numbers`; `ends` are those whose evidence ends with it."""

    start: int
    end: int
    numbers: list[int]
    ends: list[int]
    exact: bool


def evidence(text: str, pair: Pair) -> Evidence | None:
    """Of several occurrences of the answer, the one whose sentence shares most words with the question."""
    answer = final_answer(pair).strip().removesuffix(".")
    if not pair.accepted or len(answer) < SHORTEST:
        return None
    spaced = r"\s+".join(map(re.escape, answer.split()))
    found = list(re.finditer(rf"(?<!\w){spaced}(?!\w)", text, re.IGNORECASE))
    if len(found) == 1:
        return Evidence(*found[0].span(), exact=True)
    spans = sentence_spans(text)
    shared_with = long_words(question_stem(pair) if found else answer)
    if found:

        def shared(match: re.Match[str]) -> int:
            around = (text[start:end] for start, end in spans if start <= match.start() < end)
            return len(shared_with & long_words(next(around, "")))

        return Evidence(*max(found, key=shared).span(), exact=True)
    shares = [len(shared_with & long_words(text[start:end])) for start, end in spans]
    if not shared_with or max(shares, default=0) < SHARED * len(shared_with):
        return None
    return Evidence(*spans[shares.index(max(shares))], exact=False)


def long_words(text: str) -> set[str]:
    return set(LONG_WORD.findall(text.casefold()))


def highlighted_spans(text: str, pairs: Sequence[Pair]) -> list[HighlightedSpan]:
    """The evidence of all pairs, cut wherever one begins or ends, in order and without overlap."""
    every = {number: found for number, pair in enumerate(pairs, 1) if (found := evidence(text, pair))}
    edges = sorted({edge for found in every.values() for edge in (found.start, found.end)})
    spans = []
    for start, end in zip(edges, edges[1:], strict=False):
        inside = {number: found for number, found in every.items() if found.start <= start and end <= found.end}
        if inside:
            ends = [number for number, found in inside.items() if found.end == end]
            spans.append(HighlightedSpan(start, end, list(inside), ends, any(found.exact for found in inside.values())))
    return spans


# ---- texts


def shown_texts(group: SynthGroup, rejected: bool) -> list[dict[str, Any]]:
    """Per text its pieces, which are marked where they ground an answer, and its pairs. Pairs are numbered from 1."""
    contaminated = contaminated_places(group)
    shown = []
    for place, text in enumerate(group.texts):
        spans = highlighted_spans(text.text, text.pairs)
        grounded = {number for span in spans for number in span.numbers}
        pairs = [
            {"number": number, "pair": pair, "grounded": number in grounded, **question_parts(pair)}
            for number, pair in enumerate(text.pairs, 1)
            if rejected or pair.accepted
        ]
        shown.append(
            {"text": text, "contaminated": place in contaminated, "pieces": pieces(text, spans), "pairs": pairs}
        )
    return shown


def pieces(text: GroupText, spans: Sequence[HighlightedSpan]) -> list[tuple[str, HighlightedSpan | None]]:
    """The text in order: (words, the span that they fill or None)."""
    found: list[tuple[str, HighlightedSpan | None]] = []
    last = 0
    for span in spans:
        found += [(text.text[last : span.start], None), (text.text[span.start : span.end], span)]
        last = span.end
    return [*found, (text.text[last:], None)]


def question_parts(pair: Pair) -> dict[str, str]:
    """The question's stem, and the rest in the wire form, such as its options."""
    rest = pair.question.removeprefix(question_stem(pair)) if pair.accepted else ""
    return {"stem": pair.question.removesuffix(rest), "rest": rest}
