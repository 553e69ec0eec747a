"""Side files of token shards: what planning reads of each document without opening a shard.

Beside `tokens-00000-of-00010.array_record` there are `….index.npy` (a row per document: tokens, characters, page, key
of its id), `….parents.npy` (a row per parent: key of the raw id, character span) and, if the shard has raw documents,
`….chars.npy` (characters that each token covers; control tokens none). A key is the first 64 bits of BLAKE2b of the id:
among 2e8 ids two share a key with probability 1e-3.

Guarantees: index and parents match the digests and counts of the manifest; the characters of a document are compared
with its row when they are read. A shard with its final name has all its side files.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import file_digest, hash64
from ipt_jax.core.manifest import Manifest, ShardEntry
from ipt_jax.core.stage import NewShard
from ipt_jax.corpus.records import Parent
from ipt_jax.data.shared_cache import SharedCache, in_threads

INDEX = np.dtype([("tokens", "<u4"), ("characters", "<u4"), ("page", "<u4"), ("id", "<u8")])
PARENTS = np.dtype([("id", "<u8"), ("start", "<u4"), ("end", "<u4")])
OPEN_FILES = 128
SMALL_BYTES = 1 << 25  # index files of a directory that are smaller in sum are read completely, each once
WAITING_ROWS = 4096  # documents whose rows wait in memory for writing


def id_key(document_id: str) -> int:
    return int.from_bytes(hash64(document_id), "little")


def document_count(counted: Manifest | ShardEntry) -> int:
    """The documents of a token directory or of one shard: `records` counts pages, `counts` documents by kind."""
    return sum(counted.counts.values())


def index_path(directory: Path, shard: str, what: str) -> Path:
    return directory / f"{shard.removesuffix('.array_record')}.{what}.npy"


def read_index(directory: Path, manifest: Manifest) -> Iterator[np.ndarray]:
    """The index of each shard. Raises UserError for a file that is missing or differs from the manifest."""
    for entry in manifest.shards:
        index = _read_checked(directory, manifest, entry, "index")
        if len(index) != document_count(entry) or int(index["tokens"].sum(dtype=np.int64)) != entry.tokens:
            raise UserError(_damaged(index_path(directory, entry.name, "index")))
        yield index


class IndexFiles:
    """Reads index rows of any ranges of the documents of a directory."""

    def __init__(self, directory: Path, manifest: Manifest):
        self._paths = [index_path(directory, entry.name, "index") for entry in manifest.shards]
        self._counts = [document_count(entry) for entry in manifest.shards]
        self._ends = np.cumsum(self._counts).tolist()
        self._files = SharedCache(self._open, OPEN_FILES)
        self._complete: SharedCache[int, bytes] = SharedCache(
            lambda shard: self._pread(shard, 0, self._counts[shard]), len(self._paths)
        )
        self._rows = self._slice if self._ends[-1] * INDEX.itemsize <= SMALL_BYTES else self._pread

    def __call__(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """The rows of all ranges, joined."""
        return np.frombuffer(b"".join(in_threads(self._read, ranges)), INDEX)

    def _read(self, span: tuple[int, int]) -> bytes:
        return b"".join([self._rows(shard, low, high) for shard, low, high in shards_of(self._ends, *span)])

    def _slice(self, shard: int, low: int, high: int) -> bytes:
        return self._complete(shard)[low * INDEX.itemsize : high * INDEX.itemsize]

    def _pread(self, shard: int, low: int, high: int) -> bytes:
        file, start = self._files(shard)
        size = (high - low) * INDEX.itemsize
        data = os.pread(file.fileno(), size, start + low * INDEX.itemsize)
        if len(data) != size:
            raise UserError(_damaged(self._paths[shard]))
        return data

    def _open(self, shard: int) -> tuple[BinaryIO, int]:
        """The file, closed when its last user releases it, and where its rows begin."""
        try:
            file = self._paths[shard].open("rb", buffering=0)
        except FileNotFoundError as error:
            raise UserError(f"{self._paths[shard]}: missing; rerun ipt tokenize") from error
        return file, os.fstat(file.fileno()).st_size - self._counts[shard] * INDEX.itemsize  # rows end the file


def shards_of(ends: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first, stop within it) of numbers [first, stop) in a directory whose shards end at `ends`."""
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
    path = index_path(directory, entry.name, what)
    if not path.is_file():
        raise UserError(f"{path}: missing; rerun ipt tokenize")
    if file_digest(path) != manifest.summary["side_files"].get(path.name):
        raise UserError(_damaged(path))
    return np.load(path, allow_pickle=False)


