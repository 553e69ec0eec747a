"""Directories of ArrayRecord shards with a manifest: written whole or not at all, read with checks.

A shard is written under a temporary name, closed, opened again and counted, fsynced, renamed to
`NAME-00000-of-00010.array_record`, and its folder fsynced: what has its final name is whole. `manifest.json` lists each
shard with counts and SHA-256, and holds a checksum of itself; `complete` turns true when the stage has finished. Damage
is named by file and, where the bytes tell, by record. One writer a directory: `.lock` is held with flock and dies with
its process. ArrayRecord writes to local disks only.
"""

import bisect
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import TEMPORARY, lock_directory, refuse_foreign, sync_directory, write_whole, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.corpus.records import Document, decode

SCHEMA = 1
PACKED = "group_size:1,zstd:3"  # one record a group: each is read and checked alone
UNPACKED = "group_size:1,uncompressed"  # three times as fast to read: for what a loader reads in a run
READ_RECORDS = 1024  # records a batched read when streaming; single reads are forty times slower
MEND = "delete this file, then run its stage again"  # what a model wrote is not compared with its checksum at a start
Raised = type[BaseException] | None


class ShardEntry(msgspec.Struct):
    name: str
    records: int
    tokens: int
    bytes: int
    sha256: str
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    sides: dict[str, str] = {}  # SHA-256 of the stage's own files beside the shard, by name


class Manifest(msgspec.Struct):
    schema: int
    stage: str
    fingerprint: str
    identity: dict[str, Any]
    complete: bool = False
    records: int = 0
    tokens: int = 0
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    summary: dict[str, Any] = {}
    shards: list[ShardEntry] = []
    checksum: str = ""

    def digest(self) -> str:
        """Digest of all but the checksum."""
        return digest(msgspec.to_builtins(msgspec.structs.replace(self, checksum="")))


