"""Running text that knows its stretches: words of a template, or a text, a question, options, reasoning, an answer.

Guaranteed: values are put into a template in one pass, so that one that holds '{answer}' stays as it is; the spans
that `finish` gives cut exactly the marked strings out of the text, in the order of the text.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

Part = Literal["text", "question", "options", "rationale", "answer"]
PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Mark(NamedTuple):
    """What a stretch is: part, index of its text in the document and, but for texts, of its pair in the record."""

    part: Part
    text: int
    pair: int | None = None


class Piece(NamedTuple):
    words: str
    mark: Mark | None = None


Pieces = list[Piece]
Spans = dict[str, list[list[int]]]


@cache
def split(template: str) -> tuple[str, ...]:
    """Words and placeholder names in turn: 'Q: {question}' -> ('Q: ', 'question', '')"""
    return tuple(PLACEHOLDER.split(template))


def fill(template: str, values: Mapping[str, Pieces]) -> Pieces:
    """The template with its {placeholders} replaced; what is put in is never read as a template."""
    filled: Pieces = []
    for place, part in enumerate(split(template)):
        if place % 2:
            filled += values[part]
        elif part:
            filled.append(Piece(part))
    return filled


def fill_words(template: str, values: Mapping[str, str]) -> str:
    """The same for plain strings."""
    return "".join(values[part] if place % 2 else part for place, part in enumerate(split(template)))


def join(separator: str, blocks: Iterable[Pieces]) -> Pieces:
    """The blocks that hold anything, with `separator` between them."""
    joined: Pieces = []
    for block in blocks:
        if joined and block:
            joined.append(Piece(separator))
        joined += block
    return joined


def finish(pieces: Pieces) -> tuple[str, Spans]:
    """The text, and for each part its spans: [text, start, end] of texts, [text, pair, start, end] of the others."""
    spans: Spans = {}
    end = 0
    for words, mark in pieces:
        start, end = end, end + len(words)
        if mark is not None:
            owner = [mark.text] if mark.pair is None else [mark.text, mark.pair]
            spans.setdefault(mark.part, []).append([*owner, start, end])
    return "".join(piece.words for piece in pieces), spans
