"""Packing: the pieces of documents that make up each row.

`concat` joins the documents and cuts at the row length: row i is tokens [i T, (i + 1) T) of the joined stream; only the
last row is padded. `best_fit` keeps documents complete (longer ones are cut into rows of T and a rest) and puts each
where it fits best, within one chunk of the order, so that the mixture holds and each chunk is packed independently.

    concat,   T = 8, documents of 5, 6, 3:   1 1 1 1 1 2 2 2 | 2 2 2 3 3 3 . .
    best_fit, the same:                      1 1 1 1 1 3 3 3 | 2 2 2 2 2 2 . .
"""

from abc import ABC, abstractmethod

import numpy as np

from ipt_jax.data.block_table import DOCUMENT
from ipt_jax.data.shared_cache import SharedCache
from ipt_jax.data.shuffle import Chunk, MergedOrder

CHUNK_ROWS = 512  # a chunk has the tokens of so many rows; best_fit packs within it
CHUNKS_CACHED = 16

# A piece: tokens [offset, offset + length) of a document, from column `at` of a row.
_NUMBERS = [("row", "<i8"), ("at", "<i4"), ("source", "u1"), ("offset", "<i4"), ("length", "<i4")]
PIECE = np.dtype([*_NUMBERS, ("document", DOCUMENT)])


class Packing(ABC):
    """The rows of a merged order. Subclasses set `rows`, their number."""

    rows: int

    def __init__(self, order: MergedOrder, seq_len: int):
        self._order, self._seq_len = order, seq_len
        self._layouts = SharedCache(self._layout, CHUNKS_CACHED)

    @abstractmethod
    def pieces(self, first: int, stop: int) -> np.ndarray:
        """The pieces of rows [first, stop), ordered by row and column. Read-only for the caller."""

    @abstractmethod
    def cut(self, row: int) -> int:
        """The first row from `row` on before which all rows together take a beginning of every stream."""

    @abstractmethod
    def _layout(self, number: int) -> np.ndarray:
        """The pieces of a chunk."""

    @abstractmethod
    def _chunk_of(self, row: int) -> int:
        """A chunk before which all pieces, and after which no piece, are in rows before `row`."""

    def taken(self, row: int) -> list[int]:
        """The token of each stream up to which rows [0, row) take it."""
        if row <= 0:
            return [stream.first for stream in self._order.streams]
        if row >= self.rows:
            return [stream.amount for stream in self._order.streams]
        chunk = self._chunk_of(row)
        pieces = self._layouts(chunk)
        pieces = pieces[pieces["row"] < row]
        lengths = (pieces["length"][pieces["source"] == source] for source in range(len(self._order.streams)))
        bounds = zip(self._order.bounds(chunk), lengths, strict=True)
        return [bound + int(length.sum(dtype=np.int64)) for bound, length in bounds]


