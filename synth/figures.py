"""The distributions of `synth inspect`: a card a chart, made of a survey's counts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ipt_jax.corpus.markup import Markup, tag
from synth.charts import Column, bar_chart, column_chart
from synth.parse import REASONS
from synth.survey import Survey

MOST_PAIRS = 24  # texts with more share a column
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 31, 51, 101)  # a column of answer lengths begins at each
NAMES = 10  # rows of a bar chart
BINS = 20


def distribution_cards(survey: Survey) -> list[Markup]:
    return [
        card("Pairs a text", f"accepted pairs of {survey.texts:,} texts", pairs_chart(survey.pairs_a_text)),
        *accepted_cards(survey),
        *score_cards(survey),
        *reason_card(survey),
    ]


def accepted_cards(survey: Survey) -> Iterator[Markup]:
    """What is counted of accepted pairs; nothing where there are none."""
    if not survey.accepted:
        return
    yield card("Words an answer", "final answers, without their reasoning", length_chart(survey.answer_words))
    for title, note, counts, colour in (
        ("First words of questions", f"the {NAMES} most frequent", survey.first_words, "c4"),
        ("Task categories", "what questions ask for, told by how they begin", survey.categories, "c3"),
        ("Formats", "as the parser read them", survey.formats, "c6"),
    ):
        rows = [(name.replace("_", " "), count) for name, count in counts.most_common(NAMES)]
        yield card(title, note, bar_chart(title, rows, colour=colour, total=survey.accepted))


def reason_card(survey: Survey) -> Iterator[Markup]:
    refused = survey.reasons.total()
    if refused:
        rows = [(name.replace("_", " "), count) for name, count in survey.reasons.most_common(NAMES)]
        known = [name for name in survey.reasons if name in REASONS]
        drawn = bar_chart("Refused pairs", rows, colour="refused", total=refused)
        told = tag("dl", *(part for name in known for part in meaning(name)), class_="meanings")
        fold = tag("details", tag("summary", "What the reasons mean"), told) if known else None
        yield card("Refused pairs", f"{refused:,} beside {survey.accepted:,} accepted", drawn, fold)


def meaning(reason: str) -> tuple[Markup, Markup]:
    return tag("dt", reason.replace("_", " ")), tag("dd", REASONS[reason])


def score_cards(survey: Survey) -> Iterator[Markup]:
    for name, scores in sorted(survey.scores.items()):
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
