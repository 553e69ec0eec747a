"""The tokens of planned documents, read from a source's shards and checked.

Every record read is checked: ArrayRecord keeps a hash of each record's bytes, and the record's id and length must be
those of the index that the plan was made from. So a shard that was cut, damaged or exchanged after planning is found by
the first record that is read from it, and named with that record.

On one host a block of neighbouring records is read at once and kept until its window is through; on several, each
host reads only the records of its own rows.
"""

from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Literal

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ipt_jax.corpus.records import Kind, decode
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.shards import Manifest
from ipt_jax.data.kept import Kept
from ipt_jax.data.lengths import id_key, shards_of
from ipt_jax.data.order import WINDOW
from ipt_jax.data.threads import in_threads

READER_OPTIONS = "readahead_buffer_size:1M,max_parallelism:0"  # a range of records is one read of the disk
BUFFER_BYTES = 1 << 14  # what a single record costs; the default of 1 MiB reads that much for each
OPEN_SHARDS = 128  # an open reader holds eight bytes a record of its shard
BLOCKS_KEPT = 2 * WINDOW + 2


class Tokens(msgspec.Struct):
    """What rows need of a TokenDocument."""

    id: str
    kind: Kind
    dtype: Literal["uint16", "uint32"]
    tokens: bytes
    loss_runs: list[tuple[int, int]]


class RecordReader:
    """Records of one source by number. Any thread may call it."""

    def __init__(self, directory: Path, manifest: Manifest, *, block: int, dtype: str):
        self._paths = [directory / entry.name for entry in manifest.shards]
        self._ends = np.cumsum([entry.records for entry in manifest.shards])
        self._block, self._dtype = block, dtype
        self._readers = Kept(self._open, OPEN_SHARDS)
        self._blocks = Kept(self._read_block, BLOCKS_KEPT)

    def read(self, documents: np.ndarray, *, whole_blocks: bool) -> list[Tokens]:
        """The records of DOCUMENT rows that stand in ascending order of records, each once."""
        numbers = documents["record"].tolist()
        if whole_blocks:
            blocks = sorted({number // self._block for number in numbers})
            found = dict(zip(blocks, in_threads(self._blocks, blocks), strict=True))
            data: Iterable[bytes] = (found[n // self._block][n % self._block] for n in numbers)
        else:
            breaks = np.flatnonzero(np.diff(documents["record"]) != 1) + 1
            runs = np.split(documents["record"], breaks)
            spans = [(int(run[0]), int(run[-1]) + 1) for run in runs]
            data = (record for span in in_threads(self._read_span, spans) for record in span)
        rows = zip(data, numbers, documents["tokens"].tolist(), documents["id"].tolist(), strict=True)
        return [self._checked(*row) for row in rows]

    def _read_block(self, block: int) -> list[bytes]:
        return self._read_span((block * self._block, min((block + 1) * self._block, int(self._ends[-1]))))

    def _read_span(self, span: tuple[int, int]) -> list[bytes]:
        records: list[bytes] = []
        for shard, first, stop in shards_of(self._ends, *span):
            reader, lock = self._readers(shard)
            try:
                with lock:
                    records += reader.read(first, stop)
            except (RuntimeError, IndexError) as error:
                with lock:
                    number = _first_damaged(reader, first, stop)
                raise UserError(_damaged(self._paths[shard], number, error)) from error
        return records

    def _open(self, shard: int) -> tuple[ArrayRecordReader, Lock]:
        path = self._paths[shard]
        if not path.is_file():
            raise UserError(f"{path}: listed in the manifest but absent; run ipt tokenize again")
        reader = ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
        expected = int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))
        if not reader.ok() or reader.num_records() != expected:
            raise UserError(
                f"{path}: damaged (holds {reader.num_records()} records, the manifest says {expected}); "
                "delete it and run ipt tokenize again"
            )
        return reader, Lock()

    def _checked(self, data: bytes, number: int, tokens: int, key: int) -> Tokens:
        try:
            found = decode(data, Tokens)
        except UserError as error:
            raise UserError(self._other(number, str(error))) from error
        if found.dtype != self._dtype:
            raise UserError(self._other(number, f"it holds {found.dtype}, the vocabulary asks for {self._dtype}"))
        held = len(found.tokens) // np.dtype(self._dtype).itemsize
        if id_key(found.id) != key or held != tokens:
            raise UserError(
                self._other(number, f"it holds {held} tokens of {found.id!r}, the index has {tokens} of another id")
                if id_key(found.id) != key
                else self._other(number, f"it holds {held} tokens, its index says {tokens}")
            )
        return found

    def _other(self, number: int, what: str) -> str:
        ((shard, local, _),) = shards_of(self._ends, number, number + 1)
        return _damaged(self._paths[shard], local, what)


def _damaged(path: Path, record: int, what: object) -> str:
    return f"{path}: record {record} is damaged ({what}); delete the file and run ipt tokenize again"


def _first_damaged(reader: ArrayRecordReader, first: int, stop: int) -> int:
    for record in range(first, stop):
        try:
            reader.read(record, record + 1)
        except (RuntimeError, IndexError):
            return record
    return first
