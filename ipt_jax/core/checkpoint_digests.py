"""Digests of all bytes of a checkpoint, in `digests.json` inside its directory.

Guarantees: when `write_digests` returns, every file and folder of the directory is on disk and listed with its size and
the SHA-256 of each chunk. `damage` names the first file that is missing, foreign, truncated or changed, the list itself
included. Files are read in parallel by threads. Imports no JAX.
Does not guarantee: bytes that changed in memory before they were written have the digest of the changed bytes. A
checkpoint of an earlier version has no list, and only its folders are checked.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import TEMPORARY, sync_directory, write_whole
from ipt_jax.core.hashing import digest

DIGESTS = "digests.json"
CHUNK = 64 * 2**20  # bytes a thread hashes at a time: one big file is read by several threads
BUFFER = 2**20
THREADS = min(16, 4 * (os.cpu_count() or 1))
RESUMED = ("params", "optimizer", "record")  # the folders that a resume needs
LOADED = ("params",)  # and that loading a model needs


class FileDigest(msgspec.Struct):
    bytes: int
    sha256: list[str]  # of each chunk, in order


class Digests(msgspec.Struct):
    chunk_bytes: int
    files: dict[str, FileDigest]  # by path relative to the checkpoint's directory
    checksum: str = ""

    def digest(self) -> str:
        """Digest of all but the checksum."""
        return digest(msgspec.to_builtins(msgspec.structs.replace(self, checksum="")))


class Skipped(NamedTuple):
    """A checkpoint that cannot be used."""

    path: Path
    damage: str


class Newest(NamedTuple):
    """The newest checkpoint that verifies, None without one, and the later ones that do not."""

    path: Path | None
    skipped: list[Skipped]


def write_digests(directory: Path) -> int:
    """Writes `digests.json` and syncs the directory to disk; returns the bytes listed."""
    names = sorted(_files(directory))
    sizes = {name: (directory / name).stat().st_size for name in names}
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda part: _hash(directory / part[0], part[1], CHUNK), _parts(sizes, CHUNK)))
        list(pool.map(lambda name: _sync_file(directory / name), names))
    files = {name: FileDigest(sizes[name], []) for name in names}
    for (name, _), found in zip(_parts(sizes, CHUNK), hashes, strict=True):
        files[name].sha256.append(found)
    listed = Digests(CHUNK, files)
    listed.checksum = listed.digest()
    write_whole(directory / DIGESTS, msgspec.json.format(msgspec.json.encode(listed), indent=1))
    for folder, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(folder))
    return sum(sizes.values())


def damage(directory: Path, needed: tuple[str, ...] = RESUMED) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when nothing is. `needed` are folders it must have."""
    try:
        if not directory.is_dir():
            return "is not a directory"
        present = _files(directory)
        if not present:
            return "is an empty directory"
        if DIGESTS not in present:
            return _damage_without_digests(directory, present, needed)
        listed = _read(directory)
        wrong = _missing(present, needed) or _wrong_names(listed, present) or _wrong_bytes(directory, listed)
        return wrong or _wrong_step(directory, present)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)


def unverified(directory: Path) -> bool:
    """Whether an earlier version wrote the checkpoint, so that its bytes have no digests."""
    return not (directory / DIGESTS).is_file()


def newest_verified(checkpoints: Path, needed: tuple[str, ...] = RESUMED) -> Newest:
    """Reads the steps' directories from the newest on, until one verifies."""
    skipped: list[Skipped] = []
    for step in numbered(checkpoints):
        found = damage(step, needed)
        if found is None:
            return Newest(step, skipped)
        skipped.append(Skipped(step, found))
    return Newest(None, skipped)


def numbered(checkpoints: Path) -> list[Path]:
    """What bears a step's number, the latest first. A save under way has another name."""
    entries = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    steps = [entry for entry in entries if entry.name.isascii() and entry.name.isdigit()]
    return sorted(steps, key=lambda step: -int(step.name))


def refuse_all(skipped: list[Skipped]) -> UserError:
    """The error of a run none of whose checkpoints verifies."""
    path, found = skipped[0]
    return UserError(
        f"{path.parent}: none of {len(skipped)} checkpoints can be used; the newest, {path.name}: {found}; "
        "copy a checkpoint from a backup, or move this directory away to train from step 0"
    )