class Concat(Packing):
    """Documents joined and cut at the row length."""

    def __init__(self, order: MergedOrder, seq_len: int):
        super().__init__(order, seq_len)
        self.rows = -(-order.tokens // seq_len)

    def cut(self, row: int) -> int:
        return min(max(row, 0), self.rows)

    def _chunk_of(self, row: int) -> int:
        return self._order.chunk_at(row * self._seq_len)

    def pieces(self, first: int, stop: int) -> np.ndarray:
        chunk = self._order.chunk_at(first * self._seq_len)
        found = [_of_rows(self._layouts(chunk), first, stop)]
        while self._order.start(chunk + 1) < min(stop * self._seq_len, self._order.tokens):
            chunk += 1
            found.append(_of_rows(self._layouts(chunk), first, stop))
        return found[0] if len(found) == 1 else np.concatenate(found)  # concatenate doubles the time

    def _layout(self, number: int) -> np.ndarray:
        chunk, seq_len = self._order.chunk(number), self._seq_len
        length = chunk.documents["length"].astype(np.int64)
        end = chunk.first + np.cumsum(length)
        begin = end - length
        row = begin // seq_len
        pieces, document, nth = _repeated(chunk, (end - 1) // seq_len - row + 1)
        pieces["row"] = row[document] + nth
        low = np.maximum(begin[document], pieces["row"] * seq_len)
        pieces["at"] = low - pieces["row"] * seq_len
        pieces["offset"] = low - begin[document]
        pieces["length"] = np.minimum(end[document], (pieces["row"] + 1) * seq_len) - low
        return pieces


class BestFit(Packing):
    """Complete documents, each where it fits best. Packs every chunk once to count its rows, eight bytes per chunk."""

    def __init__(self, order: MergedOrder, seq_len: int):
        super().__init__(order, seq_len)
        counts = [self._packed(chunk)["row"][-1:] + 1 for chunk in range(order.chunks)]
        self._ends = np.cumsum([int(count.sum()) for count in counts])
        self.rows = int(self._ends[-1])

    def cut(self, row: int) -> int:
        """The end of a chunk: its rows take its documents in another order than the streams."""
        return 0 if row <= 0 else self.rows if row >= self.rows else int(self._ends[self._chunk_of(row)])

    def _chunk_of(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row - 1, side="right"))

    def pieces(self, first: int, stop: int) -> np.ndarray:
        low, high = np.searchsorted(self._ends, [first, min(stop, self.rows) - 1], side="right")
        return np.concatenate([_of_rows(self._layouts(chunk), first, stop) for chunk in range(low, high + 1)])

    def _layout(self, number: int) -> np.ndarray:
        pieces = self._packed(number)
        pieces["row"] += self._ends[number - 1] if number else 0
        return pieces

    def _packed(self, number: int) -> np.ndarray:
        """The pieces of a chunk. Rows count from 0."""
        chunk, seq_len = self._order.chunk(number), self._seq_len
        length = chunk.documents["length"].astype(np.int64)
        pieces, document, nth = _repeated(chunk, -(-length // seq_len))
        pieces["offset"] = nth * seq_len
        pieces["length"] = np.minimum(length[document] - nth * seq_len, seq_len)
        pieces["row"] = best_fit(pieces["length"], seq_len)
        pieces = pieces[np.argsort(pieces["row"], kind="stable")]
        ends = np.cumsum(pieces["length"], dtype=np.int64)
        begins = ends - pieces["length"]
        firsts = np.flatnonzero(np.diff(pieces["row"], prepend=-1))
        pieces["at"] = begins - np.repeat(begins[firsts], np.diff(firsts, append=len(pieces)))
        return pieces


def _repeated(chunk: Chunk, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An array of `counts` pieces per document, the document of each, and its number within the document."""
    document = np.repeat(np.arange(len(counts)), counts)
    pieces = np.zeros(len(document), PIECE)
    pieces["source"], pieces["document"] = chunk.source[document], chunk.documents[document]
    return pieces, document, np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)


def _of_rows(pieces: np.ndarray, first: int, stop: int) -> np.ndarray:
    return pieces[slice(*np.searchsorted(pieces["row"], [first, stop]))]


def best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece: the longest first, each into the fullest row with room for it.

    Rows are ordered by the pieces that opened them, else they would be sorted by length. About 1 µs per piece.
    """
    row = np.empty(len(lengths), np.int64)
    opener: list[int] = []
    rooms = OpenRows(seq_len)
    longest = np.argsort(-lengths.astype(np.int64), kind="stable")
    for piece, length in zip(longest.tolist(), lengths[longest].tolist(), strict=True):
        taken, room = rooms.take(length) or (len(opener), seq_len)
        if taken == len(opener):
            opener.append(piece)
        row[piece] = taken
        rooms.put(taken, room - length)
    number = np.empty(len(opener), np.int64)
    number[np.argsort(opener)] = np.arange(len(opener))
    return number[row]


class OpenRows:
    """Rows with free tokens, by their number. The smallest sufficient number is the lowest set bit above `length`."""

    def __init__(self, seq_len: int):
        self._rows: list[list[int]] = [[] for _ in range(seq_len + 1)]
        self._rooms = 0

    def take(self, length: int) -> tuple[int, int] | None:
        """The fullest row with room for `length`, and its room."""
        above = self._rooms >> length
        if not above:
            return None
        room = length + (above & -above).bit_length() - 1
        row = self._rows[room].pop()
        if not self._rows[room]:
            self._rooms ^= 1 << room
        return row, room

    def put(self, row: int, room: int) -> None:
        if room:
            self._rows[room].append(row)
            self._rooms |= 1 << room
