"""What remains of raw documents without the spans that were converted into augmented documents.

A token is excluded if its last character is in a converted span: the token of a word often begins with the space before
it. Each remaining range of tokens is a document. BOS and EOS belong to the text beside them. Records are matched
with converted texts shard by shard. Memory: 16 bytes per converted span (three times that while they are sorted) and a
byte per raw record; afterwards a bit per record and 16 bytes per remaining range.
"""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import Manifest
from ipt_jax.data.token_index import CharacterEnds

PARTS = np.dtype([("record", "<i8"), ("start", "<u4"), ("stop", "<u4")])


class Remains(NamedTuple):
    """`touched`: a bit per record, set if it lost tokens. `parts`: the token ranges that remain of those, by record.
    `counts`: documents that lost tokens, the tokens lost, and converted texts of other sources (no id matches); where
    documents are held out, also those that are neither trained on nor held out."""

    touched: np.ndarray
    parts: np.ndarray
    counts: tuple[int, ...]

    @classmethod
    def nothing(cls) -> Self:
        """For a source without exclusion."""
        return cls(np.zeros(0, np.uint8), np.zeros(0, PARTS), (0, 0, 0))

    def apply(self, documents: np.ndarray) -> np.ndarray:
        """Replaces complete records by their remaining parts, in order."""
        if not len(self.touched):
            return documents
        record = documents["record"]
        touched = (self.touched[record >> 3] >> (7 - (record & 7)).astype(np.uint8)) & 1 > 0
        first, stop = (np.searchsorted(self.parts["record"], record[touched], side) for side in ("left", "right"))
        counts = np.ones(len(documents), np.int64)
        counts[touched] = stop - first
        result = np.repeat(documents, counts)
        cut = np.repeat(touched, counts)
        parts = self.parts[ranges(first, stop)]
        result["start"][cut] = parts["start"]
        result["length"][cut] = parts["stop"] - parts["start"]
        return result


class Exclusion:
    """Call `shard` for each shard of a source in order, then `finish`. `parents`: the converted spans."""

    def __init__(self, name: str, directory: Path, manifest: Manifest, parents: np.ndarray):
        self._name, self._directory, self._manifest = name, directory, manifest
        self._parents = parents[np.argsort(parents["id"])]
        self._found = np.zeros(len(parents), bool)
        self._shared, self._touched, self._lost = 0, 0, 0

    def shard(self, shard: int, first: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each record of a shard lost tokens, and the remaining parts. `first`: number of its first record."""
        matched, spans = self._match(index["id"])
        complete = (spans["start"] == 0) & (spans["end"] >= index["characters"][matched])
        touched, excluded = np.zeros(len(index), bool), np.zeros(len(index), bool)
        touched[matched], excluded[matched[complete]] = True, True
        cut = ~excluded[matched]
        parts = self._remaining(shard, index, matched[cut], spans[cut])
        parts["record"] += first
        self._touched += int(touched.sum())
        self._lost += int(index["tokens"][touched].sum(dtype=np.int64)) - int((parts["stop"] - parts["start"]).sum())
        return touched, parts

    def _match(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record of the shard, span) for each converted span of its documents, by record and start."""
        by_id = np.argsort(ids)  # a binary search for sorted ids stays in the processor's cache
        ordered = ids[by_id]
        low = np.searchsorted(self._parents["id"], ordered, side="left")
        inside = np.flatnonzero(low < len(self._parents))
        hits = inside[self._parents["id"][low[inside]] == ordered[inside]]
        low = low[hits]
        high = np.searchsorted(self._parents["id"], ordered[hits], side="right")
        repeated = np.diff(low, prepend=-1) == 0
        self._shared += int((high - low)[repeated | self._found[low]].sum())
        records = np.repeat(by_id[hits], high - low)
        places = ranges(low, high)
        self._found[places] = True
        spans = self._parents[places]
        in_order = np.lexsort((spans["start"], records))
        return records[in_order], spans[in_order]

    def _remaining(self, shard: int, index: np.ndarray, records: np.ndarray, spans: np.ndarray) -> np.ndarray:
        if not len(records):
            return np.zeros(0, PARTS)
        rows: list[tuple[int, int, int]] = []
        ends = CharacterEnds(self._directory, self._manifest.shards[shard].name, index)
        documents, firsts = np.unique(records, return_index=True)
        for record, mine in zip(documents.tolist(), np.split(spans, firsts[1:]), strict=True):
            remaining = token_ranges_outside(ends(record), [(int(a), int(b)) for _, a, b in mine])
            rows += [(record, start, stop) for start, stop in remaining]
        return np.array(rows, PARTS)

    def finish(self) -> tuple[int, ...]:
        """`counts` of Remains. Raises UserError if no converted text is of this source, or if documents share an id."""
        if self._shared:
            raise UserError(
                f"source {self._name!r}: {self._shared:,} converted texts have an id that several of its documents "
                "share, so exclude_converted cannot distinguish them; tokenize documents with unique ids"
            )
        if not len(self._parents):
            raise UserError(
                f"source {self._name!r}: exclude_converted names a source whose documents have no parents; name one "
                "that was tokenized from the output of synth render, or remove exclude_converted"
            )
        if not self._found.any():
            raise UserError(
                f"source {self._name!r}: none of the {len(self._parents):,} texts to exclude is among its ids; "
                "remove exclude_converted, or set the id column of ipt tokenize to that of synth run"
            )
        return self._touched, self._lost, int((~self._found).sum())


def ranges(first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """All numbers of [first[0], stop[0]), then of [first[1], stop[1]), and so on."""
    counts = stop - first
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)


def token_ranges_outside(ends: np.ndarray, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token ranges outside the character `spans` (sorted by start); ends[t] is where token t ends.

    ends 0 3 6 9 9 (BOS, three words, EOS), span [0, 3): [(2, 5)]; span [3, 6): [(0, 2), (3, 5)]; span [0, 9): [].
    """
    ranges, free = [], 0
    for start, end in spans:
        ranges.append((free, int(np.searchsorted(ends, start, side="right"))))
        free = max(free, int(np.searchsorted(ends, end, side="right")))
    ranges.append((free, len(ends)))
    return [(low, high) for low, high in ranges if low < high and ends[high - 1] > (ends[low - 1] if low else 0)]