def _damage_without_digests(directory: Path, present: set[str], needed: tuple[str, ...]) -> str | None:
    """Since checkpoints have digests, `record.json` says so: a list that was removed is missed."""
    if missing := _missing(present, needed):
        return f"{missing}, so is {DIGESTS}"
    if "record/record.json" not in present:
        return "record/record.json is missing" if "record" in needed else None
    if _recorded(directory).digests:
        return f"{DIGESTS} is missing"
    return _wrong_step(directory, present)


class _Recorded(msgspec.Struct):
    """The fields of a checkpoint's record that matter here."""

    step: int
    digests: bool = False


def _recorded(directory: Path) -> _Recorded:
    try:
        return msgspec.json.decode((directory / "record" / "record.json").read_bytes(), type=_Recorded)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"record/record.json is damaged ({error})") from error


def _wrong_step(directory: Path, present: set[str]) -> str | None:
    """A copy of a checkpoint under another number."""
    if not directory.name.isdigit() or "record/record.json" not in present:
        return None
    step = _recorded(directory).step
    return None if step == int(directory.name) else f"record/record.json is that of step {step}"


def _missing(present: set[str], needed: tuple[str, ...]) -> str | None:
    folders = {name.split("/")[0] for name in present}
    missing = [f"{item}/" for item in needed if item not in folders]
    missing += ["model.json"] if "model.json" not in present else []
    return f"{missing[0]} is missing" if missing else None


def _read(directory: Path) -> Digests:
    """Raises ValueError when the list is not as it was written."""
    try:
        listed = msgspec.json.decode((directory / DIGESTS).read_bytes(), type=Digests)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{DIGESTS} is damaged ({error})") from error
    if listed.checksum != listed.digest():
        raise ValueError(f"{DIGESTS} is damaged (it does not match its own checksum)")
    return listed


def _wrong_names(listed: Digests, present: set[str]) -> str | None:
    missing = sorted(listed.files.keys() - present)
    if missing:
        return f"{missing[0]} is missing"
    extra = sorted(present - listed.files.keys() - {DIGESTS})
    return f"{extra[0]} is not listed in {DIGESTS}" if extra else None


def _wrong_bytes(directory: Path, listed: Digests) -> str | None:
    sizes = {name: file.bytes for name, file in listed.files.items()}
    for name, wanted in sizes.items():
        found = (directory / name).lstat().st_size
        if found != wanted:
            return f"{name} has {found:,} bytes, {DIGESTS} lists {wanted:,}"
    wanted_hashes = itertools.chain.from_iterable(file.sha256 for file in listed.files.values())
    parts = _parts(sizes, listed.chunk_bytes)
    pool = ThreadPoolExecutor(THREADS)
    try:
        found_hashes = pool.map(lambda part: _hash_or_reason(directory / part[0], part[1], listed.chunk_bytes), parts)
        for (name, at), wanted_hash, found_hash in zip(parts, wanted_hashes, found_hashes, strict=True):
            if found_hash != wanted_hash:
                why = "its bytes do not match" if len(found_hash) == len(wanted_hash) else f"{found_hash}; see"
                place = f" from byte {at:,} on" if at else ""
                return f"{name} is damaged{place} ({why} {DIGESTS})"
        return None
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(sizes: dict[str, int], chunk: int) -> list[tuple[str, int]]:
    """(file, first byte) of each chunk; an empty file has one."""
    return [(name, at) for name, size in sizes.items() for at in range(0, max(size, 1), chunk)]


def _hash_or_reason(file: Path, at: int, chunk: int) -> str:
    """A digest, or why the bytes cannot be read: a bad sector is damage, too."""
    try:
        return _hash(file, at, chunk)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _hash(path: Path, at: int, chunk: int) -> str:
    """SHA-256 (hex) of the chunk that begins at byte `at`. hashlib computes without Python's lock."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER))
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while chunk and (count := file.readinto(buffer[: min(BUFFER, chunk)])):
            found.update(buffer[:count])
            chunk -= count
    return found.hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _files(directory: Path) -> set[str]:
    """Names of the files below `directory`, relative to it; what a killed writer of the list left is none."""
    return set(_walk(directory)) - {DIGESTS + TEMPORARY}


def _walk(directory: Path) -> Iterator[str]:
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), directory)


def _raise(error: OSError) -> None:
    raise error
