"""Running text that knows its stretches: words of a template, or a text, a question, options, reasoning, an answer.

Guaranteed: values are put into a template in one pass, so that one that holds '{answer}' stays as it is; the spans
that `finish` gives cut exactly the marked strings out of the text, in the order of the text.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

SpanKind = Literal["text", "question", "options", "rationale", "answer"]
PLACEHOLDER = re.compile(r"\{(\w+)\}")


class SpanLabel(NamedTuple):
    """What a stretch is: part, index of its text in the document and, but for texts, of its pair in the record."""

    part: SpanKind
    text: int
    pair: int | None = None


class Fragment(NamedTuple):
    words: str
    mark: SpanLabel | None = None


Fragments = list[Fragment]
Spans = dict[str, list[list[int]]]


@cache
def split(template: str) -> tuple[str, ...]:
    """Words and placeholder names in turn: 'Q: {question}' -> ('Q: ', 'question', '')"""
    return tuple(PLACEHOLDER.split(template))


def fill(template: str, values: Mapping[str, Fragments]) -> Fragments:
    """The template with its {placeholders} replaced; what is put in is never read as a template."""
    filled: Fragments = []
    for place, part in enumerate(split(template)):
        if place % 2:
            filled += values[part]
        elif part:
            filled.append(Fragment(part))
    return filled


def fill_words(template: str, values: Mapping[str, str]) -> str:
    """The same for plain strings."""
    return "".join(values[part] if place % 2 else part for place, part in enumerate(split(template)))


def join(separator: str, blocks: Iterable[Fragments]) -> Fragments:
    """The blocks that hold anything, with `separator` between them."""
    joined: Fragments = []
    for block in blocks:
        if joined and block:
            joined.append(Fragment(separator))
        joined += block
    return joined


def finish(pieces: Fragments) -> tuple[str, Spans]:
    """The text, and for each part its spans: [text, start, end] of texts, [text, pair, start, end] of the others."""
    spans: Spans = {}
    end = 0
    for words, mark in pieces:
        start, end = end, end + len(words)
        if mark is not None:
            owner = [mark.text] if mark.pair is None else [mark.text, mark.pair]
            spans.setdefault(mark.part, []).append([*owner, start, end])
    return "".join(piece.words for piece in pieces), spans
