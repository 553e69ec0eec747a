"""Ids that may stand twice, found on disk in memory that does not grow with the corpus.

Each id leaves eight bytes in one of 256 files of a temporary folder (320 MB for 40M ids), and each file is sorted by
itself: 1.2 MB at 40M ids, 125 MB at 4 billion. Different ids share a mark with a probability of 4e-5 at 40M, so what is
found are suspects.
"""

import hashlib
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

BUCKETS = 256  # a mark's first byte
HELD_BYTES = 32 << 10  # of a bucket in memory before they are written


class DuplicateIds:
    """A bag of marks that grows on disk; to be used in a `with`."""

    def __init__(self) -> None:
        self._held = [bytearray() for _ in range(BUCKETS)]
        self._folder = tempfile.TemporaryDirectory(prefix="synth-marks-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def add(self, text_id: str) -> None:
        found = id_hash(text_id)
        held = self._held[found[0]]
        held += found
        if len(held) >= HELD_BYTES:
            with self._path(found[0]).open("ab") as file:
                file.write(held)
            held.clear()

    def _path(self, bucket: int) -> Path:
        return Path(self._folder.name) / str(bucket)

    def suspects(self) -> set[bytes]:
        """The marks that came more than once."""
        twice: set[bytes] = set()
        for bucket, held in enumerate(self._held):
            written = self._path(bucket).read_bytes() if self._path(bucket).exists() else b""
            ordered = np.sort(np.frombuffer(written + held, ">u8"))
            again = ordered[1:][ordered[1:] == ordered[:-1]]
            twice.update(int(one).to_bytes(8) for one in again)
        return twice


def id_hash(text_id: str) -> bytes:
    return hashlib.blake2b(text_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
