"""The HTML page of `synth collect`: contexts, pairs, formats and tokens per data set, examples, what was dropped.

Guarantees: the page follows from the output directory alone, so a rerun of a finished command writes the same page.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ipt_jax.core.html import Markup, render_page, write_page
from ipt_jax.core.svg import bar_chart
from ipt_jax.corpus.records import Document, Pair, SynthGroup, decode
from ipt_jax.corpus.shards import Shards
from synth.format.parser import REASONS, parse_completion
from synth.format.wire import question_stem

SHOWN_EXAMPLES = 2  # per data set
SHOWN_CHARACTERS = 900  # of a context
SHOWN_PAIRS = 4
MEANINGS = {
    "beyond_max_contexts": "other contexts of the data set have more pairs",
    "duplicate_id": "an earlier row has the same id",
    "empty_context": "the context is empty",
    "lone_surrogate": "text that is not valid in UTF-8",
    "no_answer": "the answer is null or empty, as in hidden test splits",
    "no_pairs": "no pair of the row is usable",
    "no_right_answer": "no candidate is marked as true",
    "too_long": "more tokens than few_shot.max_tokens",
    "unanswerable": "the data set says that the text has no answer",
    "answer_outside_passages": "the answer of a long context is not in one passage",
    "answer_not_in_context": "no document contains the answer",
}


class SetSummary(NamedTuple):
    """One data set: its counts, its formats, and examples (context, how many characters it has, pairs)."""

    name: str
    counts: dict[str, int]
    tokens: int
    formats: Counter[str]
    dropped: dict[str, int]
    examples: list[tuple[str, int, list[dict[str, Any]]]]


def write_collection_page(output: str | Path, page: Path) -> int:
    """Writes the page about the output directory of `synth collect`; returns its bytes."""
    shards = Shards(output)
    sets = [summarize(shards, place) for place in range(len(shards.paths))]
    formats = sum((one.formats for one in sets), Counter[str]())
    dropped = Counter(shards.manifest.dropped)
    charts = [
        chart("Pairs per data set", {one.name: one.counts.get("pairs", 0) for one in sets}, "c2"),
        chart("Formats", {name.replace("_", " "): count for name, count in formats.items()}, "c6"),
        chart("Dropped", {name.replace("_", " "): count for name, count in dropped.items()}, "c1"),
    ]
    values = {
        "title": "Collection",
        "shown_characters": SHOWN_CHARACTERS,
        "shown_pairs": SHOWN_PAIRS,
        "manifest": shards.manifest,
        "sets": sets,
        "formats": [name for name, _ in formats.most_common()],
        "charts": [one for one in charts if one],
        "meanings": {name: meaning(name) for name in dropped},
    }
    return write_page(page, render_page(Path(__file__).with_name("collection.html.j2"), **values))


def chart(title: str, counts: dict[str, int], colour: str) -> tuple[str, Markup] | None:
    rows = [(name, count) for name, count in Counter(counts).most_common() if count]
    return (title, bar_chart(title, rows, colour=colour, total=sum(counts.values()))) if rows else None


def summarize(shards: Shards, place: int) -> SetSummary:
    """Reads a shard, which holds one data set."""
    entry, name = shards.manifest.shards[place], ""
    formats: Counter[str] = Counter()
    examples: list[tuple[str, int, list[dict[str, Any]]]] = []
    for record in shards.stream(place):
        if entry.name.startswith("groups"):
            (text,) = decode(record, SynthGroup).texts
            name, found = text.source, [(text.text, text.pairs)]
        else:
            document = decode(record, Document)
            name, found = document.source, document_examples(document)
        for context, pairs in found:
            formats.update(pair.format for pair in pairs)
            if len(examples) < SHOWN_EXAMPLES:
                shown = [question_parts(pair) for pair in pairs[:SHOWN_PAIRS]]
                examples.append((context[:SHOWN_CHARACTERS], len(context), shown))
    return SetSummary(name, entry.counts, entry.tokens, formats, entry.dropped, examples)


def document_examples(document: Document) -> list[tuple[str, list[Pair]]]:
    """(context, pairs) of each example of a document."""
    found: list[tuple[str, list[Pair]]] = []
    context = ""
    for segment in document.segments:
        if segment.control:
            context = ""
        elif segment.loss:
            found.append((context, parse_completion(segment.text, finished=True)))
        else:
            context = segment.text.strip().removeprefix("<CON>").removesuffix("</CON>").strip()
    return found


def question_parts(pair: Pair) -> dict[str, Any]:
    stem = question_stem(pair)
    return {"pair": pair, "stem": stem, "rest": pair.question.removeprefix(stem)}


def meaning(reason: str) -> str:
    bare = reason.removeprefix("pair_")
    if reason.startswith("ignored_field_"):
        return f"pairs with a field {reason.removeprefix('ignored_field_')!r}, which is ignored"
    for start, words in (("missing_", "no field for the"), ("unreadable_", "another type than expected of the")):
        if bare.startswith(start):
            return f"{words} {bare.removeprefix(start)}"
    return MEANINGS.get(bare) or REASONS.get(bare, "")
