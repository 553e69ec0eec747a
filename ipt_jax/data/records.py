"""The tokens of planned documents, read from a source's shards and checked.

Every record read is checked: ArrayRecord keeps a hash of each record's bytes, its length must be that of the index
which the plan was made from, and so must the id of the first record that each read takes from a shard. A shard that
was cut, damaged or exchanged is found when it is read, before any of it is trained on, and named with the record.

On one host a block of neighbouring records is read at once and kept until its window is through; on several, each
host reads only the records of its own rows.
"""

from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ipt_jax.corpus.records import Kind, decode
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.shards import Manifest
from ipt_jax.data.kept import Kept
from ipt_jax.data.lengths import id_key, shards_of
from ipt_jax.data.threads import in_threads

READER_OPTIONS = (
    "readahead_buffer_size:1M,max_parallelism:0,footer_prefetch_bytes:256K"  # a range is one read of the disk
)
BUFFER_BYTES = 1 << 14  # what a single record costs; the default of 1 MiB reads that much for each
OPEN_SHARDS = 128  # an open reader holds eight bytes a record of its shard
WINDOWS_KEPT = 4


class Tokens(msgspec.Struct):
    """What rows need of a TokenDocument."""

    id: str
    kind: Kind
    dtype: Literal["uint16", "uint32"]
    tokens: bytes
    loss_runs: list[tuple[int, int]]


_DECODER = msgspec.msgpack.Decoder(Tokens)


class RecordReader:
    """Records of one source by number, in blocks of `block`, of which a window has `window`. Any thread may call it."""

    def __init__(self, directory: Path, manifest: Manifest, *, block: int, window: int, dtype: str):
        self._paths = [directory / entry.name for entry in manifest.shards]
        self._ends = np.cumsum([entry.records for entry in manifest.shards])
        self._bytes = [entry.bytes for entry in manifest.shards]
        self._block, self._dtype = block, dtype
        self._readers = Kept(self._open, OPEN_SHARDS)
        self._blocks = Kept(self._read_block, WINDOWS_KEPT * window)

    def read(self, documents: np.ndarray, *, whole_blocks: bool) -> list[Tokens]:
        """The records of DOCUMENT rows that stand in ascending order of records, each once."""
        numbers = documents["record"]
        size = self._block if whole_blocks else 1
        bounds = np.flatnonzero(np.diff(numbers // size, prepend=-2) > (0 if whole_blocks else 1))
        parts = np.split(numbers, bounds[1:])
        if whole_blocks:
            blocks = in_threads(self._blocks, [int(part[0]) // size for part in parts])
            picked = [[block[i] for i in (part % size).tolist()] for block, part in zip(blocks, parts, strict=True)]
        else:
            picked = in_threads(self._read_span, [(int(part[0]), int(part[-1]) + 1) for part in parts])
        data = list(chain.from_iterable(picked))
        found = self._decode(data, documents)
        shards = np.searchsorted(self._ends, numbers, side="right")
        self._check(found, documents, np.union1d(bounds, np.flatnonzero(np.diff(shards, prepend=-1))))
        return found

    def load_blocks(self, records: np.ndarray) -> None:
        in_threads(self._blocks, np.unique(records // self._block).tolist())

    def _read_block(self, block: int) -> list[bytes]:
        return self._read_span((block * self._block, min((block + 1) * self._block, int(self._ends[-1]))))

    def _read_span(self, span: tuple[int, int]) -> list[bytes]:
        records: list[bytes] = []
        for shard, first, stop in shards_of(self._ends, *span):
            reader = self._readers(shard)
            try:
                records += reader.read(first, stop)  # of a range: const in C++, so threads may share the reader
            except (RuntimeError, IndexError) as error:
                number = _first_damaged(reader, first, stop)
                raise UserError(_damaged(self._paths[shard], number, error)) from error
        return records

    def _open(self, shard: int) -> ArrayRecordReader:
        path = self._paths[shard]
        if not path.is_file():
            raise UserError(f"{path}: listed in the manifest but absent; run ipt tokenize again")
        size = path.stat().st_size
        if size != self._bytes[shard]:
            raise UserError(
                f"{path}: {size} bytes where the manifest says {self._bytes[shard]}; "
                "delete it and run ipt tokenize again"
            )
        reader = ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
        expected = int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))
        if not reader.ok() or reader.num_records() != expected:
            raise UserError(
                f"{path}: damaged (holds {reader.num_records()} records, the manifest says {expected}); "
                "delete it and run ipt tokenize again"
            )
        return reader

    def _decode(self, data: list[bytes], documents: np.ndarray) -> list[Tokens]:
        try:
            return [_DECODER.decode(record) for record in data]
        except msgspec.DecodeError:
            for number, record in zip(documents["record"].tolist(), data, strict=True):
                try:
                    decode(record, Tokens)
                except UserError as error:
                    raise UserError(self._other(number, error)) from error
            raise

    def _check(self, found: list[Tokens], documents: np.ndarray, bounds: np.ndarray) -> None:
        """Every record has the length that the plan counts on; the first of each read is the very document."""
        lengths = np.array([len(one.tokens) for one in found]) // np.dtype(self._dtype).itemsize
        if (wrong := np.flatnonzero(lengths != documents["tokens"])).size:
            expected = documents[wrong[0]]
            held = f"it holds {lengths[wrong[0]]} tokens, its index says {expected['tokens']}"
            raise UserError(self._other(int(expected["record"]), held))
        for at, key in zip(bounds.tolist(), documents["id"][bounds].tolist(), strict=True):
            if id_key(found[at].id) != key or found[at].dtype != self._dtype:
                other = f"it is {found[at].id!r} in {found[at].dtype}, not what its index says"
                raise UserError(self._other(int(documents["record"][at]), other))

    def _other(self, number: int, what: object) -> str:
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
