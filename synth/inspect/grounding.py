"""Where an answer stands in its text: word for word, or else the sentence that shares most of its words.

A help for the eye, no verdict: `synth verify` scores grounding. Short answers occur by chance and are not looked for.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ipt_jax.corpus.records import Pair
from synth.format.wire import final_answer, question_stem
from synth.text.words import sentence_spans

SHORTEST = 3  # characters of an answer that is looked for
CONTENT_WORD = re.compile(r"\w{4,}|\d+")
SHARED = 0.5  # of an answer's words that a sentence must hold


class Ground(NamedTuple):
    start: int
    end: int
    exact: bool


class HighlightedSpan(NamedTuple):
    """A piece of text that lies inside the grounds of the pairs `numbers`; `ends` are those that end with it."""

    start: int
    end: int
    numbers: list[int]
    ends: list[int]
    exact: bool


def ground(text: str, pair: Pair) -> Ground | None:
    """Of several places that hold the answer, the one whose sentence shares most words with the question."""
    answer = final_answer(pair).strip().removesuffix(".")
    if not pair.accepted or len(answer) < SHORTEST:
        return None
    spaced = r"\s+".join(map(re.escape, answer.split()))
    found = list(re.finditer(rf"(?<!\w){spaced}(?!\w)", text, re.IGNORECASE))
    if len(found) == 1:
        return Ground(*found[0].span(), exact=True)
    sentences = sentence_spans(text)
    if found:
        asked = content_words(question_stem(pair))
        best = max(found, key=lambda match: len(asked & words_around(text, sentences, match.start())))
        return Ground(*best.span(), exact=True)
    return nearest_sentence(text, sentences, content_words(answer))


def nearest_sentence(text: str, sentences: Sequence[tuple[int, int]], wanted: set[str]) -> Ground | None:
    if not wanted or not sentences:
        return None
    shared = [len(wanted & content_words(text[start:end])) for start, end in sentences]
    best = max(range(len(sentences)), key=shared.__getitem__)
    return Ground(*sentences[best], exact=False) if shared[best] >= SHARED * len(wanted) else None


def words_around(text: str, sentences: Sequence[tuple[int, int]], place: int) -> set[str]:
    return next((content_words(text[start:end]) for start, end in sentences if start <= place < end), set())


def content_words(text: str) -> set[str]:
    return set(CONTENT_WORD.findall(text.casefold()))


def highlighted_spans(text: str, pairs: Sequence[Pair]) -> list[HighlightedSpan]:
    """The grounded parts of a text, cut wherever a ground begins or ends, in order, none overlapping."""
    grounds = {number: found for number, pair in enumerate(pairs, 1) if (found := ground(text, pair))}
    edges = sorted({edge for found in grounds.values() for edge in (found.start, found.end)})
    cut = []
    for start, end in zip(edges, edges[1:], strict=False):
        inside = {number: found for number, found in grounds.items() if found.start <= start and end <= found.end}
        if inside:
            ends = [number for number, found in inside.items() if found.end == end]
            cut.append(HighlightedSpan(start, end, list(inside), ends, any(found.exact for found in inside.values())))
    return cut
