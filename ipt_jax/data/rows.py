"""Rows as arrays: the documents of a plan read from their shards and laid out, with their labels.

Labels are made per document, before packing: a token's target is the next token of its own document, in whichever row
that lies; a document's last token, a target without loss and padding are masked. Positions restart with each piece.
Documents 7 8 9 2 and 5 6 2, T = 5, packed by `concat`:

    row 0   tokens 7 8 9 2 5   targets 8 9 2 0 6   loss_mask 1 1 1 0 1   segment_ids 1 1 1 1 2   positions 0 1 2 3 0
    row 1   tokens 6 2 . . .   targets 2 . . . .   loss_mask 1 0 0 0 0   segment_ids 1 1 0 0 0   positions 0 1 0 0 0
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ipt_jax.corpus.records import KINDS, TokenDocument, decode
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.shards import Shards
from ipt_jax.data.packing import Piece

KIND_CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}  # 0 is padding
DTYPES: dict[str, type] = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_mask": np.bool_,
    "segment_ids": np.int32,
    "positions": np.int32,
    "kinds": np.int32,
}


class Documents(NamedTuple):
    """The documents of a source: tokens [start, start + length) of `record`. `record` and `start` None: all, whole."""

    length: np.ndarray
    record: np.ndarray | None = None
    start: np.ndarray | None = None


class PlannedTokens(NamedTuple):
    """A record's ids and target ranges; the plan takes tokens [start, stop) of it as one document."""

    ids: np.ndarray
    loss_runs: list[tuple[int, int]]
    kind: int
    start: int
    stop: int


def read_planned(shards: Shards, documents: Documents, wanted: np.ndarray, lengths: np.ndarray) -> list[PlannedTokens]:
    """The documents `wanted`, each to the length that the plan takes. One batched read a shard."""
    records = (wanted if documents.record is None else documents.record[wanted]).tolist()
    starts = [0] * len(records) if documents.start is None else documents.start[wanted].tolist()
    by_record = sorted(set(records))
    data = {
        record: decode(found, TokenDocument)
        for record, found in zip(by_record, shards.__getitems__(by_record), strict=True)
    }
    planned = []
    for record, start, length in zip(records, starts, lengths.tolist(), strict=True):
        one = data[record]
        ids = np.frombuffer(one.tokens, "<u2" if one.dtype == "uint16" else "<u4")
        if len(ids) < start + length:
            raise UserError(
                f"{shards.path}: record {record} holds {len(ids)} tokens, fewer than its side file says; "
                "delete the directory and run ipt tokenize again"
            )
        planned.append(PlannedTokens(ids, one.loss_runs, KIND_CODES[one.kind], start, start + length))
    return planned


class RowArrays:
    """`fields`: one array [rows, T] a name, padding until filled."""

    def __init__(self, rows: int, seq_len: int):
        self.fields: dict[str, np.ndarray] = {name: np.zeros((rows, seq_len), dtype) for name, dtype in DTYPES.items()}

    def fill(self, row: int, pieces: Sequence[tuple[Piece, PlannedTokens]]) -> None:
        at = 0
        for number, (piece, document) in enumerate(pieces, start=1):
            self._place(row, at, number, piece, document)
            at += piece.length

    def _place(self, row: int, at: int, number: int, piece: Piece, document: PlannedTokens) -> None:
        """Writes a piece from column `at`."""
        fields, here = self.fields, slice(at, at + piece.length)
        first = document.start + piece.offset  # within the record, as is all below
        predicting = min(piece.length, document.stop - 1 - first)  # the document's last token predicts nothing
        fields["tokens"][row, here] = document.ids[first : first + piece.length]
        fields["targets"][row, at : at + predicting] = document.ids[first + 1 : first + 1 + predicting]
        fields["segment_ids"][row, here] = number
        fields["positions"][row, here] = np.arange(piece.length, dtype=np.int32)
        fields["kinds"][row, here] = document.kind
        mask = fields["loss_mask"][row, at : at + predicting]
        for start, stop in document.loss_runs:  # token t is predicted at t - 1
            mask[max(start - 1 - first, 0) : max(stop - 1 - first, 0)] = True
