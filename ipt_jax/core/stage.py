"""The output directory of a stage: ArrayRecord shards with a manifest, and the loop that makes missing shards.

A stage opens an `Output`, passes one item per shard to `make_shards`, and calls `Output.finish`. Rerunning a stage
keeps the shards that verify and makes the others.

Guarantees:
- A shard with its final name, `NAME-00000-of-00010.array_record`, is complete. It is written under a temporary name,
  closed, reopened, counted, fsynced and renamed, and then its directory is fsynced.
- `manifest.json` lists each shard with counts and SHA-256 and holds its own checksum. `complete` is set by `finish`.
- One writer per directory: `.lock` is held with flock and released when the process ends.
- The number of workers changes no byte.
Does not guarantee: remote file systems. ArrayRecord writes to local disks only.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import msgspec
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.executor import ExecutorName, run_units
from ipt_jax.core.files import TEMPORARY, lock_directory, refuse_foreign, sync_directory, write_whole, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.core.manifest import (
    SCHEMA,
    Extension,
    Inputs,
    Manifest,
    ShardEntry,
    edited,
    is_extension,
    load_manifest,
    refuse_other,
    with_earlier_names,
)
from ipt_jax.core.progress import Progress

PACKED = "group_size:1,zstd:3"  # one record per group, so that each is read and checked by itself
UNPACKED = "group_size:1,uncompressed"  # three times as fast to read: for the loader
Raised = type[BaseException] | None
Item = TypeVar("Item")


@dataclass
class NewShard:
    """A shard while it is written. Its writer adds to the counts; the manifest stores them."""

    path: Path
    records: int = 0
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    side_files: dict[str, str] = field(default_factory=dict)  # SHA-256, by the end of the name

    def side_path(self, ending: str) -> Path:
        """Where to write the side file `NAME-00000-of-00010.ENDING`."""
        return self.path.with_name(f"{self.path.name.removesuffix(TEMPORARY)}.{ending}{TEMPORARY}")


class Output:
    """The one writer of a stage's directory.

    `identity` holds the contents and meaning of the settings, never paths. A directory made with another identity is
    refused, and the error names the field, or the files of `inputs`. Complete shards are kept, temporary files are
    removed. With `extend` other contents are accepted: `extension` is then the manifest that `begin_extension` makes
    the output's own.

    `remake` is for stages that ask no model. Shards and side files are compared with their checksums. A damaged one is
    reported and rebuilt, as are all shards if the manifest was edited. Shard files that the manifest does not list
    are removed. Without `remake` only sizes are compared, and an edited manifest is an error.

    `entries` holds the complete shards by number.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stage: str,
        identity: dict[str, Any],
        shard_name: str,
        remake: bool = False,
        inputs: Inputs | None = None,
        extend: bool = False,
        cure: str = "",
    ):
        self.path, self.shard_name, self._remake = Path(path), shard_name, remake
        self._extend, self._cure = extend, cure
        self.extension: Manifest | None = None
        self.manifest = Manifest(SCHEMA, stage, digest(identity), identity, inputs=inputs or msgspec.UNSET)
        self.entries: dict[int, ShardEntry] = {}

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
        if isinstance(error, UserError | Fault) and not self.entries:
            self._withdraw()
        os.close(self._lock)

    def _withdraw(self) -> None:
        """Removes the directory if an error ended the run before its first shard, unless it holds other files."""
        files = list(self.path.iterdir())
        if all(file.name in (".lock", "manifest.json") or file.name.endswith(TEMPORARY) for file in files):
            for file in files:
                file.unlink(missing_ok=True)
            self.path.rmdir()

    def _resume(self) -> None:
        if (self.path / "manifest.json").exists():
            found = load_manifest(self.path)
            expected = self.manifest
            if self._extend and is_extension(found, expected):
                expected.inputs = with_earlier_names(self.path, found.inputs, expected.inputs)
                self.extension = expected
            else:
                refuse_other(self.path, found, expected, self._cure)
            if found.checksum == found.digest():
                self.manifest = found
                self._keep_complete(found.shards)
            elif self._remake:
                print(f"{self.path / 'manifest.json'}: was edited; all shards are rebuilt", file=sys.stderr)
            else:
                raise UserError(f"{edited(self.path)}, or write to another output")
        else:
            refuse_foreign(self.path)
        for leftover in self.path.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        if self._remake:
            self._remove_unlisted()
        self._save()

    def begin_extension(self, first_shard: int) -> None:
        """Lets the shards from `first_shard` on be of another list of records. The directory is then incomplete."""
        manifest, new = self.manifest, self.extension
        earlier = manifest.extensions if manifest.extensions is not msgspec.UNSET else []
        if first_shard and (not earlier or earlier[-1].first_shard != first_shard):
            manifest.extensions = [*earlier, Extension(first_shard, manifest.fingerprint)]
        if new is not None:
            manifest.fingerprint, manifest.identity, manifest.inputs = new.fingerprint, new.identity, new.inputs
            self.extension = None
        manifest.complete = False
        self._save()

    def _keep_complete(self, entries: list[ShardEntry]) -> None:
        for entry in entries:
            if found := damage(self.path, entry, checksum=self._remake, side_files=self._remake):
                print(f"{found}; it is rebuilt", file=sys.stderr)
                self.manifest.complete = False
            else:
                self.entries[int(entry.name.rsplit("-", 3)[1])] = entry

    def _remove_unlisted(self) -> None:
        """Removes copies of a shard under another number, and a shard that was renamed just before a kill."""
        listed = {entry.name for entry in self.manifest.shards}
        for file in sorted(self.path.glob(f"{self.shard_name}-*.array_record")):
            if file.name not in listed:
                print(f"{file}: not listed in the manifest; it is removed", file=sys.stderr)
                file.unlink()

    def drop(self, index: int) -> None:
        """Removes a shard from the manifest, not its file. The directory is then incomplete."""
        del self.entries[index]
        self.manifest.complete = False
        self._save()

    def temporary(self, index: int) -> Path:
        """Where shard `index` is written before `seal_file`. The name holds this process's id: a worker that survives
        a killed run for a moment never writes into the file of the next run."""
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
    ) -> None:
        """Writes shard `index` of `total` and lists it. `counts` are summed over shards into the manifest."""
        shard = NewShard(self.temporary(index), 0, tokens, Counter(counts), Counter(dropped))
        with writing(self.path):
            shard.records = write_shard(shard.path, records)
        self.seal_file(index, total, shard)

    def seal_file(self, index: int, total: int, shard: NewShard) -> None:
        """Renames a written shard and its side files to their final names and lists the shard."""
        found = count_records(shard.path)
        assert found == shard.records, f"{shard.path}: wrote {shard.records} records, found {found}"
        stem = f"{self.shard_name}-{index:05d}-of-{total:05d}"
        checksum, size = file_digest(shard.path), shard.path.stat().st_size
        counts, dropped = dict(sorted(shard.counts.items())), dict(sorted(shard.dropped.items()))
        side_files = {f"{stem}.{ending}": sha256 for ending, sha256 in shard.side_files.items()}
        name = f"{stem}.array_record"
        with writing(self.path):
            for earlier in self.path.glob(f"{stem}.*"):
                earlier.unlink()
            for ending in shard.side_files:
                os.replace(shard.side_path(ending), self.path / f"{stem}.{ending}")
            os.replace(shard.path, self.path / name)
            sync_directory(self.path)
            self.entries[index] = ShardEntry(name, found, shard.tokens, size, checksum, counts, dropped, side_files)
            self._save()

    def finish(self, summary: dict[str, Any] | None = None) -> Manifest:
        """Marks the stage complete. `summary` is stored in the manifest for later use by the stage."""
        if not self.manifest.complete:
            self.manifest.complete = True
            self.manifest.summary = summary or {}
            self._save()
        return self.manifest

    def refuse_empty(self, what: str, cure: str) -> None:
        """Raises UserError if no shard has a record, and removes the shards: a corrected recipe can then write here."""
        if self.manifest.records:
            return
        dropped = format_counts(self.manifest.dropped)
        for index, entry in list(self.entries.items()):
            for name in (entry.name, *entry.side_files):
                (self.path / name).unlink()
            self.drop(index)
        raise UserError(f"{what} (dropped: {dropped}); {cure}")

    def _save(self) -> None:
        shards = [entry for _, entry in sorted(self.entries.items())]
        manifest = self.manifest
        manifest.shards = shards
        manifest.records = sum(entry.records for entry in shards)
        manifest.tokens = sum(entry.tokens for entry in shards)
        manifest.counts = sum_counts(entry.counts for entry in shards)
        manifest.dropped = sum_counts(entry.dropped for entry in shards)
        manifest.checksum = manifest.digest()
        with writing(self.path):
            write_whole(self.path / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))


