"""Documents as a data set for the hub: `data/train-00000-of-00002.parquet` (or .jsonl) and a card, ready to push.

Guaranteed: the rows are the documents of `synth render`, one file for each of its shards, written row by row; a file is
whole, synced and renamed, or absent; a second run makes what is missing. The card is written last. `export.json` holds
what was made of what; a directory of other documents is refused.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import TEMPORARY, sync_directory, write_whole, writing
from ipt_jax.core.hashing import digest
from ipt_jax.corpus.records import Document
from ipt_jax.corpus.shards import Shards
from synth.render.dataset_card import dataset_card
from synth.render.documents import HubSettings, RenderSettings, shard_documents
from synth.render.hub_rows import row, write_jsonl, write_parquet

SEARCHED = 1000  # documents for examples
SOURCES = 50  # named of one file; more are counted together
FEW_GROUPS = 10_000  # fewer are written sooner than worker processes start


class ExportFile(msgspec.Struct):
    name: str
    rows: int
    bytes: int
    sha256: str
    counts: dict[str, int]


class Export(msgspec.Struct):
    """What stands in `export.json`."""

    fingerprint: str
    files: list[ExportFile] = []


@dataclass(frozen=True)
class FileJob:
    settings: RenderSettings
    shard: int
    path: Path


def open_export(hub: HubSettings, documents: str) -> Export:
    """What is whole already of the data set of `documents`, a fingerprint; files that are not are removed."""
    folder, fingerprint = Path(hub.output), digest([documents, hub.format])
    note, data = folder / "export.json", folder / "data"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if note.is_file():
            export = msgspec.json.decode(note.read_bytes(), type=Export)
        elif foreign := sorted(path.name for path in folder.iterdir() if path.suffix != TEMPORARY):
            raise UserError(f"hub output {folder}: holds {foreign[0]!r} but no export.json; give an empty directory")
        else:
            export = Export(fingerprint)
        if export.fingerprint != fingerprint:
            raise UserError(f"hub output {folder}: made of other documents; give another output, or delete this one")
        export.files = [file for file in export.files if is_whole(data / file.name, file)]
        save(folder, export)
        data.mkdir(exist_ok=True)
        known = {file.name for file in export.files}
        for path in data.glob("train-*"):
            if path.name not in known:
                path.unlink()
    return export


def export_hub(settings: RenderSettings, hub: HubSettings, export: Export, shards: Shards, documents: str) -> None:
    """Writes the files that are missing, then the card."""
    folder, total = Path(hub.output), len(shards.paths)
    paths = [folder / "data" / f"train-{shard:05d}-of-{total:05d}.{hub.format}" for shard in range(total)]
    whole = {file.name for file in export.files}
    jobs = [FileJob(settings, shard, path) for shard, path in enumerate(paths) if path.name not in whole]
    with writing(folder):
        for _, made in run_units(write_file, jobs, workers=1 if len(shards) < FEW_GROUPS else None):
            export.files = sorted([*export.files, made], key=lambda file: file.name)
            save(folder, export)
        card = dataset_card(settings, hub, total_counts(export.files), examples(settings), documents)
        write_whole(folder / "README.md", card.encode())


def save(folder: Path, export: Export) -> None:
    write_whole(folder / "export.json", msgspec.json.format(msgspec.json.encode(export), indent=1))


def is_whole(path: Path, file: ExportFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes


def total_counts(files: Iterable[ExportFile]) -> Counter[str]:
    total: Counter[str] = Counter()
    for file in files:
        total.update(file.counts)
    return total


def examples(settings: RenderSettings) -> list[Document]:
    """The first two augmented documents, if they are near the front."""
    near = (document for _, document, _ in islice(shard_documents(settings, 0, Counter(), Counter()), SEARCHED))
    return list(islice((document for document in near if document.kind == "augmented"), 2))


# ---- one file; runs in a worker process


def write_file(job: FileJob) -> ExportFile:
    counts: Counter[str] = Counter()
    temporary = job.path.with_name(job.path.name + TEMPORARY)
    with writing(job.path.parent):
        write = write_parquet if job.path.suffix == ".parquet" else write_jsonl
        write(temporary, rows(job, counts))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, job.path)
        sync_directory(job.path.parent)
    return ExportFile(job.path.name, counts["documents"], job.path.stat().st_size, checksum, few_sources(counts))


def few_sources(counts: Counter[str]) -> dict[str, int]:
    """The counts, with rare sources taken together."""
    sources = Counter({name: count for name, count in counts.items() if name.startswith("source ")})
    rare = [name for name, _ in sources.most_common()[SOURCES:]]
    kept = {name: count for name, count in counts.items() if name not in rare}
    return kept | ({"source (others)": sum(sources[name] for name in rare)} if rare else {})


def rows(job: FileJob, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for group, document, _ in shard_documents(job.settings, job.shard, Counter(), Counter()):
        found = row(group, document)
        counts[f"synthesizer {group.synthesizer}\t{group.weights}"] += 1
        count_row(found, counts)
        yield found


def count_row(found: dict[str, Any], counts: Counter[str]) -> None:
    counts.update(["documents", f"kind {found['kind']}", f"source {found['source']}"])
    counts["characters"] += len(found["text"])
    counts["pairs"] += len(found["pairs"])
    counts.update(f"format {pair['format']}" for pair in found["pairs"])
    if found["layout"]:
        counts[f"layout {found['layout']}"] += 1
