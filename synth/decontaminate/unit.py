"""One unit of an input in a worker process: its shard and the list of its matches, under temporary names."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ipt_jax.corpus.files import TEMPORARY, writing
from ipt_jax.corpus.records import encode
from ipt_jax.corpus.settings import file_digest
from ipt_jax.corpus.shards import Shards, write_shard
from ipt_jax.corpus.sources import Dropped, SourceSettings, Unit, read_unit
from synth.decontaminate.needles import Finder, Found, Needles
from synth.decontaminate.records import Cleaned, Part, Record, clean, parts
from synth.groups import decode_group

BATCH_LETTERS = 1 << 17  # compared at once: arrays of this size stay in a core's cache
REMOVED = "removed.jsonl"


class Job(NamedTuple):
    """`label` names the input in the list of matches; `needles_digest` tells one file's contents from another's."""

    unit: Unit
    settings: SourceSettings
    label: str
    groups: bool
    temporary: Path
    needles: Path
    needles_digest: str


class Made(NamedTuple):
    records: int
    counts: dict[str, int]
    dropped: dict[str, int]
    removed: str  # SHA-256 of the list of matches


def clean_unit(job: Job) -> Made:
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
    return Made(written, dict(sorted(counts.items())), dict(dropped), file_digest(listing))


def removed_path(temporary: Path) -> Path:
    """Where the list of matches of the shard at `temporary` lies until the shard is sealed."""
    return temporary.with_name(f"{temporary.name.removesuffix(TEMPORARY)}.{REMOVED}{TEMPORARY}")


@lru_cache(maxsize=1)
def load_finder(path: Path, digest: str) -> Finder:
    assert file_digest(path) == digest, path
    return Finder(Needles.load(path))


def read_records(job: Job, dropped: Counter[str]) -> Iterator[Record]:
    if job.groups:
        shards = Shards(job.unit.path, verify=False)
        yield from (decode_group(record, shards) for record in shards.stream(job.unit.start))
        return
    for row in read_unit(job.unit, job.settings):
        if isinstance(row, Dropped):
            dropped[row.reason] += 1
        else:
            yield row


def clean_records(records: Iterable[Record], finder: Finder, counts: Counter[str]) -> Iterator[Cleaned]:
    """`clean` of every record, in order; as many are compared at once as make a batch."""
    waiting: list[tuple[Record, list[Part]]] = []
    letters = 0
    for record in records:
        waiting.append((record, list(parts(record))))
        letters += sum(len(text) for part in waiting[-1][1] for text in part.wordings)
        if letters >= BATCH_LETTERS:
            yield from clean_batch(waiting, finder, counts)
            waiting, letters = [], 0
    if waiting:
        yield from clean_batch(waiting, finder, counts)


def clean_batch(batch: list[tuple[Record, list[Part]]], finder: Finder, counts: Counter[str]) -> Iterator[Cleaned]:
    found = iter(finder.find([text for _, sides in batch for part in sides for text in part.wordings]))
    for record, sides in batch:
        matched: list[tuple[Part, Found]] = []
        for part in sides:
            wordings = [next(found) for _ in part.wordings]
            matched.append((part, {item: run for one in wordings for item, run in one.items()}))
        yield clean(record, matched, finder.needles.items, finder.needles.names, counts)