# ---- making missing shards

WriteRecords = Callable[[Item, NewShard], Iterator[bytes]]  # yields the records of a shard and fills its counts


class ShardJob(NamedTuple, Generic[Item]):
    """What a worker process needs to write one shard."""

    write: WriteRecords[Item]
    item: Item
    shard: NewShard
    options: str


def make_shards(
    write: WriteRecords[Item],
    work: Sequence[tuple[Output, Sequence[Item]]],
    size: Callable[[Item], float],
    *,
    unit: str,
    label: str,
    workers: int | None = None,
    executor: ExecutorName = "local",
    options: str = PACKED,
) -> None:
    """Makes the shards that are missing: `write` turns item `i` of an output into shard `i` of it.

    `size` is the size of an item in the `unit` of the progress line. `workers` and `executor` are those of `run_units`.
    """
    jobs: list[ShardJob[Item]] = []
    places: list[tuple[Output, int, int]] = []
    for output, items in work:
        for index, item in enumerate(items):
            if index not in output.entries:
                jobs.append(ShardJob(write, item, NewShard(output.temporary(index).absolute()), options))
                places.append((output, index, len(items)))
    if not jobs:
        return
    total = sum(size(item) for _, items in work for item in items)
    missing = sum(size(job.item) for job in jobs)
    shards = sum(len(items) for _, items in work)
    with Progress(total, unit, label, done=total - missing) as progress:
        results = run_units(write_job, jobs, workers=workers, executor=executor)
        for complete, (at, shard) in enumerate(results, start=shards - len(jobs) + 1):
            output, index, count = places[at]
            output.seal_file(index, count, shard)
            progress.advance(size(jobs[at].item), shards=f"{complete:,}/{shards:,}")


