"""What stays of raw documents when the spans that were converted into augmented ones drop out.

A token goes when its last character lies in a converted span (a word's token often begins with the space before it).
What is left of a document becomes one document a stretch; BOS and EOS stay with the text beside them, and go with it.
Records are matched with converted texts shard by shard: held in memory are the converted spans (16 bytes each, thrice
while they are sorted) and a byte a raw record, afterwards a bit a record and 16 bytes a stretch that stays.
"""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import Manifest
from ipt_jax.data.token_index import CharacterEnds, document_count

PARTS = np.dtype([("record", "<i8"), ("start", "<u4"), ("stop", "<u4")])


class Counts(NamedTuple):
    """Documents that lost tokens, the tokens, and the converted texts that are of other sources (no id here fits)."""

    documents: int
    tokens: int
    unmatched: int


class Remains(NamedTuple):
    """`touched`: a bit a record that lost tokens. `parts`: the token ranges that stay of those, by record."""

    touched: np.ndarray
    parts: np.ndarray
    counts: tuple[int, ...]

    @classmethod
    def nothing(cls) -> Self:
        """What stays where nothing was excluded."""
        return cls(np.zeros(0, np.uint8), np.zeros(0, PARTS), (0, 0, 0))

    def apply(self, documents: np.ndarray) -> np.ndarray:
        """Whole records, each replaced by what stays of it, in their order."""
        if not len(self.touched):
            return documents
        record = documents["record"]
        touched = (self.touched[record >> 3] >> (7 - (record & 7)).astype(np.uint8)) & 1 > 0
        first = np.searchsorted(self.parts["record"], record[touched], side="left")
        stop = np.searchsorted(self.parts["record"], record[touched], side="right")
        counts = np.ones(len(documents), np.int64)
        counts[touched] = stop - first
        result = np.repeat(documents, counts)
        cut = np.repeat(touched, counts)
        parts = self.parts[ranges(first, stop)]
        result["start"][cut] = parts["start"]
        result["length"][cut] = parts["stop"] - parts["start"]
        return result


class Exclusion:
    """Goes through the shards of a source in order and finds what the converted spans `parents` leave of each."""

    def __init__(self, name: str, directory: Path, manifest: Manifest, parents: np.ndarray):
        self._name, self._directory, self._manifest = name, directory, manifest
        self._parents = parents[np.argsort(parents["id"])]
        self._found = np.zeros(len(parents), bool)
        self._touched = np.zeros(document_count(manifest), bool)
        self._parts: list[np.ndarray] = []
        self._shared, self._lost = 0, 0

    def shard(self, shard: int, first: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each record of a shard, which begins at record `first`, lost tokens; and the parts that stay."""
        matched, spans = self._match(index["id"])
        whole = (spans["start"] == 0) & (spans["end"] >= index["characters"][matched])
        gone = np.zeros(len(index), bool)
        gone[matched] = True
        all_gone = np.zeros(len(index), bool)
        all_gone[matched[whole]] = True
        cut = ~all_gone[matched]
        parts = self._remaining(shard, index, matched[cut], spans[cut])
        parts["record"] += first
        self._touched[first : first + len(index)] = gone
        self._parts.append(parts)
        self._lost += int(index["tokens"][gone].sum(dtype=np.int64)) - int((parts["stop"] - parts["start"]).sum())
        return gone, parts

    def _match(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record of the shard, span) for each converted span of the shard's documents, by record and start."""
        by_id = np.argsort(ids)  # in order, a binary search in many converted spans stays in the processor's cache
        ordered = ids[by_id]
        low = np.searchsorted(self._parents["id"], ordered, side="left")
        inside = np.flatnonzero(low < len(self._parents))
        hits = inside[self._parents["id"][low[inside]] == ordered[inside]]
        low = low[hits]
        high = np.searchsorted(self._parents["id"], ordered[hits], side="right")
        again = np.diff(low, prepend=-1) == 0
        self._shared += int((high - low)[again | self._found[low]].sum())
        self._found[low] = True
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
            stretches = stay(ends(record), [(int(a), int(b)) for _, a, b in mine])
            rows += [(record, start, stop) for start, stop in stretches]
        return np.array(rows, PARTS)

    def finish(self) -> Remains:
        """What stays. Raises UserError when no converted text is of this source, or when ids cannot tell."""
        if self._shared:
            raise UserError(
                f"source {self._name!r}: {self._shared:,} converted texts have an id that several of its documents "
                "share, so exclude_converted cannot tell them apart; give the documents unique ids"
            )
        if not len(self._parents):
            raise UserError(
                f"source {self._name!r}: exclude_converted names documents that have no parents (nothing was converted "
                "into them); name what synth render wrote, or take exclude_converted out"
            )
        if not self._found.any():
            raise UserError(
                f"source {self._name!r}: none of the {len(self._parents):,} texts to exclude is among its ids; "
                "take exclude_converted out, or name the id column in ipt tokenize as in synth run"
            )
        counts = Counts(int(self._touched.sum()), self._lost, int((~self._found).sum()))
        return Remains(np.packbits(self._touched), np.concatenate(self._parts), tuple(counts))


def ranges(first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """All numbers of [first[0], stop[0]), then of [first[1], stop[1]), and so on."""
    counts = stop - first
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)


def stay(ends: np.ndarray, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token ranges outside the character `spans` (sorted by start); ends[t] is where token t ends.

    ends 0 3 6 9 9 (BOS, three words, EOS), span [0, 3): [(2, 5)]; span [3, 6): [(0, 2), (3, 5)]; span [0, 9): [].
    """
    ranges, free = [], 0
    for start, end in spans:
        ranges.append((free, int(np.searchsorted(ends, start, side="right"))))
        free = max(free, int(np.searchsorted(ends, end, side="right")))
    ranges.append((free, len(ends)))
    return [(low, high) for low, high in ranges if low < high and ends[high - 1] > (ends[low - 1] if low else 0)]
