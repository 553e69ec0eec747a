"""Which texts of a record are compared with benchmarks, and what is kept of the record.

Of a group, each accepted pair and each text are compared. A pair that matches is marked rejected. So are all pairs of
a text that matches, and the group's metadata lists the text, so that `synth render` excludes it. Nothing is deleted.
A document that matches is dropped. Tags and cues of the wire format are removed before the comparison: a benchmark's
question and answer follow each other, without "Options:" in between.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ipt_jax.core.hashing import file_digest
from ipt_jax.core.stage import NewShard
from ipt_jax.corpus.duplicates import read_once
from ipt_jax.corpus.records import Document, Pair, SynthGroup, encode
from ipt_jax.corpus.row_reader import Dropped, SourceSettings
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.sources import Unit
from synth.decontaminate.ngram_index import Finder, MatchedItems, NgramIndex
from synth.format.parser import reject
from synth.format.wire import ANSWER_CUE, COT_CUE, OPTIONS_CUE, final_answer, question_stem
from synth.groups import CONTAMINATED, contaminated_places, decode_group

CheckedRecord = Document | SynthGroup
FORMAT = re.compile("</?CON>|<QUE>|<ANS>|</END>|" + "|".join(map(re.escape, (OPTIONS_CUE, COT_CUE, ANSWER_CUE))))


class ComparedText(NamedTuple):
    """A document, a group's text or a pair, in one or more wordings. `place`: of the text, then of the pair."""

    kind: str
    place: tuple[int, ...]
    wordings: tuple[str, ...]


class Cleaned(NamedTuple):
    """What is kept of a record (None: nothing), and its matches, one per line of the list."""

    record: CheckedRecord | None
    matches: list[dict[str, Any]]


def compared_texts(record: CheckedRecord) -> Iterator[ComparedText]:
    if isinstance(record, Document):
        yield ComparedText("document", (), (FORMAT.sub("\n", record.text) if record.kind == "task" else record.text,))
        return
    for place, text in enumerate(record.texts):
        yield ComparedText("text", (place,), (text.text,))
        for number, pair in enumerate(text.pairs):
            if pair.accepted:
                yield ComparedText("pair", (place, number), wordings(pair))


def wordings(pair: Pair) -> tuple[str, ...]:
    """A pair as in a benchmark: question and answer, and both with options and reasoning in between."""
    question, answer = question_stem(pair), final_answer(pair)
    bare = f"{question}\n{answer}"
    if not pair.options and pair.rationale is None:
        return (bare,)
    return bare, "\n".join([question, *pair.options, pair.rationale or "", answer])


def clean(
    record: CheckedRecord, found: Sequence[tuple[ComparedText, MatchedItems]], needles: NgramIndex, counts: Counter[str]
) -> Cleaned:
    """`found`: each text of the record with the items that it matches."""
    counts.update(f"{text.kind}s" for text, _ in found)
    matched = {text.place: items for text, items in found if items}
    if not matched:
        return Cleaned(record, [])
    removed = set()
    for text, _ in found:
        # The items for which a text is removed: its own, and for a pair those of the pair's text.
        if items := matched.get(text.place[:1], {}) | matched.get(text.place, {}):
            removed.add(text.place)
            counts[f"{text.kind}s_removed"] += 1
            for benchmark in {needles.items[item].benchmark for item in items}:
                counts[f"removed.{needles.names[benchmark]}.{text.kind}s"] += 1
    matches = [match_line(record, text, needles, item, run) for text, items in found for item, run in items.items()]
    return Cleaned(None if isinstance(record, Document) else mark(record, removed), matches)


def match_line(record: CheckedRecord, text: ComparedText, needles: NgramIndex, item: int, run: str) -> dict[str, Any]:
    """One line of the list of matches."""
    line: dict[str, Any] = {"record": record.id, "kind": text.kind}
    if isinstance(record, SynthGroup):
        line["text"] = record.texts[text.place[0]].raw_id
    if text.kind == "pair":
        line["pair"] = text.place[1]
    found = needles.items[item]
    return {**line, "benchmark": needles.names[found.benchmark], "item": found.id, "words": run}


