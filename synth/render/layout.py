"""Lays texts and pairs out as one running text in the look that was drawn, and says where each of them stands.

Guaranteed: every text and pair is shown once, in order; options are shuffled for each pair and the answer follows. In
few_shot the last text with pairs is the test item, or, where only one text has pairs, its last pair is.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipt_jax.corpus.records import GroupText, Pair
from synth.format.parser import gold_option
from synth.format.wire import final_answer, question_stem
from synth.render.spans import Fragment, Fragments, SpanKind, SpanLabel, Spans, fill, fill_words, finish, join
from synth.render.templates import DocumentStyle, Draws, OptionStyle

BLOCKS = "\n\n"  # between a text, what leads on, and its pairs


@dataclass(frozen=True)
class Shot:
    """A text, its place in the group, and the pairs that are shown for it, each with its index in the record."""

    place: int
    text: GroupText
    pairs: list[tuple[int, Pair]]


@dataclass(frozen=True)
class Laid:
    """One text as pieces, with what its pairs' placeholders stand for."""

    text: Fragments
    pairs: list[Pair]
    shown: list[dict[str, Fragments]]


def has_example(shots: Sequence[Shot]) -> bool:
    """Whether something can stand before a test item: another text with pairs, or another pair of the only one."""
    asked = [len(shot.pairs) for shot in shots if shot.pairs]
    return len(asked) > 1 or asked[0] > 1


def lay_out(shots: Sequence[Shot], document_style: DocumentStyle, draws: Draws) -> tuple[str, Spans]:
    """The document's text and its spans. A text without pairs stands alone in its place; a blank one is left out."""
    texts = [prepare(number, shot, document_style, draws) for number, shot in enumerate(shots)]
    if document_style.layout == "few_shot":
        blocks = few_shot_blocks(texts, document_style)
    else:
        blocks = [text_block(laid, document_style) if laid.pairs else laid.text for laid in texts]
    return finish(join(document_style.separator, blocks))


def prepare(number: int, shot: Shot, document_style: DocumentStyle, draws: Draws) -> Laid:
    words = shot.text.text.strip()
    shown: list[dict[str, Fragments]] = []
    for index, pair in shot.pairs:
        order = draws.order(f"options {shot.place} {pair.question}", len(pair.options))
        parts = shown_parts(pair, document_style.options, order)
        shown.append({part: [Fragment(value, SpanLabel(part, number, index))] for part, value in parts.items()})
    text = [Fragment(words, SpanLabel("text", number))] if words else []
    return Laid(text, [pair for _, pair in shot.pairs], shown)


def text_block(laid: Laid, document_style: DocumentStyle) -> Fragments:
    opening, bridge = frame(laid, document_style)
    match document_style.layout:
        case "numbered":
            return join(BLOCKS, [opening, *numbered_blocks(laid, document_style)])
        case "dialogue":
            return join(BLOCKS, [opening, bridge, join(document_style.between, dialogue_turns(laid, document_style))])
        case "questions_first":
            return join(BLOCKS, [bridge, join(document_style.between, inline(laid, document_style)), opening])
    return join(BLOCKS, [opening, bridge, join(document_style.between, inline(laid, document_style))])


def frame(laid: Laid, document_style: DocumentStyle) -> tuple[Fragments, Fragments]:
    """The text as it is introduced, and the words that lead on to its pairs."""
    asker, replier = ([Fragment(name)] for name in document_style.speakers)
    values = {"text": laid.text, "asker": asker, "replier": replier}
    return fill(document_style.opening, values) if laid.text else [], fill(document_style.bridge, values)


def inline(laid: Laid, document_style: DocumentStyle) -> list[Fragments]:
    return [
        fill(document_style.patterns[pair.format], parts) for pair, parts in zip(laid.pairs, laid.shown, strict=True)
    ]


def dialogue_turns(laid: Laid, document_style: DocumentStyle) -> Iterator[Fragments]:
    asker, replier = ([Fragment(name)] for name in document_style.speakers)
    for pair, parts in zip(laid.pairs, laid.shown, strict=True):
        turn = document_style.turns[pair.format]
        said = {"ask": fill(turn.ask, parts), "reply": fill(turn.reply, parts)}
        yield fill(document_style.turn, {"asker": asker, "replier": replier, **said})


def numbered_blocks(laid: Laid, document_style: DocumentStyle) -> list[Fragments]:
    """All questions under one heading, then all answers under another."""
    asks, replies = [], []
    for number, (pair, parts) in enumerate(zip(laid.pairs, laid.shown, strict=True), 1):
        ask_mark, reply_mark = (Fragment(fill_words(mark, {"number": str(number)})) for mark in document_style.marks)
        asks.append([ask_mark, *fill(document_style.turns[pair.format].ask, parts)])
        replies.append([reply_mark, *fill(document_style.turns[pair.format].reply, parts)])
    sides = zip(document_style.headings, (asks, replies), strict=True)
    return [[Fragment(f"{heading}\n"), *join(document_style.between, lines)] for heading, lines in sides]


def few_shot_blocks(texts: Sequence[Laid], document_style: DocumentStyle) -> list[Fragments]:
    """Worked examples, counted, then the test item under a heading of its own."""
    asked = [laid for laid in texts if laid.pairs]
    if len(asked) == 1:
        return [few_pairs(laid, document_style) if laid.pairs else laid.text for laid in texts]
    headings = iter(shot_headings(len(asked), document_style))
    return [
        join(
            "\n",
            [
                next(headings),
                join(
                    BLOCKS, [frame(laid, document_style)[0], join(document_style.between, inline(laid, document_style))]
                ),
            ],
        )
        if laid.pairs
        else laid.text
        for laid in texts
    ]


def few_pairs(laid: Laid, document_style: DocumentStyle) -> Fragments:
    lines = zip(shot_headings(len(laid.pairs), document_style), inline(laid, document_style), strict=True)
    items = [join("\n", [heading, line]) for heading, line in lines]
    return join(BLOCKS, [frame(laid, document_style)[0], join(document_style.between, items)])


def shot_headings(count: int, document_style: DocumentStyle) -> list[Fragments]:
    example, test = document_style.shots
    numbered = [[Fragment(fill_words(example, {"number": str(number)}))] for number in range(1, count)]
    return [*numbered, [Fragment(test)]]


def shown_parts(pair: Pair, style: OptionStyle, order: Sequence[int]) -> dict[SpanKind, str]:
    """What the placeholders of a pair's pattern stand for, with its options in `order`."""
    parts: dict[SpanKind, str] = {"question": question_stem(pair).strip(), "answer": final_answer(pair)}
    if pair.rationale is not None:
        parts["rationale"] = pair.rationale.strip()
    if pair.options:
        gold = gold_option(pair)
        assert gold is not None, pair
        lines = [{"label": label(style, place), "option": pair.options[i]} for place, i in enumerate(order)]
        parts["options"] = style.between.join(fill_words(style.mark, line) for line in lines)
        parts["answer"] = fill_words(style.answer, lines[list(order).index(gold)])
    return parts


def label(style: OptionStyle, place: int) -> str:
    match style.labels:
        case "upper":
            return string.ascii_uppercase[place]
        case "lower":
            return string.ascii_lowercase[place]
        case "numbers":
            return str(place + 1)
    return ""
