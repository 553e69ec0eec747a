"""Rows as arrays: pieces of documents laid out, with their labels.

Labels are made per document, before packing: a token's target is the next token of its own document, in whichever row
that lies; a document's last token, a target without loss and padding are masked. Positions restart with each piece.
Documents 7 8 9 2 and 5 6 2, T = 5, packed by `concat`:

    row 0   tokens 7 8 9 2 5   targets 8 9 2 0 6   loss_mask 1 1 1 0 1   segment_ids 1 1 1 1 2   positions 0 1 2 3 0
    row 1   tokens 6 2 . . .   targets 2 . . . .   loss_mask 1 0 0 0 0   segment_ids 1 1 0 0 0   positions 0 1 0 0 0

All rows of a call are made together, by a few passes over all their tokens and about a microsecond a piece.
"""

import numpy as np

from ipt_jax.data.exclude_converted import ranges
from ipt_jax.data.token_reader import FoundDocuments

INT_FIELDS = ("tokens", "targets", "segment_ids", "positions", "kinds")  # and loss_mask, of truth values


def render(pieces: np.ndarray, found: FoundDocuments, rows: int, seq_len: int, dtype: str) -> dict[str, np.ndarray]:
    """Each field's array [rows, T]. `pieces["row"]` counts from 0; `found`: the document of each piece."""
    lengths = pieces["length"].astype(np.int64)
    begins = np.cumsum(lengths) - lengths  # of each piece among the joined tokens
    first = pieces["document"]["start"].astype(np.int64) + pieces["offset"]  # within the whole document
    stop = pieces["document"]["start"].astype(np.int64) + pieces["document"]["length"]  # of what takes part of it
    numbers = np.arange(1, len(pieces) + 1) - np.searchsorted(pieces["row"], pieces["row"], side="left")
    # One allocation for all fields: large ones come in huge pages, and page faults were a quarter of the time.
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
        flat, mask = _padded(flat, mask, np.arange(seq_len) < filled[:, None])
    fields = dict(zip(INT_FIELDS, flat.reshape(-1, rows, seq_len), strict=True))
    return fields | {"loss_mask": mask.reshape(rows, seq_len)}


def _gather(found: FoundDocuments, first: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tokens of all pieces, one after another."""
    low = (found.places["start"] + first) * dtype.itemsize
    slices = zip(found.places["buffer"].tolist(), low.tolist(), (low + lengths * dtype.itemsize).tolist(), strict=True)
    return np.frombuffer(b"".join([found.buffers[of][a:b] for of, a, b in slices]), dtype.newbyteorder("<"))


def _following(
    found: FoundDocuments, firsts: np.ndarray, first: np.ndarray, lengths: np.ndarray, stop: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """The token that follows each piece in its document, or 0. `firsts`: the first token of each piece, which follows
    the piece before where that one was cut there, as `concat` does at the end of a row."""
    following = np.zeros(len(firsts), np.int32)
    goes_on = first + lengths < stop
    start, of = found.places["start"] + first, found.places["buffer"]
    next_goes_on = goes_on[:-1] & (start[1:] == (start + lengths)[:-1]) & (of[1:] == of[:-1])
    following[:-1][next_goes_on] = firsts[1:][next_goes_on]
    goes_on[:-1] &= ~next_goes_on
    for piece in np.flatnonzero(goes_on).tolist():
        at = int(start[piece] + lengths[piece]) * dtype.itemsize
        following[piece] = int.from_bytes(found.buffers[of[piece]][at : at + dtype.itemsize], "little")
    return following


def _loss_mask(
    found: FoundDocuments, begins: np.ndarray, first: np.ndarray, lengths: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """Whether the token that each place predicts is a target. Token t is predicted at t - 1, within its document."""
    runs = found.runs[ranges(found.places["run"], found.places["run"] + found.places["runs"])].astype(np.int64)
    piece = np.repeat(np.arange(len(begins)), found.places["runs"])
    low = np.maximum(runs[:, 0], first[piece] + 1)
    high = np.minimum(runs[:, 1], np.minimum(first + lengths + 1, stop)[piece])
    shift = (begins - first - 1)[piece]  # from a target's place in the document to that of its prediction here
    edges = np.stack([low + shift, high + shift], axis=1)[low < high].ravel()  # ascending: where loss begins and ends
    widths = np.diff(edges, prepend=0, append=int(lengths.sum()))
    return np.repeat(np.arange(len(widths)) % 2 == 1, widths)


def _padded(flat: np.ndarray, mask: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with zeros where a row is not `real`."""
    padded, padded_mask = np.zeros((len(flat), *real.shape), flat.dtype), np.zeros(real.shape, bool)
    padded_mask[real] = mask
    for to, values in zip(padded, flat, strict=True):
        to[real] = values
    return padded, padded_mask