def _damaged(path: Path) -> str:
    return f"{path}: its bytes differ from the manifest's checksum; delete it and rerun ipt tokenize"


class CharacterEnds:
    """Where the tokens of a document end in its raw text, read from the memory-mapped file of one shard."""

    def __init__(self, directory: Path, shard: str, index: np.ndarray):
        self._path = index_path(directory, shard, "chars")
        try:
            self._chars = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise UserError(f"{self._path}: missing or damaged; delete it and rerun ipt tokenize") from error
        self._index = index
        self._starts = np.cumsum(index["tokens"], dtype=np.int64) - index["tokens"]

    def __call__(self, document: int) -> np.ndarray:
        row, start = self._index[document], self._starts[document]
        ends = np.cumsum(self._chars[start : start + row["tokens"]], dtype=np.int64)
        if len(ends) != row["tokens"] or ends[-1] != row["characters"]:
            raise UserError(_damaged(self._path))
        return ends


class TokenIndexWriter:
    """Writes the side files of `shard` in bounded memory, a row per document, as `numpy.save` does."""

    def __init__(self, shard: NewShard):
        self._index = _Column(shard.side_path("index.npy"), INDEX)
        self._parents = _Column(shard.side_path("parents.npy"), PARENTS)
        self._chars = _Column(shard.side_path("chars.npy"), np.dtype(np.uint8))
        self._rows: list[tuple[int, int, int, int]] = []
        self._parent_rows: list[tuple[int, int, int]] = []
        self._characters: list[np.ndarray] = []
        self._raw = False

    def add(
        self, document_id: str, page: int, tokens: int, characters: np.ndarray | None, parents: list[Parent]
    ) -> None:
        """`page`: the record that holds the document. `characters`: those that each token of a raw document covers."""
        self._raw |= characters is not None
        self._characters.append(np.zeros(tokens, np.uint8) if characters is None else characters)
        self._rows.append((tokens, 0, page, id_key(document_id)))
        self._parent_rows += [(id_key(parent.id), parent.start, parent.end) for parent in parents]
        if len(self._rows) == WAITING_ROWS:
            self._write()

    def _write(self) -> None:
        if self._rows:
            rows, characters = np.array(self._rows, INDEX), np.concatenate(self._characters)
            starts = np.cumsum(rows["tokens"], dtype=np.int64) - rows["tokens"]
            rows["characters"] = np.add.reduceat(characters, starts, dtype=np.uint32)
            self._index.write(rows)
            self._parents.write(np.array(self._parent_rows, PARENTS))
            self._chars.write(characters)
        self._rows, self._parent_rows, self._characters = [], [], []

    def close(self) -> dict[str, str]:
        """Writes the last rows. Returns the SHA-256 of each file by the end of its name; chars.npy only if raw."""
        self._write()
        columns = {"index.npy": self._index, "parents.npy": self._parents, "chars.npy": self._chars}
        for column in columns.values():
            column.close()
        if not self._raw:
            columns.pop("chars.npy").path.unlink()
        return {ending: file_digest(column.path) for ending, column in columns.items()}


class _Column:
    """One array in a growing .npy file. Unsigned integers have the smallest type that holds all of them."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path = path
        self._open(dtype)

    def _open(self, dtype: np.dtype) -> None:
        self._dtype, self._rows = dtype, 0
        self._file: Any = self.path.open("wb+")
        self._write_header()

    def _write_header(self) -> None:
        """The header has the same length for any number of rows."""
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._rows,)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, rows: np.ndarray) -> None:
        if self._dtype.names is None:
            smallest = np.min_scalar_type(int(rows.max(initial=0)))
            if smallest.itemsize > self._dtype.itemsize:  # a token of more than 255 characters: rare
                self._widen(smallest)
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._rows += len(rows)

    def _widen(self, dtype: np.dtype) -> None:
        self.close()
        narrow = np.load(self.path, mmap_mode="r", allow_pickle=False)
        os.unlink(self.path)  # the mapping keeps the bytes
        self._open(dtype)
        for start in range(0, len(narrow), 1 << 20):
            self.write(narrow[start : start + (1 << 20)])

    def close(self) -> None:
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def index_digests(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of each side file by name, as planning reads it from the summary of the manifest."""
    return {name: value for entry in manifest.shards for name, value in entry.side_files.items()}
