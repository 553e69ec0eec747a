"""Side files of token shards: what planning must know about each document without opening a shard.

Beside `tokens-00000-of-00010.array_record` lie `….index.npy` (a row a document: tokens, characters, the record of the
shard that holds it, a key of its id), `….parents.npy` (a row a parent: key of the raw id, character span) and, where
the shard holds raw documents, `….chars.npy` (characters that each token covers, control tokens none). Index and parents
are checked against the manifest's digests and counts; the characters of a document against its row when they are used.

A key is the first 64 bits of BLAKE2b of the id: among 2e8 ids two share a key with probability 1e-3.
"""

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ipt_jax.corpus.settings import UserError, file_digest
from ipt_jax.corpus.shards import Manifest, ShardEntry
from ipt_jax.data.kept import Kept
from ipt_jax.data.threads import in_threads

INDEX = np.dtype([("tokens", "<u4"), ("characters", "<u4"), ("page", "<u4"), ("id", "<u8")])
PARENTS = np.dtype([("id", "<u8"), ("start", "<u4"), ("end", "<u4")])
OPEN_FILES = 128
SMALL_BYTES = 1 << 25  # index files of a directory that are together no larger are read whole, each once


def id_key(document_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")


def document_count(counted: Manifest | ShardEntry) -> int:
    """The documents of a token directory or of one shard. Its records are pages of them; its counts are by kind."""
    return sum(counted.counts.values())


def side_path(directory: Path, shard: str, what: str) -> Path:
    return directory / f"{shard.removesuffix('.array_record')}.{what}.npy"


def read_index(directory: Path, manifest: Manifest) -> Iterator[np.ndarray]:
    """The index of each shard. Raises UserError naming a file that is absent or differs from the manifest."""
    for entry in manifest.shards:
        index = _read_checked(directory, manifest, entry, "index")
        if len(index) != document_count(entry) or int(index["tokens"].sum(dtype=np.int64)) != entry.tokens:
            raise UserError(_damaged(side_path(directory, entry.name, "index")))
        yield index


class IndexFiles:
    """Index rows of any ranges of a directory's documents, read as they are asked for."""

    def __init__(self, directory: Path, manifest: Manifest):
        self._paths = [side_path(directory, entry.name, "index") for entry in manifest.shards]
        self._ends = np.cumsum([document_count(entry) for entry in manifest.shards]).tolist()
        self._files = Kept(self._open, OPEN_FILES)
        self._small = Kept(self._whole, len(self._paths)) if self._ends[-1] * INDEX.itemsize <= SMALL_BYTES else None

    def __call__(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """The rows of all ranges, joined."""
        return np.frombuffer(b"".join(in_threads(self._read, ranges)), INDEX)

    def _read(self, span: tuple[int, int]) -> bytes:
        first, stop = span
        found = []
        for shard, low, high in shards_of(self._ends, first, stop):
            if self._small:
                found.append(self._small(shard)[low * INDEX.itemsize : high * INDEX.itemsize])
            else:
                found.append(self._rows(shard, low, high))
        return b"".join(found)

    def _whole(self, shard: int) -> bytes:
        return self._rows(shard, 0, self._ends[shard] - (self._ends[shard - 1] if shard else 0))

    def _rows(self, shard: int, low: int, high: int) -> bytes:
        file, start = self._files(shard)
        size = (high - low) * INDEX.itemsize
        data = os.pread(file.fileno(), size, start + low * INDEX.itemsize)
        if len(data) != size:
            raise UserError(_damaged(self._paths[shard]))
        return data

    def _open(self, shard: int) -> tuple[BinaryIO, int]:
        """The file, which closes when its last user lets go of it, and where its rows begin."""
        path = self._paths[shard]
        documents = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise UserError(f"{path}: absent; run ipt tokenize again to make it") from error
        return file, os.fstat(file.fileno()).st_size - documents * INDEX.itemsize  # rows end the file


def shards_of(ends: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first, stop within it) of what has numbers [first, stop) in a directory whose shards end at `ends`."""
    shard = bisect.bisect_right(ends, first)
    while first < stop:
        start = ends[shard - 1] if shard else 0
        high = min(stop, ends[shard])
        if first < high:
            yield shard, first - start, high - start
        first, shard = high, shard + 1


def read_parents(directory: Path, manifest: Manifest) -> np.ndarray:
    arrays = [_read_checked(directory, manifest, entry, "parents") for entry in manifest.shards]
    return np.concatenate(arrays) if arrays else np.zeros(0, PARENTS)


def _read_checked(directory: Path, manifest: Manifest, entry: ShardEntry, what: str) -> np.ndarray:
    path = side_path(directory, entry.name, what)
    if not path.is_file():
        raise UserError(f"{path}: absent; run ipt tokenize again to make it")
    if file_digest(path) != manifest.summary["side_files"].get(path.name):
        raise UserError(_damaged(path))
    return np.load(path, allow_pickle=False)


def _damaged(path: Path) -> str:
    return f"{path}: its bytes differ from the manifest's; delete it and run ipt tokenize again"


class CharacterEnds:
    """Where the tokens of single documents end in their raw text, read from one shard's memory-mapped file."""

    def __init__(self, directory: Path, shard: str, index: np.ndarray):
        self._path = side_path(directory, shard, "chars")
        try:
            self._chars = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise UserError(f"{self._path}: absent or damaged; delete it and run ipt tokenize again") from error
        self._index = index
        self._starts = np.cumsum(index["tokens"], dtype=np.int64) - index["tokens"]

    def __call__(self, document: int) -> np.ndarray:
        row, start = self._index[document], self._starts[document]
        ends = np.cumsum(self._chars[start : start + row["tokens"]], dtype=np.int64)
        if len(ends) != row["tokens"] or ends[-1] != row["characters"]:
            raise UserError(_damaged(self._path))
        return ends
