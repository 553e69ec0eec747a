"""SHA-256 of values and files, with a cache of file hashes: a restart does not read a corpus twice.

A cached hash belongs to a file of the same name, inode, size and times of change, of its bytes and of its inode. No
program can set the latter. A file that changed in the last two seconds is not cached, because a further change may
leave the same times. The cache holds its own checksum and is ignored on a mismatch.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash64(text: str) -> bytes:
    """Eight bytes of BLAKE2b. Among n different texts, two share a hash with probability n² / 2⁶⁵."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


DigestOf = Callable[[Path], str]  # hashes a file: `file_digest`, or a `FileHashCache`


def directory_digest(paths: list[Path], digest_of: DigestOf = file_digest) -> str:
    """SHA-256 (hex) over the names and bytes of the files `paths`, of any directory."""
    return digest({path.name: digest_of(path) for path in paths})


SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use ticks every two seconds


class CachedHashes(msgspec.Struct):
    digests: dict[str, str]
    checksum: str


class FileHashCache:
    """Call it with a path for the SHA-256 (hex) of the file. `save` stores the hashes asked for in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._load()
        self._asked: dict[str, str] = {}

    def _load(self) -> dict[str, str]:
        try:
            cached = msgspec.json.decode(self.path.read_bytes(), type=CachedHashes)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return {}
        return cached.digests if cached.checksum == digest(cached.digests) else {}

    def __call__(self, file: str | Path) -> str:
        state = os.stat(file)
        key = f"{Path(file).name} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        found = self._known.get(key)
        if found is None:
            found = file_digest(file)
            if max(state.st_mtime_ns, state.st_ctime_ns) + SETTLED_NS > time.time_ns():
                return found
        self._asked[key] = found
        return found

    def save(self) -> None:
        if self._asked != self._known:
            write_whole(self.path, msgspec.json.encode(CachedHashes(self._asked, digest(self._asked))))


class FileState(NamedTuple):
    """Differs after a change of a file, or of the list of files in a directory.

    It holds no inode number: some shared file systems number inodes differently on each machine.
    """

    size: int
    changed_ns: int
    inode_changed_ns: int


def file_state(path: str | Path) -> FileState:
    """Raises UserError if `path` does not exist."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"input {path}: no such file; restore it and rerun to resume") from error
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def refuse_change(path: str | Path, before: FileState) -> None:
    """Raises UserError, naming the file, if it changed."""
    if file_state(path) != before:
        raise UserError(
            f"input {path}: changed since the run began; restore it and rerun to resume, or set another output"
        )
