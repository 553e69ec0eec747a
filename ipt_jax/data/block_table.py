"""The documents of a source by block: what a plan holds of each source, 24 bytes a block of records.

A block is a run of neighbouring records, a power of two of them: in the mean about 131,072 tokens, or a thousandth of
a corpus that is smaller than a thousand such. The table of tokens and documents a block is made in one pass over the
shards' index files, which are checked on the way, and kept beside the shards as `blocks-<digest>.npz`, so that later
starts read megabytes. Lengths of single documents are read from the index files when a block is used, and must make the
block's sum.
"""

import contextlib
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import uuid4

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.stage import Manifest
from ipt_jax.data.exclude_converted import PARTS, Exclusion, Remains
from ipt_jax.data.token_index import INDEX, IndexFiles, document_count, read_index, read_parents

BLOCK_TOKENS = 1 << 17
LEAST_BLOCKS = 1 << 10  # of a corpus that has as many records: what is near in it is spread over the epoch
MOST_RECORDS = 1 << 16  # of a block
_NO_PARTS = np.zeros(0, PARTS)
VERSION = 3  # raised when the same shards would give another table

# One document: tokens [start, start + length) of a record, which holds `tokens` in all, lies in record `page` of its
# shard, and whose id has the key `id`.
DOCUMENT = np.dtype(
    [("record", "<i8"), ("start", "<u4"), ("length", "<u4"), ("tokens", "<u4"), ("page", "<u4"), ("id", "<u8")]
)


class BlockTable(NamedTuple):
    """Of each block of `size` records tokens, documents, and the pages (of their shards) of its first and last record;
    and what stays of the records that lost tokens."""

    size: int
    tokens: np.ndarray
    documents: np.ndarray
    pages: np.ndarray
    remains: Remains