def mark(group: SynthGroup, removed: set[tuple[int, ...]]) -> SynthGroup:
    """The group with the pairs at these places rejected, and the texts at these places listed in its metadata."""
    texts = []
    for place, text in enumerate(group.texts):
        pairs = [
            reject(pair, "contaminated") if (place, number) in removed else pair
            for number, pair in enumerate(text.pairs)
        ]
        texts.append(msgspec.structs.replace(text, pairs=pairs))
    places = sorted({place[0] for place in removed if len(place) == 1} | contaminated_places(group))
    meta = {**group.meta, CONTAMINATED: places} if places else group.meta
    return msgspec.structs.replace(group, texts=texts, meta=meta)


BATCH_LETTERS = 1 << 17  # compared at once: arrays of this size stay in a core's cache
REMOVED = "removed.jsonl"


class CleanItem(NamedTuple):
    """What one shard is made of. `label` names the input in the list of matches."""

    unit: Unit
    settings: SourceSettings
    label: str
    groups: bool
    duplicates: list[int]


def clean_records(needles: Path, needles_digest: str, item: CleanItem, shard: NewShard) -> Iterator[bytes]:
    """The records of one unit that are kept. Lists its matches in a side file. Runs in a worker process."""
    listing = shard.side_path(REMOVED)
    finder = load_finder(needles, needles_digest)
    with listing.open("w", encoding="utf-8") as file:
        for cleaned in clean_in_batches(read_records(item, shard.dropped), finder, shard.counts):
            lines = (json.dumps({"input": item.label, **match}, ensure_ascii=False) for match in cleaned.matches)
            file.writelines(f"{line}\n" for line in lines)
            if cleaned.record is None:
                shard.dropped["contaminated"] += 1
            else:
                yield encode(cleaned.record)
        file.flush()
        os.fsync(file.fileno())
    shard.side_files = {REMOVED: file_digest(listing)}


@lru_cache(maxsize=1)
def load_finder(path: Path, digest: str) -> Finder:
    """The digest makes a rerun in the same process load other needles."""
    assert file_digest(path) == digest, path
    return Finder(NgramIndex.load(path))


def read_records(item: CleanItem, dropped: Counter[str]) -> Iterator[CheckedRecord]:
    if item.groups:
        shards = Shards(item.unit.file.path, verify=False)
        yield from (decode_group(record, shards) for record in shards.stream(item.unit.start))
        return
    for row in read_once(item.unit, item.settings, item.duplicates):
        if isinstance(row, Dropped):
            dropped[row.reason] += 1
        else:
            yield row


def clean_in_batches(records: Iterable[CheckedRecord], finder: Finder, counts: Counter[str]) -> Iterator[Cleaned]:
    """`clean` of every record, in order. The texts of one batch are compared at once."""
    waiting: list[tuple[CheckedRecord, list[ComparedText]]] = []
    letters = 0
    for record in records:
        waiting.append((record, list(compared_texts(record))))
        letters += sum(len(wording) for text in waiting[-1][1] for wording in text.wordings)
        if letters >= BATCH_LETTERS:
            yield from clean_batch(waiting, finder, counts)
            waiting, letters = [], 0
    if waiting:
        yield from clean_batch(waiting, finder, counts)


def clean_batch(
    batch: list[tuple[CheckedRecord, list[ComparedText]]], finder: Finder, counts: Counter[str]
) -> Iterator[Cleaned]:
    found = iter(finder.find([wording for _, texts in batch for text in texts for wording in text.wordings]))
    for record, texts in batch:
        matched: list[tuple[ComparedText, MatchedItems]] = []
        for text in texts:
            matches = [next(found) for _ in text.wordings]
            matched.append((text, {item: run for one in matches for item, run in one.items()}))
        yield clean(record, matched, finder.needles, counts)
