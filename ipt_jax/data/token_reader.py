"""The tokens of planned documents, read from a source's shards and checked.

A record is a page of documents (data.token_shards). Every page read is checked: ArrayRecord keeps a hash of its bytes,
it must be the page that the index says, and the length and the id of each document used must be those of the index
which the plan was made from. A shard that was cut, damaged or exchanged is found when it is read, before any of it is
trained on, and named with the record.

On one host a block of neighbouring documents is one read and is kept until its window is through; on several, each host
reads and keeps the pages of its own rows.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import Manifest
from ipt_jax.corpus.records import TokenType
from ipt_jax.data.block_table import BLOCK_TOKENS, SourceDocuments
from ipt_jax.data.shared_cache import SharedCache
from ipt_jax.data.token_index import document_count, shards_of
from ipt_jax.data.token_shards import PAGE_TOKENS, ROW

READER_OPTIONS = (
    "readahead_buffer_size:1M,max_parallelism:0,footer_prefetch_bytes:256K"  # a range is one read of the disk
)
BUFFER_BYTES = 1 << 14  # what a single page costs; the default of 1 MiB reads that much for each
OPEN_SHARDS = 128  # an open reader holds eight bytes a page of its shard
SMALL_TOKENS = 1 << 26
WINDOWS_KEPT = 6  # those that are read ahead of the one in use, and a part of one

# A document found: its tokens begin at token `start` of buffer `buffer`; its loss runs are runs [run, run + runs).
FOUND = np.dtype([("buffer", "<i8"), ("start", "<i8"), ("kind", "<u4"), ("run", "<i8"), ("runs", "<i8")])


class FoundDocuments(NamedTuple):
    """FOUND of each document; buffers of token ids; loss runs (start, stop) within their document, [runs, 2]."""

    places: np.ndarray
    buffers: list[bytes]
    runs: np.ndarray


class PageColumns(msgspec.Struct):
    """What rows need of a TokenPage."""

    first: int
    dtype: TokenType
    tokens: memoryview
    rows: memoryview
    runs: memoryview


class PageSpan(NamedTuple):
    """`documents` of a source from number `first` on, out of neighbouring pages: the pages' columns, joined."""

    first: int
    documents: int
    tokens: bytes
    rows: bytes
    runs: bytes


_DECODER = msgspec.msgpack.Decoder(PageColumns)


