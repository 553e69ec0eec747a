"""An append-only file of finished groups, from which a shard is sealed: a kill costs only the groups in flight.

Each record has its length, its place in the shard and a CRC-32 of place and bytes, and is written by one call. Opening
reads the complete records and truncates a torn tail (a kill during a write, a lost page after a power failure). One
writer per file: a lock that ends with its process.
"""

import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import writing

HEADER = struct.Struct("<III")  # payload bytes, place in the shard, CRC-32
LOCK_SECONDS = 10.0  # the worker of a killed driver may hold its journal for a moment


class Journal:
    """The groups of one shard in order of completion, found by place."""

    def __init__(self, path: Path, lock_seconds: float = LOCK_SECONDS) -> None:
        self.path, self._lock_seconds = path, lock_seconds
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._lock()
        self._places: dict[int, int] = {}
        self._end = self._scan()
        os.ftruncate(self._file, self._end)

    def _lock(self) -> None:
        deadline = time.monotonic() + self._lock_seconds
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"output {self.path}: another run is writing here; wait for it to end") from None
                time.sleep(0.1)

    def _scan(self) -> int:
        """Indexes the complete records; returns where the first broken one begins."""
        size, at = os.fstat(self._file).st_size, 0
        while at + HEADER.size <= size:
            length, place, checksum = HEADER.unpack(os.pread(self._file, HEADER.size, at))
            payload = os.pread(self._file, min(length, size), at + HEADER.size)
            if len(payload) != length or checksum != crc(place, payload):
                break
            self._places[place] = at
            at += HEADER.size + length
        return at

    def append(self, place: int, payload: bytes) -> None:
        assert place not in self._places, f"{self.path}: duplicate group {place}"
        record = HEADER.pack(len(payload), place, crc(place, payload)) + payload
        with writing(self.path):
            written = os.pwrite(self._file, record, self._end)
            if written != len(record):
                raise OSError(f"{written} of {len(record)} bytes written")
        self._places[place] = self._end
        self._end += len(record)

    def read(self, place: int) -> bytes:
        at = self._places[place]
        length, _, checksum = HEADER.unpack(os.pread(self._file, HEADER.size, at))
        payload = os.pread(self._file, length, at + HEADER.size)
        assert checksum == crc(place, payload), f"{self.path}: changed while it was open"
        return payload

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._file)

    def __iter__(self) -> Iterator[int]:
        """The places held, in the order of completion."""
        return iter(self._places)

    def __contains__(self, place: int) -> bool:
        return place in self._places

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        os.close(self._file)


def read_journal(path: Path) -> Iterator[bytes]:
    """The records of a journal that no other process writes."""
    with closing(Journal(path)) as journal:
        yield from map(journal.read, journal)


def crc(place: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(place.to_bytes(4, "little")))
