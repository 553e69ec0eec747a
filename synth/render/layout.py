"""Arrange texts and pairs in one document in the drawn style, with the character spans of each of them.

Guarantees: values are inserted into a template in one pass, so a value that contains '{answer}' stays unchanged. Every
text and pair is shown once, in order. Options are shuffled per pair, and the answer follows. In few_shot the last text
with pairs is the test item; if only one text has pairs, its last pair is. Spans cut exactly the labelled strings out
of the document, in the order of the text.
"""

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from ipt_jax.corpus.records import Format, GroupText, Pair
from synth.format.parser import MAX_OPTIONS, gold_option
from synth.format.wire import final_answer, question_stem
from synth.render.templates import PLACEHOLDER, DocumentStyle, Draws, OptionStyle, Templates

SpanKind = Literal["text", "question", "options", "rationale", "answer"]
REFERS_TO_TEXT = re.compile(r"\b(text|read\w*|passage|comprehension|look up|find out|given)\b", re.IGNORECASE)
BLOCKS = "\n\n"  # between a text, its bridge, and its pairs
LABELS: dict[str, Sequence[str]] = {
    "none": [""] * MAX_OPTIONS,
    "upper": string.ascii_uppercase,
    "lower": string.ascii_lowercase,
    "numbers": [str(number) for number in range(1, MAX_OPTIONS + 1)],
}


@dataclass(frozen=True)
class Shot:
    """A text, its place in the group, and the pairs that are shown for it, each with its index in the record."""

    place: int
    text: GroupText
    pairs: list[tuple[int, Pair]]


class SpanLabel(NamedTuple):
    """Kind of a span, index of its text in the document and, except for texts, of its pair in the record."""

    part: SpanKind
    text: int
    pair: int | None = None


class Fragment(NamedTuple):
    words: str
    label: SpanLabel | None = None


Fragments = list[Fragment]
Spans = dict[str, list[list[int]]]


class ShotParts(NamedTuple):
    """A text and, for each of its pairs, the format and the values of its placeholders."""

    text: Fragments
    pairs: list[tuple[Format, dict[str, Fragments]]]


def lay_out(shots: Sequence[Shot], style: DocumentStyle, draws: Draws) -> tuple[str, Spans]:
    """The document's text and its spans. A text without pairs stays in its place, without a frame."""
    texts = [shot_parts(number, shot, style, draws) for number, shot in enumerate(shots)]
    if style.layout == "few_shot":
        blocks = few_shot_blocks(texts, style)
    else:
        blocks = [text_block(one, style) if one.pairs else one.text for one in texts]
    return finish(join(style.separator, blocks))


def lay_out_detached(shot: Shot, draws: Draws, templates: Templates) -> tuple[str, Spans]:
    """The pairs of `shot` without its text, in patterns that do not refer to one."""
    style = DocumentStyle(draws, {"text_first": 1.0}, templates)
    for name, patterns in templates.patterns.items():
        style.patterns[name] = draws.pick(f"pattern {name}", closed_book(patterns))
    return finish(join(style.between, inline(shot_parts(0, shot, style, draws), style)))


def closed_book(patterns: list[str]) -> list[str]:
    """The patterns that make sense without a text, or all if none does."""
    return [pattern for pattern in patterns if not REFERS_TO_TEXT.search(pattern)] or patterns


def shot_parts(number: int, shot: Shot, style: DocumentStyle, draws: Draws) -> ShotParts:
    words = shot.text.text.strip()
    pairs: list[tuple[Format, dict[str, Fragments]]] = []
    for index, pair in shot.pairs:
        order = draws.order(f"options {shot.place} {pair.question}", len(pair.options))
        values = pair_values(pair, style.options, order)
        pairs.append(
            (pair.format, {kind: [Fragment(value, SpanLabel(kind, number, index))] for kind, value in values.items()})
        )
    return ShotParts([Fragment(words, SpanLabel("text", number))] if words else [], pairs)


def text_block(one: ShotParts, style: DocumentStyle) -> Fragments:
    opening, bridge = frame(one, style)
    if style.layout == "numbered":
        return join(BLOCKS, [opening, *numbered_blocks(one, style)])
    pairs = join(style.between, dialogue_turns(one, style) if style.layout == "dialogue" else inline(one, style))
    return join(BLOCKS, [bridge, pairs, opening] if style.layout == "questions_first" else [opening, bridge, pairs])


def frame(one: ShotParts, style: DocumentStyle) -> tuple[Fragments, Fragments]:
    """The text with its opening, and the bridge to its pairs."""
    values = {"text": one.text, **speakers(style)}
    return fill(style.opening, values) if one.text else [], fill(style.bridge, values)


