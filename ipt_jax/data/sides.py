"""Writes a shard's side files (see data.lengths for what they hold) while its documents stream by, in constant memory.

Rows go to temporary files in blocks; closing them writes the number of rows into the header. The bytes are those of
`numpy.save`. `name_side_files` gives the files their names before the shard gets its own: a named shard has all.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ipt_jax.corpus.files import TEMPORARY
from ipt_jax.corpus.records import Parent
from ipt_jax.corpus.settings import file_digest
from ipt_jax.corpus.shards import Manifest, ShardEntry
from ipt_jax.data.lengths import INDEX, PARENTS, id_key, side_path

KEPT_ROWS = 4096  # documents whose rows wait in memory
ALL = ("index", "parents", "chars")


class SideWriter:
    """The side files of the shard at `temporary`, a row a document in their order."""

    def __init__(self, temporary: Path):
        self._index = _Column(_temporary(temporary, "index"), INDEX)
        self._parents = _Column(_temporary(temporary, "parents"), PARENTS)
        self._chars = _Column(_temporary(temporary, "chars"), np.dtype(np.uint8))
        self._rows: list[tuple[int, int, int, int]] = []
        self._parent_rows: list[tuple[int, int, int]] = []
        self._kept: list[np.ndarray] = []
        self._any_characters = False

    def add(
        self, document_id: str, page: int, tokens: int, characters: np.ndarray | None, parents: list[Parent]
    ) -> None:
        """`page`: the record that holds it. `characters`: how many of its text each token covers, if it is raw."""
        self._any_characters |= characters is not None
        self._kept.append(np.zeros(tokens, np.uint8) if characters is None else characters)
        self._rows.append((tokens, 0, page, id_key(document_id)))
        self._parent_rows += [(id_key(parent.id), parent.start, parent.end) for parent in parents]
        if len(self._rows) == KEPT_ROWS:
            self._write_kept()

    def _write_kept(self) -> None:
        if self._rows:
            rows, characters = np.array(self._rows, INDEX), np.concatenate(self._kept)
            starts = np.cumsum(rows["tokens"], dtype=np.int64) - rows["tokens"]
            rows["characters"] = np.add.reduceat(characters, starts, dtype=np.uint32)
            self._index.write(rows)
            self._parents.write(np.array(self._parent_rows, PARENTS))
            self._chars.write(characters)
        self._rows, self._parent_rows, self._kept = [], [], []

    def close(self) -> dict[str, str]:
        """Writes what is left and returns the files' SHA-256. Without a raw document there is none of characters."""
        self._write_kept()
        columns = {"index": self._index, "parents": self._parents, "chars": self._chars}
        for column in columns.values():
            column.close()
        if not self._any_characters:
            columns.pop("chars").path.unlink()
        return {what: file_digest(column.path) for what, column in columns.items()}


class _Column:
    """One array in a .npy file that grows. Unsigned integers take the smallest type that holds all of them."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self._dtype, self._rows = path, dtype, 0
        self._file: Any = path.open("wb+")
        self._write_header()

    def _write_header(self) -> None:
        """Has the same length for any number of rows: numpy leaves room for the number to grow."""
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
        self._dtype, self._rows, self._file = dtype, 0, self.path.open("wb+")
        self._write_header()
        for start in range(0, len(narrow), 1 << 20):
            self.write(narrow[start : start + (1 << 20)])

    def close(self) -> None:
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _temporary(shard: Path, what: str) -> Path:
    return shard.with_name(f"{shard.name.removesuffix(TEMPORARY)}.{what}{TEMPORARY}")


def name_side_files(temporary: Path, shard: str) -> None:
    """Renames what `SideWriter(temporary)` wrote, before the shard gets its name. A file of a former run goes."""
    for what in ALL:
        written, named = _temporary(temporary, what), side_path(temporary.parent, shard, what)
        if written.exists():
            os.replace(written, named)
        else:
            named.unlink(missing_ok=True)


def side_names(shard: str, digests: dict[str, str]) -> dict[str, str]:
    """The digests that `SideWriter.close` gave, by the files' final names."""
    return {side_path(Path(), shard, what).name: value for what, value in digests.items()}


def side_digests(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of each side file by name, as planning looks for it in the manifest's summary."""
    return {name: value for entry in manifest.shards for name, value in entry.sides.items()}


def side_damage(directory: Path, entry: ShardEntry) -> str | None:
    """What is wrong with the side files of a listed shard."""
    for name, wanted in entry.sides.items():
        if not (directory / name).is_file():
            return f"{directory / name}: listed in the manifest but absent"
        if file_digest(directory / name) != wanted:
            return f"{directory / name}: its bytes differ from the manifest's checksum"
    return None
