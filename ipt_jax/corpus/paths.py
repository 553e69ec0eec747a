"""Files of inputs, local or remote: which there are, opening them, decompression, their states and hashes.

A remote path is a URL that fsspec knows (`s3://`, `gs://`, `hf://`, `https://`; extra `cloud`). Remote files are
listed, and read in ranges. Nothing is copied. The contents of a remote file are identified by the tag that its store
gives them (ETag, MD5), or by their SHA-256 if it gives none.
"""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from backports import zstd

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import DigestOf, FileState, digest, file_digest, file_state, refuse_change

OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": zstd.open, ".xz": lzma.open, ".bz2": bz2.open}
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError, lzma.LZMAError)
REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
WILDCARD = re.compile(r"[*?[]")
WEB = ("http://", "https://")  # stores without a listing
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "sha256", "blob_id", "checksum")
LFS = b"version https://git-lfs"


def is_remote(path: str) -> bool:
    return REMOTE.match(path) is not None


def file_name(path: str) -> str:
    """The last part of a path, without the query of a URL."""
    return (path.partition("?")[0] if path.startswith(WEB) else path).rstrip("/").rpartition("/")[2]


def compression(path: str) -> str:
    """'.gz' for 'a.jsonl.gz', '' for a file that is not compressed."""
    ending = os.path.splitext(file_name(path))[1].lower()
    return ending if ending in OPEN else ""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Converts an error of the disk or of a remote store to a UserError that names the input."""
    try:
        yield
    except (UserError, AssertionError, *DAMAGED):
        raise
    except OSError as error:
        cure = "address, credentials and network" if is_remote(path) else "permissions and the disk"
        raise UserError(f"input {path}: cannot be read ({error.strerror or error}); check its {cure}") from error
    except Exception as error:  # stores raise errors of their own clients
        if not is_remote(path):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"input {path}: cannot be read ({reason}); check its address, credentials and network"
        ) from error


def _store(path: str) -> tuple[Any, str]:
    """The file system of a URL and its path in there."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(f"input {path}: needs a package ({error}); run launch/setup.sh cloud, or install it") from error
    except ValueError as error:
        raise UserError(f"input {path}: {error}; use a local path, s3://, gs://, hf:// or https://") from error


# ---- listing


class Listing:
    """What a path names. `kind` is file, folder or glob; `names` are relative to `root`, '' for a single file itself.

    Names are sorted, files of a folder before those of its subfolders. Hidden entries and links to a parent directory
    are skipped. A file that several links lead to is listed once. `stop`: folders that count as one file.
    """

    def __init__(self, path: str, stop: Callable[[Path], object]):
        self.path = path
        with reading(path):
            self.kind, self.root, self.names = _list_remote(path) if is_remote(path) else _list_local(path, stop)

    def full(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if self.root not in ("", ".") else name


def _list_local(path: str, stop: Callable[[Path], object]) -> tuple[str, str, list[str]]:
    found = Path(path)
    if found.is_file() or (found.is_dir() and stop(found)):
        return "file", os.path.dirname(path), [found.name]
    if found.is_dir():
        return "folder", path, _once(path, [str(one.relative_to(found)) for one in _walk(found, stop)])
    root = _fixed_part(path)
    names = sorted(os.path.relpath(one, root or ".") for one in glob.glob(path, recursive=True))
    return (
        "glob",
        root,
        _once(root, [name for name in names if not Path(root, name).is_dir() or stop(Path(root, name))]),
    )


def _fixed_part(path: str) -> str:
    """The folders of a glob before its first wildcard."""
    wildcard = WILDCARD.search(path)
    return os.path.dirname(path[: wildcard.start()] if wildcard else path)


def _once(root: str, names: list[str]) -> list[str]:
    once: dict[Path, str] = {}
    for name in names:
        once.setdefault(Path(root, name).resolve(), name)
    return list(once.values())


def _walk(folder: Path, stop: Callable[[Path], object]) -> Iterator[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    yield from (entry for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir() and stop(entry):
            yield entry
        elif entry.is_dir() and entry.resolve() not in (above.resolve() for above in entry.parents):
            yield from _walk(entry, stop)


def _list_remote(path: str) -> tuple[str, str, list[str]]:
    if path.startswith(WEB):
        return "file", path.rpartition("/")[0], [path.rpartition("/")[2]]
    store, inner = _store(path)
    store.invalidate_cache()
    prefix = path[: path.index("://") + 3]
    if WILDCARD.search(inner):
        kind, root, found = "glob", _fixed_part(inner), store.glob(inner)
    elif store.isfile(inner):
        kind, root, found = "file", inner.rpartition("/")[0], [inner]
    else:
        kind, root, found = "folder", inner, store.find(inner)
    bare = root.strip("/")
    names = [one.strip("/").removeprefix(bare).strip("/") for one in found if not str(one).endswith("/")]
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    return kind, prefix + root, sorted(shown, key=lambda name: (name.split("/")[:-1], name))


# ---- opening


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    with reading(path):
        store, inner = _store(path)
        return bool(store.isfile(inner))


def file_size(path: str) -> int:
    with reading(path):
        if not is_remote(path):
            return os.stat(path).st_size
        store, inner = _store(path)
        return int(store.size(inner) or 0)


def open_file(path: str) -> IO[bytes]:
    """The bytes of a file, seekable."""
    if not is_remote(path):
        return Path(path).open("rb")
    store, inner = _store(path)
    return store.open(inner, "rb")  # type: ignore[no-any-return]


@contextmanager
def open_plain(path: str) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file."""
    with open_file(path) as file:
        if not (ending := compression(path)):
            yield file
            return
        with OPEN[ending](file, "rb") as plain:
            yield plain


def read_plain(path: str) -> io.BytesIO:
    """The decompressed bytes of a file, in memory."""
    with open_plain(path) as file:
        return io.BytesIO(file.read())


# ---- states and hashes


def state_of(path: str) -> FileState:
    """The state of a file. For a remote one the hash of its tag, or of its times, takes the place of the times."""
    if not is_remote(path):
        return file_state(path)
    with reading(path):
        store, inner = _store(path)
        store.invalidate_cache()
        facts = store.info(inner)
    seen = {name: str(facts[name]) for name in (*TAGS, "LastModified", "updated", "mtime", "created") if name in facts}
    return FileState(int(facts.get("size") or 0), int(digest(seen)[:15], 16), 0)


def refuse_changed(path: str, before: FileState) -> None:
    """Raises UserError, naming the file, if it changed."""
    if not is_remote(path):
        refuse_change(path, before)
    elif state_of(path) != before:
        raise UserError(
            f"input {path}: changed since the run began; restore it and rerun to resume, or set another output"
        )


def contents_digest(path: str, digest_of: DigestOf = file_digest) -> str:
    """SHA-256 (hex) of a local file, or of the tag of a remote one."""
    with reading(path):
        if not is_remote(path):
            return digest_of(Path(path))
        store, inner = _store(path)
        facts = store.info(inner)
        for name in TAGS:
            if facts.get(name):
                return digest([name, str(facts[name])])
        with open_file(path) as file:
            return file_digest_of(file)


def file_digest_of(file: IO[bytes]) -> str:
    import hashlib

    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
