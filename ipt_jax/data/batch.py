"""Rows as arrays, with their labels.

Labels are made per document, before packing: the target of a token is the next token of its document, even if that is
in another row. The last token of a document, targets without loss and padding are masked. Positions restart per piece.
Documents 7 8 9 2 and 5 6 2, T = 5, packed by `concat`:

    row 0   tokens 7 8 9 2 5   targets 8 9 2 0 6   loss_mask 1 1 1 0 1   segment_ids 1 1 1 1 2   positions 0 1 2 3 0
    row 1   tokens 6 2 . . .   targets 2 . . . .   loss_mask 1 0 0 0 0   segment_ids 1 1 0 0 0   positions 0 1 0 0 0

All rows of a call are made together, in a few passes over their tokens and about 1 µs per piece.
"""

import numpy as np

from ipt_jax.data.exclude_converted import ranges
from ipt_jax.data.token_reader import FoundDocuments

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
