"""Finds the evidence of an answer in its text: the same words, or the sentence that shares most of its words.

For highlighting only: `synth verify` scores grounding. Short answers occur by chance and have no evidence.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ipt_jax.corpus.records import Pair
from synth.format.wire import final_answer, question_stem
from synth.text.words import sentence_spans

SHORTEST = 3  # characters of an answer
LONG_WORD = re.compile(r"\w{4,}|\d+")
SHARED = 0.5  # of an answer's words that a sentence must have


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
