"""Duplicate ids and texts of a corpus, by one rule for all stages.

Ids of rows must be unique: records and exclusions name raw texts by id. A duplicate is refused before a stage writes,
and both places are named. Documents of a stage's output keep their ids, which may repeat (several epochs of one text).
With `id: content`, equal texts are one document. Equal texts under several ids are counted, and dropped with
`drop_duplicates`. One parallel pass over the corpus hashes ids and texts: 16 bytes of disk for each, in a temporary
folder, and memory that does not grow with the corpus.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import ExecutorName, run_units
from ipt_jax.core.hashing import hash64
from ipt_jax.core.progress import Progress
from ipt_jax.corpus.records import Document
from ipt_jax.corpus.row_reader import CONTENT, Dropped, SourceSettings
from ipt_jax.corpus.sources import Corpus, InputFile, Unit, read_unit, row_places

ROW_BITS = 40  # of a place: rows of a unit
HERE_BYTES = 32 << 20  # a smaller corpus is hashed in this process
ENTRY = np.dtype([("hash", ">u8"), ("place", ">u8")])
Rows = dict[int, list[int]]  # by unit, rows of the unit from 0
Select = Callable[[SourceSettings, Document], bool]


class Duplicates(NamedTuple):
    """`texts`: rows with a text of an earlier row, if they are to be dropped. `found`: the number of such rows."""

    texts: Rows
    found: int


def find_duplicates(
    corpus: Corpus,
    units: Sequence[Unit],
    *,
    drop: bool,
    count: bool = False,
    select: Select | None = None,
    workers: int | None = None,
    executor: ExecutorName = "local",
    label: str,
) -> Duplicates:
    """The duplicate texts of a corpus, of the documents that `select` takes. Raises UserError for a duplicate id.

    `count`: equal texts are of interest where they are not dropped. Else a corpus whose ids cannot repeat is not read.
    """
    if not (drop or count) and all(unit.file.form == "shards" or corpus.source_of(unit).id is None for unit in units):
        return Duplicates({}, 0)  # there is nothing to check
    if executor == "local" and sum(unit.size for unit in units) < HERE_BYTES:
        workers = 1
    jobs = [(unit, corpus.source_of(unit)) for unit in units]
    with RepeatedHashes() as ids, RepeatedHashes() as texts, Progress(len(units), "units", f"{label}: ids") as progress:
        for unit, found in run_units(partial(hash_unit, select), jobs, workers=workers, executor=executor):
            places = (np.uint64(unit) << np.uint64(ROW_BITS)) + found["place"].astype(np.uint64)
            if has_row_ids(units[unit], corpus.source_of(units[unit])):
                ids.add(found["id"], places)
            texts.add(found["text"], places)
            progress.advance()
        _refuse_duplicate_ids(corpus, units, ids.pairs())
        repeated = texts.pairs()["later"]
    dropped: Rows = {}
    for place in repeated.tolist():
        unit, row = divmod(place, 1 << ROW_BITS)
        if drop or corpus.source_of(units[unit]).id == CONTENT:
            dropped.setdefault(unit, []).append(row)
    return Duplicates(dropped, len(repeated))


def has_row_ids(unit: Unit, source: SourceSettings) -> bool:
    """Whether the ids of a unit come from its rows."""
    return unit.file.form != "shards" and source.id_field is not None


def read_once(unit: Unit, settings: SourceSettings, duplicates: Sequence[int]) -> Iterator[Document | Dropped]:
    """`read_unit` with duplicate rows dropped."""
    rows = read_unit(unit, settings)
    if not len(duplicates):
        return rows
    places = set(duplicates)
    return (Dropped("duplicate") if row in places else found for row, found in enumerate(rows))


def report_duplicates(command: str, found: Duplicates, drop: bool) -> None:
    """Prints how many texts are duplicates that are not dropped."""
    if found.found and not drop:
        print(
            f"{command}: {found.found:,} texts are equal to an earlier one; set drop_duplicates: true to use each once",
            file=sys.stderr,
        )


HASHES = np.dtype([("id", ">u8"), ("text", ">u8"), ("place", ">u8")])


def hash_unit(select: Select | None, job: tuple[Unit, SourceSettings]) -> np.ndarray:
    """The hashes of id and text of each document of a unit, and its row. Runs in a worker process."""
    unit, source = job
    found = bytearray()
    for row, document in enumerate(read_unit(unit, source)):
        if isinstance(document, Dropped) or (select is not None and not select(source, document)):
            continue
        text = document.text
        if text and not text.isspace():
            found += hash64(document.id) + hash64(text) + row.to_bytes(8)
    return np.frombuffer(bytes(found), HASHES)


def _refuse_duplicate_ids(corpus: Corpus, units: Sequence[Unit], pairs: np.ndarray) -> None:
    """Different ids share a hash with a probability of 4e-5 at 40M rows, so the ids themselves are compared."""
    for first, later in pairs.tolist():
        (one, number, document), (other, again, second) = (_row_at(corpus, units, place) for place in (first, later))
        if isinstance(document, Document) and isinstance(second, Document) and document.id == second.id:
            raise UserError(
                f"input {corpus.name}: duplicate id {document.id!r}, row {number} of {one.name} and row {again} of "
                f"{other.name}; make the ids unique, or set id: null (file and row) or id: content (hash of the text)"
            )


def _row_at(corpus: Corpus, units: Sequence[Unit], place: int) -> tuple[InputFile, int, Document | Dropped]:
    unit, row = divmod(place, 1 << ROW_BITS)
    source = corpus.source_of(units[unit])
    file, number = next(islice(row_places(units[unit], source), row, None))
    return file, number, next(islice(read_unit(units[unit], source), row, None))


class RepeatedHashes:
    """Finds hashes that occur twice, in memory that does not grow with their number. A context manager.

    Each hash and its place add 16 bytes to one of 256 files in a temporary folder (640 MB for 40M); each file is sorted
    by itself.
    """

    def __init__(self, buffer_bytes: int = 64 << 10) -> None:
        self._buffers = [bytearray() for _ in range(256)]  # by a hash's first byte
        self._buffer_bytes = buffer_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="corpus-hashes-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        entries = np.empty(len(hashes), ENTRY)
        entries["hash"], entries["place"] = hashes, places
        buckets = (entries["hash"] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        starts = np.searchsorted(buckets[order], np.arange(257))
        for bucket in np.unique(buckets).tolist():
            buffer = self._buffers[bucket]
            buffer += entries[order[starts[bucket] : starts[bucket + 1]]].tobytes()
            if len(buffer) >= self._buffer_bytes:
                with self._path(bucket).open("ab") as file:
                    file.write(buffer)
                buffer.clear()

    def _path(self, bucket: int) -> Path:
        return Path(self._folder.name) / str(bucket)

    def pairs(self) -> np.ndarray:
        """(first, later) places of each repeated hash, by the later place."""
        found = [np.empty(0, [("first", np.uint64), ("later", np.uint64)])]
        for bucket, buffer in enumerate(self._buffers):
            written = self._path(bucket).read_bytes() if self._path(bucket).exists() else b""
            entries = np.frombuffer(written + buffer, ENTRY)
            hashes, places = (entries[name].astype(np.uint64) for name in ("hash", "place"))
            order = np.lexsort((places, hashes))
            later = np.zeros(len(order), bool)
            later[1:] = hashes[order[1:]] == hashes[order[:-1]]
            first = np.maximum.accumulate(np.where(later, 0, np.arange(len(order))))
            pairs = np.empty(int(later.sum()), found[0].dtype)
            pairs["first"], pairs["later"] = places[order[first[later]]], places[order[later]]
            found.append(pairs)
        return np.sort(np.concatenate(found), order="later")
