"""The documents of a source by block: what a plan holds of a source, 24 bytes per block.

A block is a power of two of consecutive records: about 131,072 tokens in the mean, or a thousandth of a smaller corpus.
The tokens and documents of each block come from one pass over the checked index files, and are cached beside the shards
as `blocks-<digest>.npz`, so that later starts read megabytes. The lengths of single documents are read from the index
files when a block is used, and must sum to the tokens of the block.
"""

import contextlib
import io
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.manifest import Manifest
from ipt_jax.data.exclude_converted import PARTS, Exclusion, Remains
from ipt_jax.data.held_out import HeldOut, Role
from ipt_jax.data.token_index import IndexFiles, document_count, read_index, read_parents

BLOCK_TOKENS = 1 << 17
MIN_BLOCKS = 1 << 10  # if the corpus has as many records: neighbouring documents spread over the epoch
MAX_RECORDS = 1 << 16  # per block
VERSION = 3  # incremented when the same shards give another table
ReadIndex = Callable[[Sequence[tuple[int, int]]], np.ndarray]  # index rows of ranges [first, stop) of records, joined

# A document: tokens [start, start + length) of a record. The record has `tokens` tokens and an id with the key `id`,
# and is stored in page `page` of its shard.
DOCUMENT = np.dtype(
    [("record", "<i8"), ("start", "<u4"), ("length", "<u4"), ("tokens", "<u4"), ("page", "<u4"), ("id", "<u8")]
)


class BlockTable(NamedTuple):
    """For each block of `size` records: tokens, documents, and the pages (in their shards) of its first and last
    record. `remains`: the parts that remain of records that lost tokens."""

    size: int
    tokens: np.ndarray
    documents: np.ndarray
    pages: np.ndarray
    remains: Remains


def contents(manifest: Manifest) -> str:
    """A digest of the bytes of all shards, independent of their path."""
    return digest([shard.sha256 for shard in manifest.shards])