class Index(Protocol):
    """Index rows of ranges [first, stop) of records, joined."""

    def __call__(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray: ...


def contents(manifest: Manifest) -> str:
    """What a directory holds: changes with any byte of its shards, whatever its path."""
    return digest([shard.sha256 for shard in manifest.shards])


def block_size(records: int, tokens: int) -> int:
    """The largest power of two of mean records that fits BLOCK_TOKENS and makes LEAST_BLOCKS; at least one record."""
    most = min(BLOCK_TOKENS * records // max(tokens, 1), records // LEAST_BLOCKS, MOST_RECORDS)
    return 1 << max(most.bit_length() - 1, 0)


class SourceDocuments:
    """The documents of one source, by block."""

    def __init__(self, table: BlockTable, index: Index, records: int, name: str):
        self.table, self.index, self.records, self._name = table, index, records, name
        self.tokens = int(table.tokens.sum())
        self.documents = int(table.documents.sum())

    def of_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """The documents of some blocks, block after block, each in corpus order."""
        size = self.table.size
        ranges = [(block * size, min((block + 1) * size, self.records)) for block in blocks.tolist()]
        rows = self.index(ranges)
        counts = np.array([stop - first for first, stop in ranges])
        documents = np.zeros(len(rows), DOCUMENT)
        starts = np.cumsum(counts) - counts
        documents["record"] = np.arange(len(rows)) + np.repeat(blocks * size - starts, counts)
        documents["tokens"] = documents["length"] = rows["tokens"]
        documents["page"], documents["id"] = rows["page"], rows["id"]
        documents = self.table.remains.apply(documents)
        self._check(blocks, documents)
        return documents

    def _check(self, blocks: np.ndarray, documents: np.ndarray) -> None:
        """The lengths must make the sums that the plan was made from."""
        order = np.argsort(blocks)
        place = order[np.searchsorted(blocks[order], documents["record"] // self.table.size)]
        sums = np.bincount(place, documents["length"], minlength=len(blocks)).astype(np.int64)
        if (sums != self.table.tokens[blocks]).any():
            block = int(blocks[np.argmax(sums != self.table.tokens[blocks])])
            first = block * self.table.size
            raise UserError(
                f"source {self._name!r}: the index of records {first} to {first + self.table.size - 1} has changed "
                "since the plan was made; delete the source's directory and run ipt tokenize again"
            )


def open_table(name: str, directory: Path, manifest: Manifest, converted: tuple[Path, Manifest] | None) -> BlockTable:
    """The table of a source without what `converted` was made from: the kept one, or made and kept."""
    size = block_size(document_count(manifest), manifest.tokens)
    check_manifest(directory, manifest)
    counts = [[document_count(entry), entry.tokens] for entry in manifest.shards]
    made_from = [VERSION, size, contents(manifest), counts, manifest.summary["side_files"]]
    if converted:
        made_from += [contents(converted[1]), converted[1].summary["side_files"]]
    path = directory / f"blocks-{digest(made_from)[:16]}.npz"
    if path.is_file():
        with contextlib.suppress(PermissionError):  # another user's, closed to us: made anew
            return _load(path, size)
    parents = read_parents(*converted) if converted else None
    table = make_table(name, directory, manifest, size, parents)
    _keep(path, table)
    return table


def check_manifest(directory: Path, manifest: Manifest) -> None:
    """Raises UserError when a manifest contradicts itself: it was edited, or mixed from two."""
    total = len(manifest.shards)
    faults = {
        "its fingerprint is not that of its identity": manifest.fingerprint != digest(manifest.identity),
        "its shards are not those of one run, in order": any(
            not entry.name.endswith(f"-{number:05d}-of-{total:05d}.array_record")
            for number, entry in enumerate(manifest.shards)
        ),
        "its records are not the sum of its shards'": manifest.records != sum(one.records for one in manifest.shards),
        "its counts are not the sums of its shards'": document_count(manifest)
        != sum(map(document_count, manifest.shards)),
        "its tokens are not the sum of its shards'": manifest.tokens != sum(one.tokens for one in manifest.shards),
    }
    for fault, found in faults.items():
        if found:
            raise UserError(
                f"{directory / 'manifest.json'}: edited by hand or damaged ({fault}); "
                "delete the directory and run ipt tokenize again"
            )


def make_table(name: str, directory: Path, manifest: Manifest, size: int, parents: np.ndarray | None) -> BlockTable:
    """One pass over the index files."""
    blocks = -(-document_count(manifest) // size)
    tokens, documents = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    pages = np.zeros((blocks, 2), np.uint32)
    exclusion = Exclusion(name, directory, manifest, parents) if parents is not None else None
    first = 0
    for shard, index in enumerate(read_index(directory, manifest)):
        lengths = index["tokens"].astype(np.int64)
        gone, parts = exclusion.shard(shard, first, index) if exclusion else (np.zeros(len(index), bool), _NO_PARTS)
        places = (first + np.flatnonzero(~gone)) // size
        _add(tokens, places, lengths[~gone])
        _add(documents, places, np.ones(len(places), np.int64))
        part_places = parts["record"] // size
        _add(tokens, part_places, parts["stop"].astype(np.int64) - parts["start"])
        _add(documents, part_places, np.ones(len(parts), np.int64))
        _add_pages(pages, size, first, index["page"])
        first += len(index)
    return BlockTable(size, tokens, documents, pages, exclusion.finish() if exclusion else Remains.nothing())


def _add_pages(pages: np.ndarray, size: int, first: int, of_records: np.ndarray) -> None:
    """Notes where blocks begin and end among the records from `first` on."""
    records = np.arange(first, first + len(of_records))
    begins, ends = records % size == 0, (records + 1) % size == 0
    ends[-1:] = True  # the last block may end here; if not, a later shard says where
    pages[records[begins] // size, 0] = of_records[begins]
    pages[records[ends] // size, 1] = of_records[ends]


def _add(sums: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Adds values at places that stand in ascending order."""
    if not len(places):
        return
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    sums[places[starts]] += np.add.reduceat(values, starts)


def _keep(path: Path, table: BlockTable) -> None:
    """Writes the table whole or not at all. Several hosts may do so at once: they write the same."""
    remains, temporary = table.remains, path.with_name(f"{path.stem}-{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            np.savez(
                file,
                tokens=table.tokens,
                documents=table.documents,
                pages=table.pages,
                touched=remains.touched,
                parts=remains.parts,
                counts=np.array(remains.counts, np.int64),
            )
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        print(f"{path.parent}: cannot keep the block table ({error.strerror}); each start makes it", file=sys.stderr)


def _load(path: Path, size: int) -> BlockTable:
    data = path.read_bytes()  # one read of a network disk
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            remains = Remains(kept["touched"], kept["parts"], tuple(kept["counts"].tolist()))
            return BlockTable(size, kept["tokens"], kept["documents"], kept["pages"], remains)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, it is made again") from error


def open_documents(name: str, directory: Path, manifest: Manifest, table: BlockTable) -> SourceDocuments:
    return SourceDocuments(table, IndexFiles(directory, manifest), document_count(manifest), name)


def documents_in_memory(lengths: Sequence[int], name: str = "memory") -> SourceDocuments:
    """A source of whole documents of the given lengths, without files."""
    index = np.zeros(len(lengths), INDEX)
    index["tokens"] = lengths
    size = block_size(len(lengths), int(index["tokens"].sum(dtype=np.int64)))
    firsts = np.arange(0, len(lengths), size)
    tokens = np.add.reduceat(index["tokens"].astype(np.int64), firsts)
    documents = np.diff(np.append(firsts, len(lengths)))

    def read(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([index[first:stop] for first, stop in ranges])

    pages = np.zeros((len(firsts), 2), np.uint32)
    return SourceDocuments(BlockTable(size, tokens, documents, pages, Remains.nothing()), read, len(lengths), name)