class TokenReader:
    """Documents of one source by number. A window of it has at most `window` blocks. Any thread may call it."""

    def __init__(self, directory: Path, manifest: Manifest, source: SourceDocuments, *, window: int, dtype: TokenType):
        self._paths = [directory / entry.name for entry in manifest.shards]
        self._ends = np.cumsum([document_count(entry) for entry in manifest.shards]).tolist()
        self._page_ends = np.cumsum([entry.records for entry in manifest.shards]).tolist()
        self._arrays = np.array(self._ends), np.array([0, *self._page_ends])  # the same, to look up many at once
        self._bytes = [entry.bytes for entry in manifest.shards]
        self._source, self._dtype = source, dtype
        self._block = source.table.size
        # A page is held once, not in many blocks; a small corpus, all of which stays here, comes in fewer reads.
        least = BLOCK_TOKENS if manifest.tokens <= SMALL_TOKENS else PAGE_TOKENS
        while self._block * manifest.tokens < least * self._ends[-1]:
            self._block *= 2
        self._readers = SharedCache(self._open, OPEN_SHARDS)
        self._blocks = SharedCache(self._read_block, WINDOWS_KEPT * window)
        pages = WINDOWS_KEPT * window * source.table.size * manifest.records // self._ends[-1]
        self._pages = SharedCache(self._read_page, pages + 1)

    def read(self, documents: np.ndarray, *, whole_blocks: bool) -> FoundDocuments:
        """The documents of DOCUMENT rows."""
        if whole_blocks:
            units, which = np.unique(documents["record"] // self._block, return_inverse=True)
            spans = self._blocks.many(units.tolist())
        else:
            units, which = np.unique(self._page_numbers(documents), return_inverse=True)
            spans = self._pages.many(units.tolist())
        found, rows, there = _find(documents["record"], spans, which)
        self._check(documents, rows, there)
        return found

    def load_blocks(self, documents: np.ndarray) -> None:
        """Reads the blocks that hold the documents of these numbers."""
        self._blocks.many(np.unique(documents // self._block).tolist())

    def _page_numbers(self, documents: np.ndarray) -> np.ndarray:
        """The page of each document, counted through all shards."""
        ends, pages_before = self._arrays
        return pages_before[np.searchsorted(ends, documents["record"], side="right")] + documents["page"]

    def _read_block(self, block: int) -> PageSpan:
        """The pages that hold a block, or several where they are smaller than a page."""
        table, blocks = self._source.table, self._block // self._source.table.size
        first, last = block * self._block, min((block + 1) * self._block, self._ends[-1]) - 1
        pages = int(table.pages[block * blocks, 0]), int(table.pages[last // table.size, 1])
        low, high = (self._pages_before(number) + page for number, page in zip((first, last), pages, strict=True))
        return self._read_span(low, high + 1)

    def _pages_before(self, document: int) -> int:
        """The pages of the shards before that of a document."""
        shard = bisect.bisect_right(self._ends, document)
        return self._page_ends[shard - 1] if shard else 0

    def _read_page(self, page: int) -> PageSpan:
        return self._read_span(page, page + 1)

    def _read_span(self, low: int, high: int) -> PageSpan:
        """Pages [low, high), one read of each shard that they lie in."""
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
        if not path.is_file():
            raise UserError(f"{path}: listed in the manifest but absent; run ipt tokenize again")
        size = path.stat().st_size
        if size != self._bytes[shard]:
            raise UserError(
                f"{path}: {size} bytes where the manifest says {self._bytes[shard]}; "
                "delete it and run ipt tokenize again"
            )
        path.open("rb").close()  # a file that may not be read is told as such, not as a damaged one
        reader = ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
        expected = self._page_ends[shard] - (self._page_ends[shard - 1] if shard else 0)
        if not reader.ok() or reader.num_records() != expected:
            raise UserError(
                f"{path}: damaged (holds {reader.num_records()} records, the manifest says {expected}); "
                "delete it and run ipt tokenize again"
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
        """Every document is where the index says, of the length that the plan counts on, and of the very id."""
        length, key = rows["tokens"] == documents["tokens"], rows["id"] == documents["id"]
        if (there & length & key).all():
            return
        at = int(np.argmin(there & length & key))
        number = int(documents["record"][at])
        ((shard, local, _),) = shards_of(self._ends, number, number + 1)
        said = "its id is not that of the index"
        if not there[at]:
            said = "it is not there"
        elif not length[at]:
            said = f"it holds {rows['tokens'][at]} tokens, its index says {documents['tokens'][at]}"
        raise UserError(self._damaged(shard, int(documents["page"][at]), f"document {local}: {said}"))

    def _damaged(self, shard: int, page: int, what: object) -> str:
        """`what` is wrong with a page, and which documents it holds by the index."""
        first = self._ends[shard - 1] if shard else 0
        rows = self._source.index([(first, self._ends[shard])])
        mine = np.flatnonzero(rows["page"] == page)
        holds = f"documents {mine[0]} to {mine[-1]}" if len(mine) else "no documents"
        return (
            f"{self._paths[shard]}: record {page} is damaged, which holds {holds} ({what}); "
            "delete the file and run ipt tokenize again"
        )


def _find(
    numbers: np.ndarray, spans: Sequence[PageSpan], which: np.ndarray
) -> tuple[FoundDocuments, np.ndarray, np.ndarray]:
    """Where the documents of these numbers are in their stretches, what ROW they have, and whether they are there."""
    rows = np.frombuffer(b"".join([one.rows for one in spans]), ROW)
    runs = np.frombuffer(b"".join([one.runs for one in spans]), "<u4").reshape(-1, 2)
    counts = np.array([one.documents for one in spans])
    begins = np.cumsum(counts) - counts  # of each stretch among all rows
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
