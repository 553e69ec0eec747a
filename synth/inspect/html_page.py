"""The HTML page of `synth inspect`: one file that loads nothing, everything from the records escaped.

Texts stand beside their pairs; the words that ground an answer are marked and light up with its pair. The page's one
script filters by verdict, format, reason and words, and keeps the choice in the address (`#verdict=rejected`); without
scripts all is shown.

The distributions of `synth inspect`: a card a chart, made of a survey's counts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from ipt_jax.core.html import Markup, join, tag, whole_page
from ipt_jax.core.svg import Column, bar_chart, column_chart
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.format.parser import REASONS
from synth.format.wire import question_stem
from synth.groups import contaminated_places
from synth.inspect.grounding import HighlightedSpan, highlighted_spans
from synth.inspect.statistics import GroupStatistics

MOST_PAIRS = 24  # texts with more share a column
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 31, 51, 101)  # a column of answer lengths begins at each
NAMES = 10  # rows of a bar chart
BINS = 20


def distribution_cards(stats: GroupStatistics) -> list[Markup]:
    return [
        card("Pairs a text", f"accepted pairs of {stats.texts:,} texts", pairs_chart(stats.pairs_a_text)),
        *accepted_cards(stats),
        *score_cards(stats),
        *reason_card(stats),
    ]


def accepted_cards(stats: GroupStatistics) -> Iterator[Markup]:
    """What is counted of accepted pairs; nothing where there are none."""
    if not stats.accepted:
        return
    yield card("Words an answer", "final answers, without their reasoning", length_chart(stats.answer_words))
    for title, note, counts, colour in (
        ("First words of questions", f"the {NAMES} most frequent", stats.first_words, "c4"),
        ("Task categories", "what questions ask for, told by how they begin", stats.categories, "c3"),
        ("Formats", "as the parser read them", stats.formats, "c6"),
    ):
        rows = [(name.replace("_", " "), count) for name, count in counts.most_common(NAMES)]
        yield card(title, note, bar_chart(title, rows, colour=colour, total=stats.accepted))


def reason_card(stats: GroupStatistics) -> Iterator[Markup]:
    refused = stats.reasons.total()
    if refused:
        rows = [(name.replace("_", " "), count) for name, count in stats.reasons.most_common(NAMES)]
        known = [name for name in stats.reasons if name in REASONS]
        drawn = bar_chart("Refused pairs", rows, colour="refused", total=refused)
        told = tag("dl", *(part for name in known for part in meaning(name)), class_="meanings")
        fold = tag("details", tag("summary", "What the reasons mean"), told) if known else None
        yield card("Refused pairs", f"{refused:,} beside {stats.accepted:,} accepted", drawn, fold)


def meaning(reason: str) -> tuple[Markup, Markup]:
    return tag("dt", reason.replace("_", " ")), tag("dd", REASONS[reason])


def score_cards(stats: GroupStatistics) -> Iterator[Markup]:
    for name, scores in sorted(stats.scores.items()):
        mean = sum(scores) / len(scores)
        note = f"a score of {len(scores):,} accepted pairs, mean {mean:.3g}"
        yield card(name.replace("_", " "), note, score_chart(name, scores))


def card(title: str, note: str, *content: Markup | None) -> Markup:
    return tag("div", tag("h3", title), tag("p", note, class_="note"), *content, class_="card")


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
    """Twenty columns from 0 to 1, or over the scores' own range where they leave it."""
    low, high = min(0.0, *scores), max(1.0, *scores)
    width = (high - low) / BINS
    bins = Counter(min(int((score - low) / width), BINS - 1) for score in scores)
    edges = [low + place * width for place in range(BINS + 1)]
    columns = [Column(f"{edges[i]:.2g}", f"{edges[i]:.2g} to {edges[i + 1]:.2g}", bins[i]) for i in range(BINS)]
    return column_chart(name, columns, colour="c1")


TEMPLATES = Path(__file__).parent


def html_page(groups: Sequence[SynthGroup], stats: GroupStatistics, rejected: bool) -> str:
    pairs = [pair for group in groups for text in group.texts for pair in shown_pairs(text, rejected).values()]
    body = [
        tag("header", tag("h1", "Synthesized pairs"), tag("p", source_words(groups), class_="note")),
        tag("h2", "Distributions"),
        tag("p", statistics_words(stats), class_="note"),
        tag("div", *distribution_cards(stats), class_="cards distributions"),
        tag("h2", "Groups"),
        tag("p", shown_words(groups, stats), class_="note"),
        filter_bar(pairs),
        *(group_section(group, rejected) for group in groups),
        tag("footer", "Written by synth inspect. This page loads nothing from elsewhere."),
    ]
    return whole_page("Synthesized pairs", body, style=TEMPLATES / "groups.css", script=TEMPLATES / "groups.js")


def source_words(groups: Sequence[SynthGroup]) -> str:
    synthesizers = dict.fromkeys(f"{group.synthesizer} (weights {group.weights[:12]})" for group in groups)
    sources = dict.fromkeys(text.source for group in groups for text in group.texts)
    return f"written by {', '.join(synthesizers)} from {', '.join(sources)}"


def statistics_words(stats: GroupStatistics) -> str:
    counted = "all" if stats.groups == stats.total else f"{stats.groups:,} evenly spread of"
    return (
        f"Counted over {counted} {stats.total:,} groups: {stats.texts:,} texts, {stats.accepted:,} accepted pairs, "
        f"{stats.reasons.total():,} refused."
    )


