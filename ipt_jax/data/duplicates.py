"""Duplicate texts over all inputs of `ipt tokenize`: the first document with a text is kept, later ones are dropped.

One pass reads every document and hashes its text (64 bits). The first document is that of the first input and unit, so
the number of workers changes nothing. Memory: about 24 bytes per document.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ipt_jax.core.executor import ExecutorName, run_units
from ipt_jax.core.hashing import hash64
from ipt_jax.core.progress import Progress
from ipt_jax.corpus.records import Document
from ipt_jax.corpus.row_reader import Dropped, SourceSettings
from ipt_jax.corpus.sources import Unit, read_unit


class HashTask(NamedTuple):
    unit: Unit
    source: SourceSettings


def usable(rows: Iterable[Document | Dropped], dropped: Counter[str]) -> Iterator[Document]:
    """The documents with text. Others are counted by reason."""
    for row in rows:
        if isinstance(row, Dropped):
            dropped[row.reason] += 1
        elif not any(segment.text and not segment.text.isspace() for segment in row.segments):
            dropped["empty_text"] += 1
        else:
            yield row


def hash_unit(task: HashTask) -> np.ndarray:
    """The hash of each usable document's text, in order. Runs in a worker process."""
    documents = usable(read_unit(task.unit, task.source), Counter())
    return np.frombuffer(b"".join([hash64(one.text) for one in documents]), np.uint64)


def find_duplicates(
    units: Sequence[tuple[Unit, SourceSettings]], *, workers: int | None, executor: ExecutorName
) -> list[np.ndarray]:
    """For each unit the numbers of its usable documents whose text an earlier document has."""
    hashes = [np.zeros(0, np.uint64)] * len(units)
    with Progress(len(units), "units", "ipt tokenize: duplicates") as progress:
        tasks = [HashTask(*unit) for unit in units]
        for index, found in run_units(hash_unit, tasks, workers=workers, executor=executor):
            hashes[index] = found
            progress.advance()
    every = np.concatenate(hashes)
    duplicate = np.ones(len(every), bool)
    duplicate[np.unique(every, return_index=True)[1]] = False
    starts = np.cumsum([0] + [len(one) for one in hashes])[1:-1]
    return [np.flatnonzero(part) for part in np.split(duplicate, starts)]
