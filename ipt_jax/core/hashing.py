"""Digests of files that were hashed before, so that a restart does not read a corpus once more.

A digest stands for a file of the same name, inode, size and times of change (of its bytes and of its inode: no program
can set the latter back). A file that changed within the last seconds is hashed each time, because a further change may
leave the same times. What is kept holds a checksum of itself; where it does not fit, every file is hashed again.
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


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


DigestOf = Callable[[Path], str]  # hashes a file; `core.hashing.FileHashCache` spares what it hashed before


def directory_digest(paths: list[Path], digest_of: DigestOf = file_digest) -> str:
    """SHA-256 (hex) over the names and bytes of the files `paths`, whatever folder they lie in."""
    return digest({path.name: digest_of(path) for path in paths})


SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use ticks every two seconds


class CachedHashes(msgspec.Struct):
    digests: dict[str, str]
    checksum: str


class FileHashCache:
    """Called with a path, the SHA-256 (hex) of its bytes; `save` keeps for the next process what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = read_cached_hashes(path)
        self._asked: dict[str, str] = {}

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
    """What a change of a file, or of the list of files in a directory, changes. Not the inode's number: some file
    systems that machines share number anew on each of them, and whoever replaces a file sets its times."""

    size: int
    changed_ns: int
    inode_changed_ns: int


def file_state(path: str | Path) -> FileState:
    """Raises UserError where nothing lies at `path`."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"input {path}: no such file; put it back, and run again to go on") from error
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def refuse_change(path: str | Path, before: FileState) -> None:
    """Raises UserError, naming the file, unless it is as it was."""
    if file_state(path) != before:
        raise UserError(
            f"input {path}: changed since the run began; put it back as it was and run again to go on, or give another "
            "output"
        )


def read_cached_hashes(path: Path) -> dict[str, str]:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=CachedHashes)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return kept.digests if kept.checksum == digest(kept.digests) else {}
