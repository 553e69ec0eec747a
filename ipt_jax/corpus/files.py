"""How outputs are written: whole or not at all, by one writer; what the disk or the path will not have is one line."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipt_jax.corpus.settings import UserError

TEMPORARY = ".tmp"
OWN_FIRST = {".lock", f"manifest.json{TEMPORARY}"}  # what a run killed before its first manifest leaves


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk, a read-only path or a missing permission under `path` into a UserError."""
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        cure = "a file lies there; give a directory" if is_file else "free space or give another path"
        raise UserError(f"output {path}: cannot be written ({error.strerror or error}); {cure}") from error


def refuse_foreign(path: Path) -> None:
    """Raises UserError where other files than a stage's lie in a directory without a manifest."""
    if foreign := sorted({entry.name for entry in path.iterdir()} - OWN_FIRST):
        raise UserError(f"output {path}: holds {foreign[0]!r} but no manifest of this project; give an empty directory")


def lock_directory(path: Path) -> int:
    """Takes `path/.lock` until the returned descriptor is closed or the process dies. Raises UserError when held."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"output {path}: another run is writing here; wait for it or give another output") from None
    return descriptor


def write_whole(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` so that a reader sees the old or the new bytes, never a part."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
