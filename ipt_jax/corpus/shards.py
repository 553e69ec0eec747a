"""Reads the directories of ArrayRecord shards that `ipt_jax.core.stage` writes.

Guarantees: sizes and, with `verify`, checksums are compared with the manifest before the first record. Damage is an
error that names the file and, where possible, the record.
"""

import bisect
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import Manifest, edited, load_manifest
from ipt_jax.core.stage import damage, first_unreadable
from ipt_jax.corpus.records import Document, decode

READ_RECORDS = 1024  # records per batched read when streaming; single reads are forty times slower
REMAKE = "delete this file, then rerun its stage"  # a stage with a model does not compare checksums when it starts


def read_manifest(path: str | Path, stage: str | None = None) -> Manifest:
    """The manifest of a finished directory. Raises UserError if it is missing, unfinished or of another stage."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; run the stage that makes it first")
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: no manifest.json; set a directory that a stage of this project wrote")
    manifest = load_manifest(path)
    if manifest.checksum != manifest.digest():
        raise UserError(f"{edited(path)}, or rerun stage {manifest.stage!r}")
    if stage is not None and manifest.stage != stage:
        raise UserError(f"{path}: made by stage {manifest.stage!r}, expected {stage!r}; set the output of that stage")
    if not manifest.complete:
        raise UserError(f"{path}: its stage {manifest.stage!r} has not finished; rerun it to resume")
    return manifest


class Shards:
    """Random and streaming access to the records of a finished directory, in shard order.

    `verify` compares the SHA-256 of each file with the manifest first. A mismatch is a UserError that names the file.
    """

    def __init__(self, path: str | Path, stage: str | None = None, *, verify: bool = True):
        self.path = Path(path)
        self.manifest = read_manifest(self.path, stage)
        self.paths = [self.path / entry.name for entry in self.manifest.shards]
        self._ends = list(accumulate(entry.records for entry in self.manifest.shards))
        self._readers: dict[int, ArrayRecordReader] = {}
        for entry, file in zip(self.manifest.shards, self.paths, strict=True):
            if found := damage(self.path, entry, checksum=verify):
                raise UserError(f"{found}; {REMAKE if file.is_file() else 'rerun its stage'}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[bytes]:
        """Records by global index, in the order of `indices`, with one batched read per shard."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)} in {self.path}")
            shard = bisect.bisect_right(self._ends, index)
            wanted.setdefault(shard, []).append((place, index - (self._ends[shard - 1] if shard else 0)))
        records: list[bytes] = [b""] * len(indices)
        for shard, places in wanted.items():
            for (place, _), record in zip(places, self.read(shard, [local for _, local in places]), strict=True):
                records[place] = record
        return records

    def read(self, shard: int, indices: list[int]) -> list[bytes]:
        """Records of one shard by index within it. A damaged chunk is a UserError that names the file."""
        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(str(self.paths[shard]))
        try:
            return self._readers[shard].read(indices)
        except (RuntimeError, IndexError) as error:
            file = self.paths[shard]
            raise UserError(f"{file}: damaged{first_unreadable(file)} ({error}); {REMAKE}") from error

    def __iter__(self) -> Iterator[bytes]:
        for shard in range(len(self.paths)):
            yield from self.stream(shard)

    def stream(self, shard: int) -> Iterator[bytes]:
        """The records of one shard in order."""
        records = self.manifest.shards[shard].records
        for start in range(0, records, READ_RECORDS):
            yield from self.read(shard, list(range(start, min(start + READ_RECORDS, records))))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # a reader cannot be sent to another process


def read_shard(path: Path) -> Iterator[bytes]:
    """The records of one shard file in order, whether or not its directory is finished."""
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    for start in range(0, count, READ_RECORDS):
        yield from reader.read(start, min(start + READ_RECORDS, count))
    reader.close()


def read_documents(path: str | Path) -> Iterator[Document]:
    """Iterates over the Documents of a stage's output directory."""
    for record in Shards(path):
        yield decode(record, Document)