def shown_words(groups: Sequence[SynthGroup], stats: GroupStatistics) -> str:
    first = "All" if len(groups) == stats.total else f"The first {len(groups):,} of"
    return (
        f"{first} {stats.total:,} groups. What grounds an answer in its text carries the number of its pair, dotted "
        "where only the sentence could be told."
    )


def shown_pairs(text: GroupText, rejected: bool) -> dict[int, Pair]:
    """The pairs to show by their number, counted from 1 over all of the text."""
    return {number: pair for number, pair in enumerate(text.pairs, 1) if rejected or pair.accepted}


# ---- filters


def filter_bar(pairs: Sequence[Pair]) -> Markup:
    """Hidden until the script has taken hold of it."""
    verdicts = Counter(str(pair.verdict) for pair in pairs)
    formats = Counter(str(pair.format) for pair in pairs if pair.accepted)
    reasons = Counter(str(pair.rejection) for pair in pairs if pair.rejection)
    return tag(
        "form",
        choice("verdict", verdicts),
        choice("format", formats),
        choice("reason", reasons),
        tag(
            "label", "words ", tag("input", type="search", name_="q", autocomplete="off", placeholder="in text or pair")
        ),
        tag("button", "Reset", type="reset"),
        tag("output", f"{len(pairs):,} pairs", aria_live="polite"),
        class_="filters",
        role="search",
        aria_label="Filter the pairs",
        hidden="",
    )


def choice(name: str, counts: Counter[str]) -> Markup:
    options = [
        tag("option", f"{value.replace('_', ' ')} ({count:,})", value=value) for value, count in counts.most_common()
    ]
    return tag("label", f"{name} ", tag("select", tag("option", "any", value=""), *options, name_=name))


# ---- groups


def group_section(group: SynthGroup, rejected: bool) -> Markup:
    contaminated = contaminated_places(group)
    facts = [("config", group.fingerprint[:12]), *((name, str(value)) for name, value in group.sampling.items())]
    return tag(
        "section",
        tag("h3", f"Group {group.id}"),
        facts_line(facts),
        *(text_article(text, rejected, place in contaminated) for place, text in enumerate(group.texts)),
        class_="group",
    )


def facts_line(facts: Sequence[tuple[str, str]]) -> Markup:
    return tag("p", *(tag("span", tag("b", name), f" {value}") for name, value in facts), class_="facts")


def text_article(text: GroupText, rejected: bool, contaminated: bool) -> Markup:
    parts = highlighted_spans(text.text, text.pairs)
    grounded = {number for part in parts for number in part.numbers}
    pairs = [pair_item(number, pair, number in grounded) for number, pair in shown_pairs(text, rejected).items()]
    facts = [
        ("source", text.source),
        ("characters", f"{text.start:,}–{text.end:,}"),
        ("round", str(text.round)),
        ("prompt", f"{text.prompt_tokens:,} tokens, {text.cached_prompt_tokens:,} cached"),
        ("completion", f"{text.completion_tokens:,}"),
        ("ended by", text.finish_reason),
    ]
    words = marked(text.text, parts)
    passage = tag("div", words, class_="passage", dir="auto", tabindex=0, role="group", aria_label="the text")
    note = tag("p", "contaminated: it makes no document", class_="bad note") if contaminated else None
    return tag(
        "article",
        tag("div", tag("h4", text.raw_id), note, passage, facts_line(facts), class_="source"),
        tag("ol", *pairs, class_="pairs") if pairs else tag("p", "no pairs", class_="note"),
        class_="card",
    )


def marked(text: str, parts: Sequence[HighlightedSpan]) -> Markup:
    pieces: list[str | Markup] = []
    last = 0
    for part in parts:
        pieces.append(text[last : part.start])
        inside, ends = (" ".join(map(str, numbers)) for numbers in (part.numbers, part.ends))
        look = None if part.exact else "near"
        words = text[part.start : part.end]
        pieces.append(tag("mark", words, data_pairs=inside, data_ends=ends or None, class_=look))
        last = part.end
    return join([*pieces, text[last:]])


def pair_item(number: int, pair: Pair, grounded: bool) -> Markup:
    where = f"Show in the text where the answer to question {number} stands"
    button = tag("button", str(number), type="button", class_="number", aria_label=where, title=where)
    return tag(
        "li",
        button if grounded else tag("span", str(number), class_="number"),
        question(pair),
        tag("div", pair.answer, class_="answer", dir="auto"),
        tag("p", *([reason_tag(pair.rejection)] if pair.rejection else accepted_tags(pair)), class_="tags"),
        class_=pair.verdict,
        data_verdict=pair.verdict,
        data_format=pair.format if pair.accepted else "",
        data_reason=pair.rejection or "",
        data_number=number,
    )


def question(pair: Pair) -> Markup:
    """The question as it stands, what follows its stem in lighter letters."""
    stem = question_stem(pair)
    rest = pair.question.removeprefix(stem) if pair.accepted else ""
    words = pair.question.removesuffix(rest)
    return tag("div", words, tag("span", rest, class_="rest") if rest else None, class_="question", dir="auto")


def accepted_tags(pair: Pair) -> list[Markup]:
    words = [pair.format.replace("_", " "), *(f"{name} {score:.2f}" for name, score in pair.scores.items())]
    return [tag("span", word, class_="tag") for word in words]


def reason_tag(rejection: str) -> Markup:
    words = f"refused: {rejection.replace('_', ' ')}"
    return tag("span", words, class_="tag", title=REASONS.get(rejection))
