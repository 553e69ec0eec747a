"""Packing: the pieces of documents that make up each row, and the rows as arrays.

`concat` joins the documents and cuts at the row length: row i is tokens [i T, (i + 1) T) of the joined stream; only the
last row is padded. `best_fit` keeps documents complete (longer ones are cut into rows of T and a rest) and puts each
where it fits best, within one chunk of the order, so that the mixture holds and each chunk is packed independently.

    concat,   T = 8, documents of 5, 6, 3:   1 1 1 1 1 2 2 2 | 2 2 2 3 3 3 . .
    best_fit, the same:                      1 1 1 1 1 3 3 3 | 2 2 2 2 2 2 . .

`render` makes the arrays of rows. Labels are made per document, before packing: the target of a token is the next token
of its document, even if that is in another row. The last token of a document, targets without loss and padding are
masked. Positions restart per piece.
Documents 7 8 9 2 and 5 6 2, T = 5, packed by `concat`:

    row 0   tokens 7 8 9 2 5   targets 8 9 2 0 6   loss_mask 1 1 1 0 1   segment_ids 1 1 1 1 2   positions 0 1 2 3 0
    row 1   tokens 6 2 . . .   targets 2 . . . .   loss_mask 1 0 0 0 0   segment_ids 1 1 0 0 0   positions 0 1 0 0 0

All rows of a call are made together, in a few passes over their tokens and about 1 µs per piece.
"""

from abc import ABC, abstractmethod

import numpy as np

from ipt_jax.data.block_table import DOCUMENT
from ipt_jax.data.exclude_converted import ranges
from ipt_jax.data.shared_cache import SharedCache
from ipt_jax.data.shuffle import Chunk, MergedOrder
from ipt_jax.data.token_reader import FoundDocuments

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


# ---- rows as arrays

INT_FIELDS = ("tokens", "targets", "segment_ids", "positions", "kinds")  # loss_mask is boolean


def render(pieces: np.ndarray, found: FoundDocuments, rows: int, seq_len: int, dtype: str) -> dict[str, np.ndarray]:
    """Each field's array [rows, T]. `pieces["row"]` counts from 0. `found`: the document of each piece."""
    lengths = pieces["length"].astype(np.int64)
    begins = np.cumsum(lengths) - lengths  # of each piece among the joined tokens
    first = pieces["document"]["start"].astype(np.int64) + pieces["offset"]  # within its record
    stop = pieces["document"]["start"].astype(np.int64) + pieces["document"]["length"]  # of its document
    numbers = np.arange(1, len(pieces) + 1) - np.searchsorted(pieces["row"], pieces["row"], side="left")
    # One large allocation uses huge pages; with one per field, page faults were a quarter of the time.
    total = int(lengths.sum())
    flat = np.empty((len(INT_FIELDS), total), np.int32)
    tokens, targets, segment_ids, positions, kinds = flat
    joined = _gather(found, first, lengths, np.dtype(dtype))
    tokens[:], targets[:-1] = joined, joined[1:]
    targets[begins + lengths - 1] = _following(found, joined[begins], first, lengths, stop, np.dtype(dtype))
    segment_ids[:] = np.repeat(numbers.astype(np.uint16 if seq_len < 1 << 16 else np.int32), lengths)
    np.subtract(np.arange(total, dtype=np.int32), np.repeat(begins.astype(np.int32), lengths), out=positions)
    kinds[:] = np.repeat(found.places["kind"], lengths)
    mask = _loss_mask(found, begins, first, lengths, stop)
    if total < rows * seq_len:
        filled = np.bincount(pieces["row"], lengths, minlength=rows).astype(np.int64)
        real = np.arange(seq_len) < filled[:, None]
        padded, padded_mask = np.zeros((len(flat), *real.shape), flat.dtype), np.zeros(real.shape, bool)
        padded_mask[real] = mask
        for to, values in zip(padded, flat, strict=True):
            to[real] = values
        flat, mask = padded, padded_mask
    fields = dict(zip(INT_FIELDS, flat.reshape(-1, rows, seq_len), strict=True))
    return fields | {"loss_mask": mask.reshape(rows, seq_len)}


def _gather(found: FoundDocuments, first: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The joined tokens of all pieces."""
    low = (found.places["start"] + first) * dtype.itemsize
    slices = zip(found.places["buffer"].tolist(), low.tolist(), (low + lengths * dtype.itemsize).tolist(), strict=True)
    return np.frombuffer(b"".join([found.buffers[of][a:b] for of, a, b in slices]), dtype.newbyteorder("<"))


def _following(
    found: FoundDocuments, firsts: np.ndarray, first: np.ndarray, lengths: np.ndarray, stop: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """The token that follows each piece in its document, or 0. `firsts`: the first token of each piece. It follows the
    previous piece if the document was cut between them, as `concat` does at the end of a row."""
    following = np.zeros(len(firsts), np.int32)
    cut = first + lengths < stop
    start, of = found.places["start"] + first, found.places["buffer"]
    adjacent = cut[:-1] & (start[1:] == (start + lengths)[:-1]) & (of[1:] == of[:-1])
    following[:-1][adjacent] = firsts[1:][adjacent]
    cut[:-1] &= ~adjacent
    for piece in np.flatnonzero(cut).tolist():
        at = int(start[piece] + lengths[piece]) * dtype.itemsize
        following[piece] = int.from_bytes(found.buffers[of[piece]][at : at + dtype.itemsize], "little")
    return following


def _loss_mask(
    found: FoundDocuments, begins: np.ndarray, first: np.ndarray, lengths: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """Whether the token predicted at each place is a target. Token t is predicted at t - 1 of its document."""
    runs = found.runs[ranges(found.places["run"], found.places["run"] + found.places["runs"])].astype(np.int64)
    piece = np.repeat(np.arange(len(begins)), found.places["runs"])
    low = np.maximum(runs[:, 0], first[piece] + 1)
    high = np.minimum(runs[:, 1], np.minimum(first + lengths + 1, stop)[piece])
    shift = (begins - first - 1)[piece]  # from a target in its document to its prediction in the joined tokens
    edges = np.stack([low + shift, high + shift], axis=1)[low < high].ravel()  # ascending starts and ends of loss
    widths = np.diff(edges, prepend=0, append=int(lengths.sum()))
    return np.repeat(np.arange(len(widths)) % 2 == 1, widths)
