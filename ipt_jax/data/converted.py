"""What stays of raw documents when the spans that were converted into augmented ones drop out.

A token goes when its last character lies in a converted span (a word's token often begins with the space before it).
What is left of a document becomes one document a stretch; BOS and EOS stay with the text beside them, and go with it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.shards import Manifest
from ipt_jax.data.lengths import CharacterEnds
from ipt_jax.data.rows import Documents


class Excluded(NamedTuple):
    """Documents that lost tokens, the tokens, and the converted texts that are of other sources (no id here fits)."""

    documents: int
    tokens: int
    unmatched: int


def unconverted(
    name: str, directory: Path, manifest: Manifest, indexes: list[np.ndarray], parents: np.ndarray
) -> tuple[Documents, Excluded]:
    """The documents that stay of the source `name`, and what dropped out."""
    index = np.concatenate(indexes)
    matched, spans = _match(name, index["id"], parents)
    whole = (spans["start"] == 0) & (spans["end"] >= index["characters"][matched])
    gone = np.zeros(len(index), bool)
    gone[matched] = True
    cut = ~whole & ~np.isin(matched, matched[whole])
    remains = _remains(directory, manifest, indexes, matched[cut], spans[cut])
    kept = np.flatnonzero(~gone)
    record = np.concatenate([kept, remains[:, 0]])
    start = np.concatenate([np.zeros(len(kept), np.int64), remains[:, 1]])
    length = np.concatenate([index["tokens"][kept].astype(np.int64), remains[:, 2] - remains[:, 1]])
    in_order = np.lexsort((start, record))
    documents = Documents(length[in_order].astype(np.uint32), record[in_order], start[in_order].astype(np.uint32))
    lost = int(index["tokens"].sum(dtype=np.int64)) - int(length.sum())
    return documents, Excluded(len(np.unique(matched)), lost, len(parents) - len(matched))


def _match(name: str, ids: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(record, span) for each parent among `ids`. Raises UserError when none is, or when an id names two documents."""
    by_id = np.argsort(ids, kind="stable")
    first = np.searchsorted(ids[by_id], parents["id"], side="left")
    last = np.searchsorted(ids[by_id], parents["id"], side="right")
    if (last - first > 1).any():
        raise UserError(
            f"source {name!r}: {int((last - first > 1).sum()):,} converted texts have an id that several "
            "of its documents share, so exclude_converted cannot tell them apart; give the documents unique ids"
        )
    found = last > first
    if not found.any():
        raise UserError(
            f"source {name!r}: none of the {len(parents):,} texts to exclude is among its ids; "
            "take exclude_converted out, or name the id column in ipt tokenize as in synth run"
        )
    return by_id[first[found]], parents[found]


def _remains(
    directory: Path, manifest: Manifest, indexes: list[np.ndarray], records: np.ndarray, spans: np.ndarray
) -> np.ndarray:
    """Rows (record, start, stop) of token ranges that stay of documents converted in part."""
    bounds = np.cumsum([0] + [len(index) for index in indexes])
    rows: list[tuple[int, int, int]] = []
    by_record = np.lexsort((spans["start"], records))
    records, spans = records[by_record], spans[by_record]
    documents, firsts = np.unique(records, return_index=True)
    for shard, index in enumerate(indexes):
        here = slice(*np.searchsorted(documents, bounds[shard : shard + 2]))
        if here.start == here.stop:
            continue
        ends = CharacterEnds(directory, manifest.shards[shard].name, index)
        for record, mine in zip(documents[here], np.split(spans, firsts[1:])[here], strict=True):
            stretches = stay(ends(record - bounds[shard]), [(int(a), int(b)) for _, a, b in mine])
            rows += [(int(record), start, stop) for start, stop in stretches]
    return np.array(rows, np.int64).reshape(-1, 3)


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