def write_job(job: ShardJob[Item]) -> NewShard:
    """Runs in a worker process."""
    with writing(job.shard.path.parent):
        job.shard.records = write_shard(job.shard.path, job.write(job.item, job.shard), job.options)
    return job.shard


# ---- shard files and manifests


def write_shard(path: Path, records: Iterable[bytes], options: str = PACKED) -> int:
    """Writes `records` to `path`, closes and fsyncs it. Returns their number. Raises OSError if the disk is full."""
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
    """Records in a closed ArrayRecord file. Raises OSError if the reader cannot read the file."""
    reader = ArrayRecordReader(str(path))
    if not reader.ok():
        raise OSError(f"{path}: not a complete ArrayRecord file")
    count = reader.num_records()
    reader.close()
    return count


def damage(path: Path, entry: ShardEntry, *, checksum: bool = True, side_files: bool = False) -> str | None:
    """What is wrong with a listed shard: its file and, if its bytes differ, the first unreadable record."""
    for name, sha256 in entry.side_files.items() if side_files else ():
        if not (path / name).is_file():
            return f"{path / name}: listed in the manifest but missing"
        if file_digest(path / name) != sha256:
            return f"{path / name}: its bytes differ from the manifest's checksum"
    file = path / entry.name
    if not file.is_file():
        return f"{file}: listed in the manifest but missing"
    with file.open("rb") as opened:  # raises if the file may not be read: that is not damage
        size = os.fstat(opened.fileno()).st_size
    if size != entry.bytes:
        return f"{file}: {size} bytes, the manifest says {entry.bytes}"
    if checksum and file_digest(file) != entry.sha256:
        return f"{file}: its bytes differ from the manifest's checksum{first_unreadable(file)}"
    return None


def first_unreadable(file: Path) -> str:
    """Names the first record that cannot be read. A damaged byte may belong to no record."""
    reader = ArrayRecordReader(str(file))
    if not reader.ok():
        return ", none of its records can be read"
    count = reader.num_records()
    for record in range(count):
        try:
            reader.read([record])
        except (RuntimeError, IndexError):
            return f", record {record:,} of {count:,} cannot be read"
    return f", but all {count:,} records can be read"


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def format_counts(counts: dict[str, int]) -> str:
    """{'empty_text': 2, 'too_long': 1} -> 'empty_text 2, too_long 1'"""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