class Output:
    """The one writer of a stage's directory.

    `identity` holds the contents and meaning of the run's settings, never paths: a directory made with another identity
    is refused, naming the field. Shards that are whole are kept; what was left half-written is removed. `remake`, for
    stages that ask no model: shards are compared with their checksums, and one that is damaged is named and made again;
    so are all where the manifest was edited, and files that bear a shard's name without being one go. Elsewhere sizes
    alone are compared, and an edited manifest is an error.
    """

    def __init__(
        self, path: str | Path, *, stage: str, identity: dict[str, Any], shard_name: str, remake: bool = False
    ):
        self.path, self.shard_name, self._remake = Path(path), shard_name, remake
        self.manifest = Manifest(SCHEMA, stage, digest(identity), identity)
        self._entries: dict[int, ShardEntry] = {}

    def __enter__(self) -> Self:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.path)
            try:
                self._resume()
            except BaseException:
                os.close(self._lock)
                raise
        return self

    def __exit__(self, kind: Raised, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UserError) and not self._entries:
            self._withdraw()
        os.close(self._lock)

    def _withdraw(self) -> None:
        """Leaves no trace of a run that a mistake ended before its first shard, unless other work lies there."""
        files = list(self.path.iterdir())
        if all(file.name in (".lock", "manifest.json") or file.name.endswith(TEMPORARY) for file in files):
            for file in files:
                file.unlink(missing_ok=True)
            self.path.rmdir()

    def _resume(self) -> None:
        if (self.path / "manifest.json").exists():
            found = load_manifest(self.path)
            refuse_other(self.path, found, self.manifest)
            if found.checksum == found.digest():
                self.manifest = found
                self._keep_whole(found.shards)
            elif self._remake:
                print(f"{self.path / 'manifest.json'}: was edited; all shards are made again", file=sys.stderr)
            else:
                raise UserError(f"{_edited(self.path)}; to begin anew, give another output")
        else:
            refuse_foreign(self.path)
        for leftover in self.path.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        if self._remake:
            self._remove_unlisted()
        self._save()

    def _keep_whole(self, entries: list[ShardEntry]) -> None:
        for entry in entries:
            found = damage(self.path, entry, checksum=self._remake)
            if found is None:
                self._entries[_index(entry.name)] = entry
            elif (self.path / entry.name).is_file():
                print(f"{found}; it is made again", file=sys.stderr)
        if len(self._entries) < len(entries):
            self.manifest.complete = False

    def _remove_unlisted(self) -> None:
        """A copy of a shard under another number, or one that was named just before a kill."""
        listed = {entry.name for entry in self._entries.values()}
        for file in sorted(self.path.glob(f"{self.shard_name}-*.array_record")):
            if file.name not in listed:
                print(f"{file}: not listed in the manifest; it is removed", file=sys.stderr)
                file.unlink()

    def drop(self, index: int) -> None:
        """Takes a shard off the list, its file stays; the directory is complete no more."""
        del self._entries[index]
        self.manifest.complete = False
        self._save()

    @property
    def complete(self) -> bool:
        return self.manifest.complete

    @property
    def held(self) -> list[int]:
        """The numbers of the shards that are whole."""
        return sorted(self._entries)

    def has(self, index: int) -> bool:
        return index in self._entries

    def entry(self, index: int) -> ShardEntry:
        return self._entries[index]

    def temporary(self, index: int) -> Path:
        """Where a worker process may write shard `index` with `write_shard` before `seal_file`.

        The name is this run's own: a worker that outlives a killed run by a moment never writes into the next one's.
        """
        return self.path / f"{self.shard_name}-{index:05d}.{os.getpid()}{TEMPORARY}"

    def seal(
        self,
        index: int,
        total: int,
        records: Iterable[bytes],
        *,
        tokens: int = 0,
        counts: dict[str, int] | None = None,
        dropped: dict[str, int] | None = None,
    ) -> ShardEntry:
        """Writes shard `index` of `total` and lists it. `counts` are summed over shards into the manifest."""
        with writing(self.path):
            written = write_shard(self.temporary(index), records)
        return self.seal_file(index, total, written, tokens=tokens, counts=counts, dropped=dropped)

    def seal_file(
        self,
        index: int,
        total: int,
        records: int,
        *,
        tokens: int = 0,
        counts: dict[str, int] | None = None,
        dropped: dict[str, int] | None = None,
        sides: dict[str, str] | None = None,
    ) -> ShardEntry:
        """Gives the file at `temporary(index)`, of `records` records, its final name."""
        temporary = self.temporary(index)
        found = count_records(temporary)
        assert found == records, f"{temporary}: wrote {records} records, found {found}"
        name = f"{self.shard_name}-{index:05d}-of-{total:05d}.array_record"
        checksum, size = file_digest(temporary), temporary.stat().st_size
        entry = ShardEntry(name, records, tokens, size, checksum, counts or {}, dropped or {}, sides or {})
        with writing(self.path):
            os.replace(temporary, self.path / name)
            sync_directory(self.path)
            self._entries[index] = entry
            self._save()
        return entry

    def finish(self, summary: dict[str, Any] | None = None) -> Manifest:
        """Marks the stage complete. `summary` is kept in the manifest for the stage's own later use."""
        self.manifest.complete = True
        self.manifest.summary = summary or {}
        self._save()
        return self.manifest

    def _save(self) -> None:
        shards = [entry for _, entry in sorted(self._entries.items())]
        manifest = self.manifest
        manifest.shards = shards
        manifest.records = sum(entry.records for entry in shards)
        manifest.tokens = sum(entry.tokens for entry in shards)
        manifest.counts = _sum(entry.counts for entry in shards)
        manifest.dropped = _sum(entry.dropped for entry in shards)
        manifest.checksum = manifest.digest()
        with writing(self.path):
            write_whole(self.path / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def write_shard(path: Path, records: Iterable[bytes], options: str = PACKED) -> int:
    """Writes `records` to `path`, closed and fsynced; returns their number. Raises OSError when the disk is full."""
    writer = ArrayRecordWriter(str(path), options)
    count = 0
    try:
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # array_record reports a failed write this way
            raise OSError(str(error)) from error
        raise
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return count


def count_records(path: Path) -> int:
    """Records in a closed ArrayRecord file. Raises OSError where the reader finds the file broken."""
    reader = ArrayRecordReader(str(path))
    if not reader.ok():
        raise OSError(f"{path}: not a whole ArrayRecord file")
    count = reader.num_records()
    reader.close()
    return count


def refuse_other(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises UserError, naming the field, when a directory was made by another stage or with other settings."""
    if found.stage != wanted.stage:
        raise UserError(f"output {path}: made by stage {found.stage!r}, not {wanted.stage!r}; give another output")
    if found.fingerprint == wanted.fingerprint:
        return
    before, now = _flat(found.identity), _flat(wanted.identity)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    field = changed[0] if changed else "settings"
    raise UserError(
        f"output {path}: made with {field}={before.get(field)!r}, now {now.get(field)!r}; "
        "give another output, or delete this one"
    )


def read_manifest(path: str | Path, stage: str | None = None) -> Manifest:
    """The manifest of a finished directory. Raises UserError when it is absent, unfinished or of another stage."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; run the stage that makes it first")
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: no manifest.json; give a directory that a stage of this project wrote")
    manifest = load_manifest(path)
    if manifest.checksum != manifest.digest():
        raise UserError(f"{_edited(path)}; or run stage {manifest.stage!r} again, which mends it or says why not")
    if stage is not None and manifest.stage != stage:
        raise UserError(f"{path}: made by stage {manifest.stage!r}, expected {stage!r}; give that stage's output")
    if not manifest.complete:
        raise UserError(f"{path}: its stage {manifest.stage!r} has not finished; run it again to resume")
    return manifest


def load_manifest(path: Path) -> Manifest:
    """The manifest; whether its checksum fits is for the caller to see."""
    try:
        manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        cure = "put a copy back; without one, run the stage with another output: nothing else says what is whole here"
        raise UserError(f"{path / 'manifest.json'}: damaged ({error}); {cure}") from error
    if manifest.schema != SCHEMA:
        raise UserError(
            f"{path / 'manifest.json'}: schema {manifest.schema}, this version reads {SCHEMA}; make it again"
        )
    return manifest


def _edited(path: Path) -> str:
    return f"{path / 'manifest.json'}: was edited (its checksum does not fit); undo the edit or put a copy back"


class Shards:
    """Random and streaming access to the records of a finished directory, in shard order.

    `verify` compares each file's size and SHA-256 with the manifest first; a mismatch is a UserError naming the file.
    """

    def __init__(self, path: str | Path, stage: str | None = None, *, verify: bool = True):
        self.path = Path(path)
        self.manifest = read_manifest(self.path, stage)
        self.paths = [self.path / entry.name for entry in self.manifest.shards]
        self._readers: dict[int, ArrayRecordReader] = {}
        self._ends: list[int] = []
        for entry in self.manifest.shards:
            verify_shard(self.path, entry, checksum=verify)
            self._ends.append(entry.records + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[bytes]:
        """Records by global index, in the order asked, one batched read a shard."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            shard = self._shard_of(index)
            wanted.setdefault(shard, []).append((place, index - (self._ends[shard - 1] if shard else 0)))
        records: list[bytes] = [b""] * len(indices)
        for shard, places in wanted.items():
            for (place, _), record in zip(places, self.read(shard, [local for _, local in places]), strict=True):
                records[place] = record
        return records

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        return bisect.bisect_right(self._ends, index)

    def read(self, shard: int, indices: list[int]) -> list[bytes]:
        """Records of one shard by index within it. A damaged chunk is a UserError naming the file."""
        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(str(self.paths[shard]))
        try:
            return self._readers[shard].read(indices)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{self.paths[shard]}: damaged{_first_unreadable(self.paths[shard])} ({error}); {MEND}"
            ) from error

    def __iter__(self) -> Iterator[bytes]:
        for shard in range(len(self.paths)):
            yield from self.stream(shard)

    def stream(self, shard: int) -> Iterator[bytes]:
        """The records of one shard in order."""
        records = self.manifest.shards[shard].records
        for start in range(0, records, READ_RECORDS):
            yield from self.read(shard, list(range(start, min(start + READ_RECORDS, records))))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # readers do not travel between processes


def read_shard(path: Path) -> Iterator[bytes]:
    """The records of one shard's file in order, whether or not its directory is finished."""
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    for start in range(0, count, READ_RECORDS):
        yield from reader.read(start, min(start + READ_RECORDS, count))
    reader.close()


def verify_shard(path: Path, entry: ShardEntry, *, checksum: bool) -> None:
    """Raises UserError, naming the file, when a listed shard is absent, of another size, or of other bytes."""
    if found := damage(path, entry, checksum=checksum):
        raise UserError(f"{found}; {MEND}" if (path / entry.name).is_file() else f"{found}; run its stage again")


def damage(path: Path, entry: ShardEntry, *, checksum: bool = True) -> str | None:
    """What is wrong with a listed shard, by file and, where its bytes differ, by record."""
    file = path / entry.name
    if not file.is_file():
        return f"{file}: listed in the manifest but absent"
    with file.open("rb") as opened:  # where it may not be read, that is said, no damage
        size = os.fstat(opened.fileno()).st_size
    if size != entry.bytes:
        return f"{file}: {size} bytes where the manifest says {entry.bytes}"
    if checksum and file_digest(file) != entry.sha256:
        return f"{file}: its bytes differ from the manifest's checksum{_first_unreadable(file)}"
    return None


def _first_unreadable(file: Path) -> str:
    """Which record is the first that cannot be read. Some bytes of a shard belong to none."""
    reader = ArrayRecordReader(str(file))
    if not reader.ok():
        return ", none of its records can be read"
    count = reader.num_records()
    for record in range(count):
        try:
            reader.read([record])
        except (RuntimeError, IndexError):
            return f", record {record:,} of {count:,} cannot be read"
    return f", though all {count:,} records can be read"


def read_documents(path: str | Path) -> Iterator[Document]:
    """Iterates over the Documents of a stage's output directory."""
    for record in Shards(path):
        yield decode(record, Document)


def _index(name: str) -> int:
    match = re.fullmatch(r".+-(\d{5,})-of-\d{5,}\.array_record", name)
    assert match, name
    return int(match.group(1))


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
        return {key: inner for part in parts for key, inner in part.items()}
    if isinstance(value, list) and value:
        parts = [_flat(inner, f"{prefix}.{index}") for index, inner in enumerate(value)]
        return {key: inner for part in parts for key, inner in part.items()}
    return {prefix: value}
