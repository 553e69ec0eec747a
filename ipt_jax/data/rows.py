"""Rows as arrays: pieces of documents laid out, with their labels.

Labels are made per document, before packing: a token's target is the next token of its own document, in whichever row
that lies; a document's last token, a target without loss and padding are masked. Positions restart with each piece.
Documents 7 8 9 2 and 5 6 2, T = 5, packed by `concat`:

    row 0   tokens 7 8 9 2 5   targets 8 9 2 0 6   loss_mask 1 1 1 0 1   segment_ids 1 1 1 1 2   positions 0 1 2 3 0
    row 1   tokens 6 2 . . .   targets 2 . . . .   loss_mask 1 0 0 0 0   segment_ids 1 1 0 0 0   positions 0 1 0 0 0

All rows of a call are made together, by a few passes over all their tokens and a microsecond or two a piece.
"""

from collections.abc import Sequence

import numpy as np

from ipt_jax.corpus.records import KINDS
from ipt_jax.data.records import Tokens

KIND_CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}  # 0 is padding
FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions", "kinds")


def render(
    pieces: np.ndarray, documents: Sequence[Tokens], rows: int, seq_len: int, dtype: str
) -> dict[str, np.ndarray]:
    """Each field's array [rows, T]. `pieces["row"]` counts from 0; `documents`: the record of each piece."""
    lengths = pieces["length"].astype(np.int64)
    begins = np.cumsum(lengths) - lengths  # of each piece among the joined tokens
    first = pieces["document"]["start"].astype(np.int64) + pieces["offset"]  # within the record
    stop = pieces["document"]["start"].astype(np.int64) + pieces["document"]["length"]  # of the document
    numbers = np.arange(1, len(pieces) + 1) - np.searchsorted(pieces["row"], pieces["row"], side="left")
    tokens, following = _joined(documents, first, lengths, stop, np.dtype(dtype))
    targets = np.empty_like(tokens)
    targets[:-1] = tokens[1:]
    targets[begins + lengths - 1] = following
    flat = {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": _loss_mask(documents, begins, first, lengths, stop),
        "segment_ids": np.repeat(numbers.astype(np.int32), lengths),
        "positions": np.arange(len(tokens), dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths),
        "kinds": np.repeat(np.array([KIND_CODES[one.kind] for one in documents], np.int32), lengths),
    }
    if len(tokens) == rows * seq_len:
        return {name: values.reshape(rows, seq_len) for name, values in flat.items()}
    filled = np.bincount(pieces["row"], lengths, minlength=rows).astype(np.int64)
    real = np.arange(seq_len) < filled[:, None]
    return {name: _padded(values, real) for name, values in flat.items()}


def _joined(
    documents: Sequence[Tokens], first: np.ndarray, lengths: np.ndarray, stop: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all pieces, one after another, and the token that follows each piece in its document, or 0."""
    width = dtype.itemsize
    low, high = (first * width).tolist(), ((first + lengths) * width).tolist()
    joined = b"".join([one.tokens[a:b] for one, a, b in zip(documents, low, high, strict=True)])
    tokens = np.frombuffer(joined, dtype.newbyteorder("<")).astype(np.int32)
    following = np.zeros(len(documents), np.int32)
    for piece in np.flatnonzero(first + lengths < stop).tolist():
        after = documents[piece].tokens[high[piece] : high[piece] + width]
        following[piece] = int.from_bytes(after, "little")
    return tokens, following


def _loss_mask(
    documents: Sequence[Tokens], begins: np.ndarray, first: np.ndarray, lengths: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """Whether the token that each place predicts is a target. Token t is predicted at t - 1, within its document."""
    shift = (begins - first - 1).tolist()  # from a target's place in the record to that of its prediction here
    least = (first + 1).tolist()
    most = np.minimum(first + lengths + 1, stop).tolist()
    edges: list[tuple[int, int]] = []
    for one, by, low, high in zip(documents, shift, least, most, strict=True):
        for start, end in one.loss_runs:
            a, b = (start if start > low else low), (end if end < high else high)
            if a < b:
                edges.append((a + by, b + by))
    steps = np.zeros(int(lengths.sum()) + 1, np.int8)
    if edges:
        opened, closed = np.array(edges).T
        steps[opened] = 1
        np.subtract.at(steps, closed, 1)  # a run may close where the next one opens
    return np.cumsum(steps[:-1], dtype=np.int8) > 0


def _padded(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    result = np.zeros(real.shape, values.dtype)
    result[real] = values
    return result
