"""Rows from documents: which pieces of which documents make up a row.

`concat` joins the documents and cuts at the row length: row i is tokens [i T, (i + 1) T) of the joined stream, found by
a binary search; only the last row is padded. `best_fit` keeps documents whole (longer ones are cut into rows of T and a
rest) and puts each where it fits best, among the pieces of a bounded look-ahead, so that the mixed order holds.

    concat,   T = 8, documents of 5, 6, 3:   1 1 1 1 1 2 2 2 | 2 2 2 3 3 3 . .
    best_fit, the same:                      1 1 1 1 1 3 3 3 | 2 2 2 2 2 2 . .
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

LOOK_AHEAD = 256  # rows' worth of pieces that best_fit sees at a time


class Piece(NamedTuple):
    """Tokens [offset, offset + length) of the document at place `document` of the mixed order."""

    document: int
    offset: int
    length: int


class Packing(Protocol):
    rows: int

    def pieces(self, row: int) -> Sequence[Piece]: ...


class Concat:
    """Documents joined and cut at the row length. Holds eight bytes a document."""

    def __init__(self, lengths: np.ndarray, seq_len: int):
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._seq_len = seq_len
        self.rows = -(-int(self._ends[-1]) // seq_len)

    def pieces(self, row: int) -> list[Piece]:
        start = row * self._seq_len
        stop = min(start + self._seq_len, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        ends = self._ends[first : last + 1].tolist()
        begin = int(self._ends[first - 1]) if first else 0
        pieces = []
        for document, end in enumerate(ends, start=first):
            low = max(begin, start)
            pieces.append(Piece(document, low - begin, min(end, stop) - low))
            begin = end
        return pieces


class BestFit:
    """Documents whole, each where it fits best. Holds a table of pieces in row order."""

    def __init__(self, lengths: np.ndarray, seq_len: int):
        counts = -(-np.asarray(lengths, np.int64) // seq_len)
        document = np.repeat(np.arange(len(lengths)), counts)
        offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
        length = np.minimum(np.asarray(lengths, np.int64)[document] - offset, seq_len)
        row = best_fit(length, seq_len)
        in_rows = np.argsort(row, kind="stable")
        self._document, self._offset, self._length = document[in_rows], offset[in_rows], length[in_rows]
        self.rows = int(row.max()) + 1
        self._starts = np.searchsorted(row[in_rows], np.arange(self.rows + 1))

    def pieces(self, row: int) -> list[Piece]:
        here = slice(self._starts[row], self._starts[row + 1])
        columns = (self._document[here].tolist(), self._offset[here].tolist(), self._length[here].tolist())
        return [Piece(*values) for values in zip(*columns, strict=True)]


def best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece. Within a look-ahead the longest go first, each into the fullest row with room for it.

    Rows of a look-ahead that have room left stay open for one more. Rows that close come in the order of the pieces
    that opened them: longest-first would sort them by length. About a microsecond a piece.
    """
    views = (np.cumsum(lengths, dtype=np.int64) - 1) // (LOOK_AHEAD * seq_len)
    row = np.empty(len(lengths), np.int64)  # numbered as they open, until all are closed
    opener: list[int] = []
    closed: list[list[int]] = []
    still_open, rooms = set[int](), OpenRows(seq_len)
    for view in range(int(views[-1]) + 1):
        first, last = np.searchsorted(views, [view, view + 1])
        longest = first + np.argsort(-lengths[first:last], kind="stable")
        before = len(opener)
        for piece, length in zip(longest.tolist(), lengths[longest].tolist(), strict=True):
            taken, room = rooms.take(length) or (len(opener), seq_len)
            if taken == len(opener):
                opener.append(piece)
            row[piece] = taken
            rooms.put(taken, room - length)
        young = [(one, room) for one, room in rooms.rows() if one >= before]
        candidates = still_open | set(range(before, len(opener)))
        still_open, rooms = {one for one, _ in young}, OpenRows(seq_len, young)
        closed.append(sorted(candidates - still_open, key=opener.__getitem__))
    closed.append(sorted(still_open, key=opener.__getitem__))
    number = np.empty(len(opener), np.int64)
    number[np.concatenate(closed).astype(np.int64)] = np.arange(len(opener))
    return number[row]


class OpenRows:
    """Rows with room left, by room. The smallest room that is large enough is the lowest high bit of one integer."""

    def __init__(self, seq_len: int, rows: Iterable[tuple[int, int]] = ()):
        self._rows: list[list[int]] = [[] for _ in range(seq_len + 1)]
        self._rooms = 0
        for row, room in rows:
            self.put(row, room)

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

    def rows(self) -> list[tuple[int, int]]:
        return [(row, room) for room, rows in enumerate(self._rows) for row in rows]
