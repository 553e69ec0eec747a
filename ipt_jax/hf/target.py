"""An output directory that appears whole or not at all.

Guarantees: everything is written to a hidden sibling, which takes the final name at the end; a process that is killed
leaves the old directory as it was. One writer at a time; a full disk or a missing permission is the user's to mend.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ipt_jax.corpus.files import lock_directory, sync_directory, writing
from ipt_jax.corpus.settings import UserError


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


def refuse_foreign(path: Path, ours: bool, what: str) -> None:
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
