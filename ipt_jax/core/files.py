"""How outputs are written: whole or not at all, by one writer; what the disk or the path will not have is one line.

An output directory that appears whole or not at all.

Guarantees: everything is written to a hidden sibling, which takes the final name at the end; a process that is killed
leaves the old directory as it was. One writer at a time; a full disk or a missing permission is the user's to mend.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipt_jax.core.errors import UserError

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


@contextlib.contextmanager
def whole_directory(path: Path, size: int) -> Iterator[Path]:
    """The directory to write into; it replaces `path` when the block ends well, and vanishes when it does not.

    `size` is what will be written, in bytes: a disk that cannot hold it is told before hours of writing.
    """
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    with writing(path):
        temporary.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(temporary)
        try:
            _clear(temporary, keep=".lock")
            _clear(old)
            if size > (free := shutil.disk_usage(temporary).free):
                raise UserError(
                    f"output {path}: needs {size / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left; "
                    "free space or give another path"
                )
            yield temporary
            (temporary / ".lock").unlink()
            _sync(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync_directory(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def refuse_unrelated(path: Path, ours: bool, what: str) -> None:
    """Raises UserError where `path` holds something else than an earlier `what`."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not ours):
        raise UserError(f"output {path}: exists and is no {what} of this model; give another path or remove it")


def _clear(directory: Path, keep: str = "") -> None:
    for entry in directory.iterdir() if directory.is_dir() else ():
        if entry.name == keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(directory: Path) -> None:
    """Bytes reach the disk before the name does."""
    for entry in directory.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
