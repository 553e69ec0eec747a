"""What of a record is compared with benchmarks, and what stays of it.

Of a group: each accepted pair, and each text. A pair that matches is marked rejected; so are all pairs of a text that
matches, and the text is named in the group's metadata, so that `synth render` leaves it out: nothing is deleted. A
document that matches is left out. Tags and cues of the wire format are taken out first: a benchmark's question and
answer stand side by side, without "Options:" in between.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from ipt_jax.corpus.records import Document, GroupText, Pair, SynthGroup
from synth.decontaminate.needles import Found, Item
from synth.groups import CONTAMINATED, contaminated_places
from synth.parse import reject
from synth.prompt import ANSWER_CUE, COT_CUE, OPTIONS_CUE, final_answer, question_stem

Record = Document | SynthGroup
FORMAT = re.compile("</?CON>|<QUE>|<ANS>|</END>|" + "|".join(map(re.escape, (OPTIONS_CUE, COT_CUE, ANSWER_CUE))))


class Part(NamedTuple):
    """One thing that is compared: a document, a group's text, or a pair of it; several wordings of it may be."""

    kind: str
    place: tuple[int, ...]
    wordings: tuple[str, ...]


class Cleaned(NamedTuple):
    """What stays of a record (None: nothing), and its matches, a line of the list each."""

    record: Record | None
    matches: list[dict[str, Any]]


def parts(record: Record) -> Iterator[Part]:
    if isinstance(record, Document):
        yield Part("document", (), (FORMAT.sub("\n", record.text) if record.kind == "task" else record.text,))
        return
    for place, text in enumerate(record.texts):
        yield Part("text", (place,), (text.text,))
        for number, pair in enumerate(text.pairs):
            if pair.verdict == "accepted":
                yield Part("pair", (place, number), wordings(pair))


def wordings(pair: Pair) -> tuple[str, ...]:
    """A pair as a benchmark would hold it: question and answer, and with options and reasoning in between."""
    question, answer = question_stem(pair), final_answer(pair)
    bare = f"{question}\n{answer}"
    if not pair.options and pair.rationale is None:
        return (bare,)
    return bare, "\n".join([question, *pair.options, pair.rationale or "", answer])


def clean(
    record: Record,
    found: Sequence[tuple[Part, Found]],
    items: Sequence[Item],
    names: Sequence[str],
    counts: Counter[str],
) -> Cleaned:
    """`found`: each part of the record with the items that it matches; `names` are the benchmarks'."""
    for part, _ in found:
        counts[f"{part.kind}s"] += 1
    hits = {part.place: matched for part, matched in found if matched}
    if not hits:
        return Cleaned(record, [])
    removed = {part: why for part, _ in found if (why := reasons(part, hits))}
    for part, why in removed.items():
        counts[f"{part.kind}s_removed"] += 1
        for benchmark in {items[item].benchmark for item in why}:
            counts[f"removed.{names[benchmark]}.{part.kind}s"] += 1
    matches = [tell(record, part, items[item], names, run) for part, matched in found for item, run in matched.items()]
    places = {part.place for part in removed}
    return Cleaned(None if isinstance(record, Document) else mark(record, places), matches)


def reasons(part: Part, hits: dict[tuple[int, ...], Found]) -> Found:
    """The items for which a part goes: its own, and a pair's text's."""
    return {**hits.get(part.place[:1], {}), **hits.get(part.place, {})}


def tell(record: Record, part: Part, item: Item, names: Sequence[str], run: str) -> dict[str, Any]:
    """One line of the list of matches."""
    line: dict[str, Any] = {"record": record.id, "kind": part.kind}
    if isinstance(record, SynthGroup):
        line["text"] = record.texts[part.place[0]].raw_id
    if part.kind == "pair":
        line["pair"] = part.place[1]
    return {**line, "benchmark": names[item.benchmark], "item": item.id, "words": run}


def mark(group: SynthGroup, removed: set[tuple[int, ...]]) -> SynthGroup:
    """The group with the pairs at these places rejected, and its texts at these places named."""
    texts = [mark_text(text, place, removed) for place, text in enumerate(group.texts)]
    places = sorted({place[0] for place in removed if len(place) == 1} | contaminated_places(group))
    meta = {**group.meta, CONTAMINATED: places} if places else group.meta
    return msgspec.structs.replace(group, texts=texts, meta=meta)


def mark_text(text: GroupText, place: int, removed: set[tuple[int, ...]]) -> GroupText:
    pairs = [
        reject(pair, "contaminated") if (place, number) in removed else pair for number, pair in enumerate(text.pairs)
    ]
    return msgspec.structs.replace(text, pairs=pairs)
