"""What of a record is compared with benchmarks, and what stays of it.

Of a group: each accepted pair, and each text. A pair that matches is marked rejected; so are all pairs of a text that
matches, and the text is named in the group's metadata, so that `synth render` leaves it out: nothing is deleted. A
document that matches is left out. Tags and cues of the wire format are taken out first: a benchmark's question and
answer stand side by side, without "Options:" in between.

One unit of an input in a worker process: its shard and the list of its matches, under temporary names.
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

from ipt_jax.core.files import TEMPORARY, writing
from ipt_jax.core.hashing import file_digest
from ipt_jax.corpus.records import Document, GroupText, Pair, SynthGroup, encode
from ipt_jax.corpus.row_reader import Dropped, SourceSettings
from ipt_jax.corpus.shards import Shards, write_shard
from ipt_jax.corpus.sources import Unit, read_unit
from synth.decontaminate.ngram_index import BenchmarkItem, Finder, MatchedItems, NgramIndex
from synth.format.parser import reject
from synth.format.wire import ANSWER_CUE, COT_CUE, OPTIONS_CUE, final_answer, question_stem
from synth.groups import CONTAMINATED, contaminated_places, decode_group

CheckedRecord = Document | SynthGroup
FORMAT = re.compile("</?CON>|<QUE>|<ANS>|</END>|" + "|".join(map(re.escape, (OPTIONS_CUE, COT_CUE, ANSWER_CUE))))


class ComparedText(NamedTuple):
    """One thing that is compared: a document, a group's text, or a pair of it; several wordings of it may be."""

    kind: str
    place: tuple[int, ...]
    wordings: tuple[str, ...]


class Cleaned(NamedTuple):
    """What stays of a record (None: nothing), and its matches, a line of the list each."""

    record: CheckedRecord | None
    matches: list[dict[str, Any]]


def parts(record: CheckedRecord) -> Iterator[ComparedText]:
    if isinstance(record, Document):
        yield ComparedText("document", (), (FORMAT.sub("\n", record.text) if record.kind == "task" else record.text,))
        return
    for place, text in enumerate(record.texts):
        yield ComparedText("text", (place,), (text.text,))
        for number, pair in enumerate(text.pairs):
            if pair.accepted:
                yield ComparedText("pair", (place, number), wordings(pair))


def wordings(pair: Pair) -> tuple[str, ...]:
    """A pair as a benchmark would hold it: question and answer, and with options and reasoning in between."""
    question, answer = question_stem(pair), final_answer(pair)
    bare = f"{question}\n{answer}"
    if not pair.options and pair.rationale is None:
        return (bare,)
    return bare, "\n".join([question, *pair.options, pair.rationale or "", answer])


def clean(
    record: CheckedRecord,
    found: Sequence[tuple[ComparedText, MatchedItems]],
    items: Sequence[BenchmarkItem],
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


def reasons(part: ComparedText, hits: dict[tuple[int, ...], MatchedItems]) -> MatchedItems:
    """The items for which a part goes: its own, and a pair's text's."""
    return {**hits.get(part.place[:1], {}), **hits.get(part.place, {})}


def tell(
    record: CheckedRecord, part: ComparedText, item: BenchmarkItem, names: Sequence[str], run: str
) -> dict[str, Any]:
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


BATCH_LETTERS = 1 << 17  # compared at once: arrays of this size stay in a core's cache
REMOVED = "removed.jsonl"


class CleanJob(NamedTuple):
    """`label` names the input in the list of matches; `needles_digest` tells one file's contents from another's."""

    unit: Unit
    settings: SourceSettings
    label: str
    groups: bool
    temporary: Path
    needles: Path
    needles_digest: str


class CleanedUnit(NamedTuple):
    records: int
    counts: dict[str, int]
    dropped: dict[str, int]
    removed: str  # SHA-256 of the list of matches


def clean_unit(job: CleanJob) -> CleanedUnit:
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    listing = removed_path(job.temporary)
    with writing(listing), listing.open("w", encoding="utf-8") as file:

        def records() -> Iterator[bytes]:
            finder = load_finder(job.needles, job.needles_digest)
            for cleaned in clean_records(read_records(job, dropped), finder, counts):
                lines = (json.dumps({"input": job.label, **match}, ensure_ascii=False) for match in cleaned.matches)
                file.writelines(f"{line}\n" for line in lines)
                if cleaned.record is None:
                    dropped["contaminated"] += 1
                else:
                    yield encode(cleaned.record)

        written = write_shard(job.temporary, records())
        file.flush()
        os.fsync(file.fileno())
    return CleanedUnit(written, dict(sorted(counts.items())), dict(dropped), file_digest(listing))


def removed_path(temporary: Path) -> Path:
    """Where the list of matches of the shard at `temporary` lies until the shard is sealed."""
    return temporary.with_name(f"{temporary.name.removesuffix(TEMPORARY)}.{REMOVED}{TEMPORARY}")


@lru_cache(maxsize=1)
def load_finder(path: Path, digest: str) -> Finder:
    assert file_digest(path) == digest, path
    return Finder(NgramIndex.load(path))


def read_records(job: CleanJob, dropped: Counter[str]) -> Iterator[CheckedRecord]:
    if job.groups:
        shards = Shards(job.unit.path, verify=False)
        yield from (decode_group(record, shards) for record in shards.stream(job.unit.start))
        return
    for row in read_unit(job.unit, job.settings):
        if isinstance(row, Dropped):
            dropped[row.reason] += 1
        else:
            yield row


def clean_records(records: Iterable[CheckedRecord], finder: Finder, counts: Counter[str]) -> Iterator[Cleaned]:
    """`clean` of every record, in order; as many are compared at once as make a batch."""
    waiting: list[tuple[CheckedRecord, list[ComparedText]]] = []
    letters = 0
    for record in records:
        waiting.append((record, list(parts(record))))
        letters += sum(len(text) for part in waiting[-1][1] for text in part.wordings)
        if letters >= BATCH_LETTERS:
            yield from clean_batch(waiting, finder, counts)
            waiting, letters = [], 0
    if waiting:
        yield from clean_batch(waiting, finder, counts)


def clean_batch(
    batch: list[tuple[CheckedRecord, list[ComparedText]]], finder: Finder, counts: Counter[str]
) -> Iterator[Cleaned]:
    found = iter(finder.find([text for _, sides in batch for part in sides for text in part.wordings]))
    for record, sides in batch:
        matched: list[tuple[ComparedText, MatchedItems]] = []
        for part in sides:
            wordings = [next(found) for _ in part.wordings]
            matched.append((part, {item: run for one in wordings for item, run in one.items()}))
        yield clean(record, matched, finder.needles.items, finder.needles.names, counts)