def block_size(records: int, tokens: int) -> int:
    """The largest power of two of mean records within BLOCK_TOKENS that makes MIN_BLOCKS blocks; at least 1."""
    most = min(BLOCK_TOKENS * records // max(tokens, 1), records // MIN_BLOCKS, MAX_RECORDS)
    return 1 << max(most.bit_length() - 1, 0)


class SourceDocuments:
    """The documents of one source, by block."""

    def __init__(self, table: BlockTable, index: ReadIndex, records: int, name: str):
        self.table, self.index, self.records, self._name = table, index, records, name
        self.tokens = int(table.tokens.sum())
        self.documents = int(table.documents.sum())

    def of_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """The documents of some blocks, in the order of `blocks`, in corpus order within a block."""
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
        """Lengths must sum to the tokens of the blocks, from which the plan was made."""
        order = np.argsort(blocks)
        place = order[np.searchsorted(blocks[order], documents["record"] // self.table.size)]
        sums = np.bincount(place, documents["length"], minlength=len(blocks)).astype(np.int64)
        changed = sums != self.table.tokens[blocks]
        if changed.any():
            first = int(blocks[np.argmax(changed)]) * self.table.size
            raise UserError(
                f"source {self._name!r}: the index of records {first} to {first + self.table.size - 1} has changed "
                "since the plan was made; delete the directory of the source and rerun ipt tokenize"
            )


def open_documents(
    name: str, directory: Path, manifest: Manifest, converted: tuple[Path, Manifest] | None,
    held_out: HeldOut | None = None, role: Role = Role.TRAINING,
) -> SourceDocuments:  # fmt: skip
    """The documents of a source without the texts that `converted` was made from. Caches the block table.

    With `held_out`, only documents of `role`.
    """
    size = block_size(document_count(manifest), manifest.tokens)
    _check_manifest(directory, manifest)
    counts = [[document_count(entry), entry.tokens] for entry in manifest.shards]
    made_from = [VERSION, size, contents(manifest), counts, manifest.summary["side_files"]]
    if converted:
        made_from += [contents(converted[1]), converted[1].summary["side_files"]]
    if held_out:
        made_from += [held_out.identity, role.name]
    path = directory / f"blocks-{digest(made_from)[:16]}.npz"
    table = _load(path, size)
    if table is None:
        exclusion = Exclusion(name, directory, manifest, read_parents(*converted)) if converted else None
        table = _make_table(directory, manifest, size, exclusion, held_out, role)
        _save(path, table)
    return SourceDocuments(table, IndexFiles(directory, manifest), document_count(manifest), name)


def _check_manifest(directory: Path, manifest: Manifest) -> None:
    """Raises UserError if a manifest contradicts itself."""
    total = len(manifest.shards)
    shards = manifest.shards
    names = [f"-{number:05d}-of-{total:05d}.array_record" for number in range(total)]
    faults = {
        "its fingerprint does not match its identity": manifest.fingerprint != digest(manifest.identity),
        "its shards are not those of one run, in order": not all(
            entry.name.endswith(name) for entry, name in zip(shards, names, strict=True)
        ),
        "its records are not the sum over shards": manifest.records != sum(one.records for one in shards),
        "its counts are not the sums over shards": document_count(manifest) != sum(map(document_count, shards)),
        "its tokens are not the sum over shards": manifest.tokens != sum(one.tokens for one in shards),
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise UserError(
            f"{directory / 'manifest.json'}: edited by hand or damaged ({fault}); "
            "delete the directory and rerun ipt tokenize"
        )


def _make_table(
    directory: Path, manifest: Manifest, size: int, exclusion: Exclusion | None, held_out: HeldOut | None, role: Role
) -> BlockTable:
    """One pass over the index files."""
    blocks = -(-document_count(manifest) // size)
    tokens, documents = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    pages = np.zeros((blocks, 2), np.uint32)
    every_touched, every_part, in_no_role, first = [np.zeros(0, bool)], [np.zeros(0, PARTS)], 0, 0
    for shard, index in enumerate(read_index(directory, manifest)):
        lengths = index["tokens"].astype(np.int64)
        blocks_of = (first + np.arange(len(index))) // size
        touched, parts = np.zeros(len(index), bool), np.zeros(0, PARTS)
        if exclusion:
            touched, parts = exclusion.shard(shard, first, index)
        if held_out:
            roles = held_out.roles(directory, manifest, shard, index)
            parts = parts[roles[parts["record"] - first] == role]
            touched |= roles != role
            in_no_role += int((roles == Role.NEITHER).sum())
        _add(tokens, documents, parts["record"] // size, parts["stop"].astype(np.int64) - parts["start"])
        _add(tokens, documents, blocks_of[~touched], lengths[~touched])
        _add_pages(pages, size, first, index["page"])
        first += len(index)
        every_touched.append(touched)
        every_part.append(parts)
    counts = exclusion.finish() if exclusion else (0, 0, 0)
    if not exclusion and not held_out:
        return BlockTable(size, tokens, documents, pages, Remains.nothing())
    counts += (in_no_role,) if held_out else ()
    remains = Remains(np.packbits(np.concatenate(every_touched)), np.concatenate(every_part), counts)
    return BlockTable(size, tokens, documents, pages, remains)


def _add_pages(pages: np.ndarray, size: int, first: int, of_records: np.ndarray) -> None:
    """Sets the pages of blocks that begin or end in the records from `first` on."""
    records = np.arange(first, first + len(of_records))
    begins, ends = records % size == 0, (records + 1) % size == 0
    ends[-1:] = True  # the last block may end here; if not, a later shard overwrites it
    pages[records[begins] // size, 0] = of_records[begins]
    pages[records[ends] // size, 1] = of_records[ends]


def _add(tokens: np.ndarray, documents: np.ndarray, blocks: np.ndarray, lengths: np.ndarray) -> None:
    """Adds documents of these lengths to their blocks, which are in ascending order."""
    if len(blocks):
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        tokens[blocks[starts]] += np.add.reduceat(lengths, starts)
        documents[blocks[starts]] += np.diff(starts, append=len(blocks))


def _save(path: Path, table: BlockTable) -> None:
    """Writes the table atomically. Several hosts may write it at once: the bytes are the same."""
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
        print(f"{path.parent}: cannot save the block table ({error.strerror}); each start makes it", file=sys.stderr)


def _load(path: Path, size: int) -> BlockTable | None:
    """None if there is no table, or one that may not be read."""
    try:
        data = path.read_bytes()  # one read of a network disk
    except (FileNotFoundError, PermissionError):
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            remains = Remains(saved["touched"], saved["parts"], tuple(saved["counts"].tolist()))
            return BlockTable(size, saved["tokens"], saved["documents"], saved["pages"], remains)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and rerun") from error
