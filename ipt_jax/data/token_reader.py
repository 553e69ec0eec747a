"""Reads the tokens of planned documents from the shards of a source and checks them.

Guarantees: a shard that was cut, damaged or replaced is found when it is read, before training on it, and the error
names file and record. ArrayRecord checks a hash of the bytes of each page, and page, length and id of each document
used must match the index that the plan was made from.

A single host reads a block of consecutive documents at a time and caches it until its window is used. Of several
hosts, each reads and caches the pages of its own rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import Manifest
from ipt_jax.core.stage import damage
from ipt_jax.corpus.records import TokenPage, TokenType, decode
from ipt_jax.data.block_table import BLOCK_TOKENS, SourceDocuments
from ipt_jax.data.shared_cache import SharedCache
from ipt_jax.data.token_index import document_count, shards_of
from ipt_jax.data.token_shards import PAGE_TOKENS, ROW

READER_OPTIONS = "readahead_buffer_size:1M,max_parallelism:0,footer_prefetch_bytes:256K"  # a range is one disk read
BUFFER_BYTES = 1 << 14  # about a page; the default is 1 MiB, which every read of a page would read
OPEN_SHARDS = 128  # an open reader uses eight bytes per page of its shard
SMALL_TOKENS = 1 << 26
WINDOWS_CACHED = 6  # the one in use and those that are read ahead

# Where a document is: its tokens begin at token `start` of buffer `buffer`; its loss runs are runs [run, run + runs).
FOUND = np.dtype([("buffer", "<i8"), ("start", "<i8"), ("kind", "<u4"), ("run", "<i8"), ("runs", "<i8")])


class FoundDocuments(NamedTuple):
    """FOUND of each document, buffers of token ids, and loss runs (start, stop) within their document, [runs, 2]."""

    places: np.ndarray
    buffers: list[bytes]
    runs: np.ndarray


class PageColumns(msgspec.Struct):
    """The fields of a TokenPage that rows need."""

    first: int
    dtype: TokenType
    tokens: memoryview
    rows: memoryview
    runs: memoryview


class PageSpan(NamedTuple):
    """The joined columns of consecutive pages: `documents` documents of a source from number `first`."""

    first: int
    documents: int
    tokens: bytes
    rows: bytes
    runs: bytes


_DECODER = msgspec.msgpack.Decoder(PageColumns)


class TokenReader:
    """Reads documents of one source by number. A window has at most `window` blocks. Safe to call from any thread."""

    def __init__(self, directory: Path, manifest: Manifest, source: SourceDocuments, *, window: int, dtype: TokenType):
        self._entries = manifest.shards
        self._paths = [directory / entry.name for entry in manifest.shards]
        self._ends = np.cumsum([document_count(entry) for entry in manifest.shards]).tolist()
        self._page_ends = np.cumsum([entry.records for entry in manifest.shards]).tolist()
        self._arrays = np.array(self._ends), np.array([0, *self._page_ends])  # the same, for lookups of many at once
        self._source, self._dtype = source, dtype
        self._block = source.table.size
        # Blocks have at least a page, so a page is cached once. A small corpus is cached in fewer, larger blocks.
        least = BLOCK_TOKENS if manifest.tokens <= SMALL_TOKENS else PAGE_TOKENS
        while self._block * manifest.tokens < least * self._ends[-1]:
            self._block *= 2
        self._readers = SharedCache(self._open, OPEN_SHARDS)
        self._blocks = SharedCache(self._read_block, WINDOWS_CACHED * window)
        pages = WINDOWS_CACHED * window * source.table.size * manifest.records // self._ends[-1]
        self._pages = SharedCache(self._read_page, pages + 1)

    def read(self, documents: np.ndarray, *, by_block: bool) -> FoundDocuments:
        """`documents`: DOCUMENT rows."""
        if by_block:
            units, which = np.unique(documents["record"] // self._block, return_inverse=True)
            spans = self._blocks.many(units.tolist())
        else:
            units, which = np.unique(self._page_numbers(documents), return_inverse=True)
            spans = self._pages.many(units.tolist())
        found, rows, there = _find(documents["record"], spans, which)
        self._check(documents, rows, there)
        return found

    def ids(self, documents: np.ndarray) -> list[str]:
        """The id of each document, from its page: training reads only keys of ids. `documents`: DOCUMENT rows."""
        pages = self._page_numbers(documents)
        decoded: dict[int, TokenPage] = {}
        for number in np.unique(pages).tolist():
            ((shard, page, _),) = shards_of(self._page_ends, number, number + 1)
            decoded[number] = decode(self._readers(shard).read(page, page + 1)[0], TokenPage)
        found = []
        for number, record in zip(pages.tolist(), documents["record"].tolist(), strict=True):
            ((_, local, _),) = shards_of(self._ends, record, record + 1)
            found.append(decoded[number].ids[local - decoded[number].first])
        return found

    def load_blocks(self, documents: np.ndarray) -> None:
        """Reads the blocks that hold the documents of these numbers."""
        self._blocks.many(np.unique(documents // self._block).tolist())

    def _page_numbers(self, documents: np.ndarray) -> np.ndarray:
        """The page of each document, counted through all shards."""
        ends, pages_before = self._arrays
        return pages_before[np.searchsorted(ends, documents["record"], side="right")] + documents["page"]

    def _read_block(self, block: int) -> PageSpan:
        """The pages of `self._block` documents: one block of the table, or several small ones."""
        table, blocks = self._source.table, self._block // self._source.table.size
        first, last = block * self._block, min((block + 1) * self._block, self._ends[-1]) - 1
        pages = int(table.pages[block * blocks, 0]), int(table.pages[last // table.size, 1])
        ends, pages_before = self._arrays
        low, high = pages_before[np.searchsorted(ends, [first, last], side="right")].tolist()
        return self._read_span(low + pages[0], high + pages[1] + 1)

    def _read_page(self, page: int) -> PageSpan:
        return self._read_span(page, page + 1)

    def _read_span(self, low: int, high: int) -> PageSpan:
        """Pages [low, high), with one read per shard."""
        pages: list[PageColumns] = []
        first = -1
        for shard, start, stop in shards_of(self._page_ends, low, high):
            reader = self._readers(shard)
            try:
                records = reader.read(start, stop)  # of a range: const in C++, so threads may share the reader
            except (RuntimeError, IndexError) as error:
                raise UserError(self._damaged(shard, _first_damaged(reader, start, stop), error)) from error
            found = [self._decode(record, shard, number) for number, record in enumerate(records, start)]
            first = found[0].first + (self._ends[shard - 1] if shard else 0) if first < 0 else first
            pages += found
        columns = ([getattr(page, name) for page in pages] for name in ("tokens", "rows", "runs"))
        tokens, rows, runs = (b"".join(column) for column in columns)
        return PageSpan(first, len(rows) // ROW.itemsize, tokens, rows, runs)

    def _open(self, shard: int) -> ArrayRecordReader:
        path = self._paths[shard]
        if found := damage(path.parent, self._entries[shard], checksum=False):
            raise UserError(f"{found}; delete it and rerun ipt tokenize")
        reader = ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
        expected = self._entries[shard].records
        if not reader.ok() or reader.num_records() != expected:
            raise UserError(
                f"{path}: damaged (holds {reader.num_records()} records, the manifest says {expected}); "
                "delete it and rerun ipt tokenize"
            )
        return reader

    def _decode(self, record: bytes, shard: int, number: int) -> PageColumns:
        try:
            page = _DECODER.decode(record)
        except msgspec.DecodeError as error:
            raise UserError(self._damaged(shard, number, error)) from error
        if page.dtype != self._dtype:
            raise UserError(self._damaged(shard, number, f"its tokens are {page.dtype}, not {self._dtype}"))
        return page

    def _check(self, documents: np.ndarray, rows: np.ndarray, there: np.ndarray) -> None:
        """Every document must be in the page that the index says, and have the length and the id of the index."""
        length, key = rows["tokens"] == documents["tokens"], rows["id"] == documents["id"]
        correct = there & length & key
        if correct.all():
            return
        at = int(np.argmin(correct))
        number = int(documents["record"][at])
        ((shard, local, _),) = shards_of(self._ends, number, number + 1)
        fault = "its id is not that of the index"
        if not there[at]:
            fault = "it is missing"
        elif not length[at]:
            fault = f"it has {rows['tokens'][at]} tokens, its index says {documents['tokens'][at]}"
        raise UserError(self._damaged(shard, int(documents["page"][at]), f"document {local}: {fault}"))

    def _damaged(self, shard: int, page: int, fault: object) -> str:
        """The error for a page, with its documents by the index."""
        first = self._ends[shard - 1] if shard else 0
        rows = self._source.index([(first, self._ends[shard])])
        mine = np.flatnonzero(rows["page"] == page)
        held = f"documents {mine[0]} to {mine[-1]}" if len(mine) else "no documents"
        return (
            f"{self._paths[shard]}: record {page} ({held}) is damaged ({fault}); delete the file and rerun ipt tokenize"
        )


def _find(
    numbers: np.ndarray, spans: Sequence[PageSpan], which: np.ndarray
) -> tuple[FoundDocuments, np.ndarray, np.ndarray]:
    """For documents by number and the span of each: where they are, their ROW, and whether they are in the span."""
    rows = np.frombuffer(b"".join([one.rows for one in spans]), ROW)
    runs = np.frombuffer(b"".join([one.runs for one in spans]), "<u4").reshape(-1, 2)
    counts = np.array([one.documents for one in spans])
    begins = np.cumsum(counts) - counts  # of each span among all rows
    place = numbers - np.array([one.first for one in spans])[which]
    there = (place >= 0) & (place < counts[which])
    place = np.where(there, place, 0) + begins[which]
    token, run = (np.cumsum(rows[name], dtype=np.int64) - rows[name] for name in ("tokens", "runs"))
    places = np.empty(len(numbers), FOUND)
    places["buffer"], places["start"] = which, token[place] - token[begins][which]
    places["kind"], places["run"], places["runs"] = rows["kind"][place], run[place], rows["runs"][place]
    return FoundDocuments(places, [one.tokens for one in spans], runs), rows[place], there


def _first_damaged(reader: ArrayRecordReader, first: int, stop: int) -> int:
    for record in range(first, stop):
        try:
            reader.read(record, record + 1)
        except (RuntimeError, IndexError):
            return record
    return first
