"""The HTML page of `synth inspect`: one file that loads nothing, everything from the records escaped.

Texts stand beside their pairs; the words that ground an answer are marked and light up with its pair. The page's one
script filters by verdict, format, reason and words, and keeps the choice in the address (`#verdict=rejected`); without
scripts all is shown.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ipt_jax.corpus.markup import Markup, join, tag, whole_page
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.figures import distribution_cards
from synth.grounds import Stretch, stretches
from synth.groups import contaminated_places
from synth.parse import REASONS
from synth.prompt import question_stem
from synth.survey import Survey

TEMPLATES = Path(__file__).parent / "templates"
ACCEPTED, REJECTED = "accepted", "rejected"


def html_page(groups: Sequence[SynthGroup], survey: Survey, rejected: bool) -> str:
    pairs = [pair for group in groups for text in group.texts for pair in shown_pairs(text, rejected).values()]
    body = [
        tag("header", tag("h1", "Synthesized pairs"), tag("p", source_words(groups), class_="note")),
        tag("h2", "Distributions"),
        tag("p", survey_words(survey), class_="note"),
        tag("div", *distribution_cards(survey), class_="cards distributions"),
        tag("h2", "Groups"),
        tag("p", shown_words(groups, survey), class_="note"),
        filter_bar(pairs),
        *(group_section(group, rejected) for group in groups),
        tag("footer", "Written by synth inspect. This page loads nothing from elsewhere."),
    ]
    return whole_page("Synthesized pairs", body, style=TEMPLATES / "groups.css", script=TEMPLATES / "groups.js")


def source_words(groups: Sequence[SynthGroup]) -> str:
    synthesizers = dict.fromkeys(f"{group.synthesizer} (weights {group.weights[:12]})" for group in groups)
    sources = dict.fromkeys(text.source for group in groups for text in group.texts)
    return f"written by {', '.join(synthesizers)} from {', '.join(sources)}"


def survey_words(survey: Survey) -> str:
    counted = "all" if survey.groups == survey.total else f"{survey.groups:,} evenly spread of"
    return (
        f"Counted over {counted} {survey.total:,} groups: {survey.texts:,} texts, {survey.accepted:,} accepted pairs, "
        f"{survey.reasons.total():,} refused."
    )


def shown_words(groups: Sequence[SynthGroup], survey: Survey) -> str:
    first = "All" if len(groups) == survey.total else f"The first {len(groups):,} of"
    return (
        f"{first} {survey.total:,} groups. What grounds an answer in its text carries the number of its pair, dotted "
        "where only the sentence could be told."
    )


def shown_pairs(text: GroupText, rejected: bool) -> dict[int, Pair]:
    """The pairs to show by their number, counted from 1 over all of the text."""
    return {number: pair for number, pair in enumerate(text.pairs, 1) if rejected or pair.verdict == ACCEPTED}


# ---- filters


def filter_bar(pairs: Sequence[Pair]) -> Markup:
    """Hidden until the script has taken hold of it."""
    verdicts = Counter(str(pair.verdict) for pair in pairs)
    formats = Counter(str(pair.format) for pair in pairs if pair.verdict == ACCEPTED)
    reasons = Counter(reason_of(pair) for pair in pairs if pair.verdict == REJECTED)
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


def reason_of(pair: Pair) -> str:
    return pair.reason or REJECTED


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
    parts = stretches(text.text, text.pairs)
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


def marked(text: str, parts: Sequence[Stretch]) -> Markup:
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
    is_accepted = pair.verdict == ACCEPTED
    where = f"Show in the text where the answer to question {number} stands"
    button = tag("button", str(number), type="button", class_="number", aria_label=where, title=where)
    return tag(
        "li",
        button if grounded else tag("span", str(number), class_="number"),
        question(pair),
        tag("div", pair.answer, class_="answer", dir="auto"),
        tag("p", *(accepted_tags(pair) if is_accepted else [reason_tag(pair)]), class_="tags"),
        class_=pair.verdict,
        data_verdict=pair.verdict,
        data_format=pair.format if is_accepted else "",
        data_reason="" if is_accepted else reason_of(pair),
        data_number=number,
    )


def question(pair: Pair) -> Markup:
    """The question as it stands, what follows its stem in lighter letters."""
    stem = question_stem(pair)
    rest = pair.question.removeprefix(stem) if pair.verdict == ACCEPTED else ""
    words = pair.question.removesuffix(rest)
    return tag("div", words, tag("span", rest, class_="rest") if rest else None, class_="question", dir="auto")


def accepted_tags(pair: Pair) -> list[Markup]:
    words = [pair.format.replace("_", " "), *(f"{name} {score:.2f}" for name, score in pair.scores.items())]
    return [tag("span", word, class_="tag") for word in words]


def reason_tag(pair: Pair) -> Markup:
    words = f"refused: {reason_of(pair).replace('_', ' ')}"
    return tag("span", words, class_="tag", title=REASONS.get(pair.reason or ""))