def speakers(style: DocumentStyle) -> dict[str, Fragments]:
    asker, replier = style.speakers
    return {"asker": [Fragment(asker)], "replier": [Fragment(replier)]}


def inline(one: ShotParts, style: DocumentStyle) -> list[Fragments]:
    return [fill(style.patterns[kind], parts) for kind, parts in one.pairs]


def dialogue_turns(one: ShotParts, style: DocumentStyle) -> list[Fragments]:
    turns = [(fill(style.turns[kind].ask, parts), fill(style.turns[kind].reply, parts)) for kind, parts in one.pairs]
    return [fill(style.turn, {"ask": ask, "reply": reply, **speakers(style)}) for ask, reply in turns]


def numbered_blocks(one: ShotParts, style: DocumentStyle) -> list[Fragments]:
    """All questions under one heading, then all answers under another."""
    asks, replies = [], []
    for number, (kind, parts) in enumerate(one.pairs, 1):
        ask_mark, reply_mark = (Fragment(fill_words(mark, {"number": str(number)})) for mark in style.marks)
        asks.append([ask_mark, *fill(style.turns[kind].ask, parts)])
        replies.append([reply_mark, *fill(style.turns[kind].reply, parts)])
    halves = zip(style.headings, (asks, replies), strict=True)
    return [[Fragment(f"{heading}\n"), *join(style.between, lines)] for heading, lines in halves]


def few_shot_blocks(texts: Sequence[ShotParts], style: DocumentStyle) -> list[Fragments]:
    """Numbered worked examples, then the test item under its own heading: texts, or the pairs of the only text."""
    asked = [one for one in texts if one.pairs]
    headings = shot_headings(len(asked) if len(asked) > 1 else len(asked[0].pairs), style)
    blocks = []
    for one in texts:
        opening, items = frame(one, style)[0], inline(one, style)
        if not one.pairs:
            blocks.append(one.text)
        elif len(asked) > 1:
            block = join(BLOCKS, [opening, join(style.between, items)])
            blocks.append(join("\n", [next(headings), block]))
        else:
            block = join(style.between, [join("\n", [next(headings), item]) for item in items])
            blocks.append(join(BLOCKS, [opening, block]))
    return blocks


def shot_headings(count: int, style: DocumentStyle) -> Iterator[Fragments]:
    example, test = style.shots
    yield from ([Fragment(fill_words(example, {"number": str(number)}))] for number in range(1, count))
    yield [Fragment(test)]


def pair_values(pair: Pair, style: OptionStyle, order: Sequence[int]) -> dict[SpanKind, str]:
    """The values of the placeholders of a pair's pattern, with its options in `order`."""
    values: dict[SpanKind, str] = {"question": question_stem(pair).strip(), "answer": final_answer(pair)}
    if pair.rationale is not None:
        values["rationale"] = pair.rationale.strip()
    if pair.options:
        gold = gold_option(pair)
        assert gold is not None, pair
        labels = LABELS[style.labels]
        lines = [{"label": labels[place], "option": pair.options[index]} for place, index in enumerate(order)]
        values["options"] = style.between.join(fill_words(style.mark, line) for line in lines)
        values["answer"] = fill_words(style.answer, lines[list(order).index(gold)])
    return values


# ---- templates and fragments


@cache
def split(template: str) -> tuple[str, ...]:
    """Words and placeholder names in turn: 'Q: {question}' -> ('Q: ', 'question', '')"""
    return tuple(PLACEHOLDER.split(template))


def fill(template: str, values: Mapping[str, Fragments]) -> Fragments:
    """The template with its {placeholders} replaced; a value is never read as a template."""
    filled: Fragments = []
    for place, part in enumerate(split(template)):
        if place % 2:
            filled += values[part]
        elif part:
            filled.append(Fragment(part))
    return filled


def fill_words(template: str, values: Mapping[str, str]) -> str:
    """`fill` for plain strings."""
    return "".join(values[part] if place % 2 else part for place, part in enumerate(split(template)))


def join(separator: str, blocks: Iterable[Fragments]) -> Fragments:
    """The non-empty blocks, with `separator` between them."""
    joined: Fragments = []
    for block in blocks:
        if joined and block:
            joined.append(Fragment(separator))
        joined += block
    return joined


def finish(fragments: Fragments) -> tuple[str, Spans]:
    """The text, and its spans by kind: [text, start, end] for texts, [text, pair, start, end] for the others."""
    spans: Spans = {}
    end = 0
    for words, label in fragments:
        start, end = end, end + len(words)
        if label is not None:
            owner = [label.text] if label.pair is None else [label.text, label.pair]
            spans.setdefault(label.part, []).append([*owner, start, end])
    return "".join(fragment.words for fragment in fragments), spans
