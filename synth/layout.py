"""Lays texts and pairs out as one running text in the look that was drawn, and says where each of them stands.

Guaranteed: every text and pair is shown once, in order; options are shuffled for each pair and the answer follows. In
few_shot the last text with pairs is the test item, or, where only one text has pairs, its last pair is.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipt_jax.corpus.records import GroupText, Pair
from synth.look import Draws, Look, OptionStyle
from synth.parse import gold_option
from synth.pieces import Mark, Part, Piece, Pieces, Spans, fill, fill_words, finish, join
from synth.prompt import final_answer, question_stem

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

    text: Pieces
    pairs: list[Pair]
    shown: list[dict[str, Pieces]]


def has_example(shots: Sequence[Shot]) -> bool:
    """Whether something can stand before a test item: another text with pairs, or another pair of the only one."""
    asked = [len(shot.pairs) for shot in shots if shot.pairs]
    return len(asked) > 1 or asked[0] > 1


def lay_out(shots: Sequence[Shot], look: Look, draws: Draws) -> tuple[str, Spans]:
    """The document's text and its spans. A text without pairs stands alone in its place; a blank one is left out."""
    texts = [prepare(number, shot, look, draws) for number, shot in enumerate(shots)]
    if look.layout == "few_shot":
        blocks = few_shot_blocks(texts, look)
    else:
        blocks = [text_block(laid, look) if laid.pairs else laid.text for laid in texts]
    return finish(join(look.separator, blocks))


def prepare(number: int, shot: Shot, look: Look, draws: Draws) -> Laid:
    words = shot.text.text.strip()
    shown: list[dict[str, Pieces]] = []
    for index, pair in shot.pairs:
        order = draws.order(f"options {shot.place} {pair.question}", len(pair.options))
        parts = shown_parts(pair, look.options, order)
        shown.append({part: [Piece(value, Mark(part, number, index))] for part, value in parts.items()})
    text = [Piece(words, Mark("text", number))] if words else []
    return Laid(text, [pair for _, pair in shot.pairs], shown)


def text_block(laid: Laid, look: Look) -> Pieces:
    opening, bridge = frame(laid, look)
    match look.layout:
        case "numbered":
            return join(BLOCKS, [opening, *numbered_blocks(laid, look)])
        case "dialogue":
            return join(BLOCKS, [opening, bridge, join(look.between, dialogue_turns(laid, look))])
        case "questions_first":
            return join(BLOCKS, [bridge, join(look.between, inline(laid, look)), opening])
    return join(BLOCKS, [opening, bridge, join(look.between, inline(laid, look))])


def frame(laid: Laid, look: Look) -> tuple[Pieces, Pieces]:
    """The text as it is introduced, and the words that lead on to its pairs."""
    asker, replier = ([Piece(name)] for name in look.speakers)
    values = {"text": laid.text, "asker": asker, "replier": replier}
    return fill(look.opening, values) if laid.text else [], fill(look.bridge, values)


def inline(laid: Laid, look: Look) -> list[Pieces]:
    return [fill(look.patterns[pair.format], parts) for pair, parts in zip(laid.pairs, laid.shown, strict=True)]


def dialogue_turns(laid: Laid, look: Look) -> Iterator[Pieces]:
    asker, replier = ([Piece(name)] for name in look.speakers)
    for pair, parts in zip(laid.pairs, laid.shown, strict=True):
        turn = look.turns[pair.format]
        said = {"ask": fill(turn.ask, parts), "reply": fill(turn.reply, parts)}
        yield fill(look.turn, {"asker": asker, "replier": replier, **said})


def numbered_blocks(laid: Laid, look: Look) -> list[Pieces]:
    """All questions under one heading, then all answers under another."""
    asks, replies = [], []
    for number, (pair, parts) in enumerate(zip(laid.pairs, laid.shown, strict=True), 1):
        ask_mark, reply_mark = (Piece(fill_words(mark, {"number": str(number)})) for mark in look.marks)
        asks.append([ask_mark, *fill(look.turns[pair.format].ask, parts)])
        replies.append([reply_mark, *fill(look.turns[pair.format].reply, parts)])
    sides = zip(look.headings, (asks, replies), strict=True)
    return [[Piece(f"{heading}\n"), *join(look.between, lines)] for heading, lines in sides]


def few_shot_blocks(texts: Sequence[Laid], look: Look) -> list[Pieces]:
    """Worked examples, counted, then the test item under a heading of its own."""
    asked = [laid for laid in texts if laid.pairs]
    if len(asked) == 1:
        return [few_pairs(laid, look) if laid.pairs else laid.text for laid in texts]
    headings = iter(shot_headings(len(asked), look))
    return [
        join("\n", [next(headings), join(BLOCKS, [frame(laid, look)[0], join(look.between, inline(laid, look))])])
        if laid.pairs
        else laid.text
        for laid in texts
    ]


def few_pairs(laid: Laid, look: Look) -> Pieces:
    lines = zip(shot_headings(len(laid.pairs), look), inline(laid, look), strict=True)
    items = [join("\n", [heading, line]) for heading, line in lines]
    return join(BLOCKS, [frame(laid, look)[0], join(look.between, items)])


def shot_headings(count: int, look: Look) -> list[Pieces]:
    example, test = look.shots
    numbered = [[Piece(fill_words(example, {"number": str(number)}))] for number in range(1, count)]
    return [*numbered, [Piece(test)]]


def shown_parts(pair: Pair, style: OptionStyle, order: Sequence[int]) -> dict[Part, str]:
    """What the placeholders of a pair's pattern stand for, with its options in `order`."""
    parts: dict[Part, str] = {"question": question_stem(pair).strip(), "answer": final_answer(pair)}
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
