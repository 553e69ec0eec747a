"""Atomic, single-writer file output. Disk and path errors are reported as a one-line UserError."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipt_jax.core.errors import UserError

TEMPORARY = ".tmp"
OWN_FIRST = {".lock", f"manifest.json{TEMPORARY}"}  # files of a run that was killed before its first manifest


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts a full disk, a read-only path or a missing permission under `path` to a UserError."""
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        cure = "this is a file; set a directory" if is_file else "free space or set another path"
        raise UserError(f"output {path}: cannot be written ({error.strerror or error}); {cure}") from error


def refuse_foreign(path: Path) -> None:
    """Raises UserError if a directory without a manifest holds files of another origin."""
    if foreign := sorted({entry.name for entry in path.iterdir()} - OWN_FIRST):
        raise UserError(f"output {path}: holds {foreign[0]!r} but no manifest of this project; set an empty directory")


def lock_directory(path: Path) -> int:
    """Locks `path/.lock` until the returned descriptor is closed or the process ends. Raises UserError if locked."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"output {path}: another run is writing here; wait for it or set another output") from None
    return descriptor


def write_whole(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` atomically: a reader sees the old or the new bytes."""
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


@contextmanager
def whole_directory(path: Path, size: int) -> Iterator[Path]:
    """A hidden sibling of `path` to write into. It replaces `path` if the block succeeds, and is removed if it fails.

    `size` is the number of bytes that will be written. Raises UserError at once if the disk cannot hold them. After a
    kill the old directory is unchanged.
    """
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    with writing(path):
        temporary.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(temporary)
        try:
            for entry in temporary.iterdir():
                if entry.name != ".lock":
                    _remove(entry)
            _remove(old)
            if size > (free := shutil.disk_usage(temporary).free):
                raise UserError(
                    f"output {path}: needs {size / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left; "
                    "free space or set another path"
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
    """Raises UserError if `path` holds anything but an earlier `what`."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not ours):
        raise UserError(f"output {path}: exists and is not an {what} of this model; set another path or remove it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Flushes every file to the disk, then the directory."""
    for entry in directory.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
