"""Rendered documents as a data set for the Hugging Face Hub: `data/train-00000-of-00002.parquet` or .jsonl, and a card.

Guarantees: one file per shard of `synth render`, with its documents as rows of one schema; spans name a pair by its
index in the row's `pairs`. A file is complete, synced and renamed, or absent. A rerun writes missing files. The card is
written last. `export.json` lists the files. A directory of other documents is refused. Memory holds 1,000 rows.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import TEMPORARY, sync_directory, write_whole, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.corpus.records import Document, Pair, SynthGroup
from ipt_jax.corpus.shards import Shards
from synth.format.wire import final_answer, question_stem
from synth.render.dataset_card import SCHEMA, dataset_card
from synth.render.documents import HubSettings, RenderSettings, parsed_pair, shard_documents

SEARCHED = 1000  # documents searched for examples
SOURCES = 50  # counted by name per file; the others are counted together
ROWS = 1000  # rows per row group
FEW_GROUPS = 10_000  # fewer are written before worker processes would start


class ExportFile(msgspec.Struct):
    name: str
    rows: int
    bytes: int
    sha256: str
    counts: dict[str, int]


class Export(msgspec.Struct):
    """The contents of `export.json`."""

    fingerprint: str
    files: list[ExportFile] = []

    def save(self, folder: Path) -> None:
        write_whole(folder / "export.json", msgspec.json.format(msgspec.json.encode(self), indent=1))


def open_export(hub: HubSettings, documents: str) -> Export:
    """The complete files in the output, for documents with fingerprint `documents`. Incomplete files are removed."""
    folder, fingerprint = Path(hub.output), digest([documents, hub.format])
    listing, data = folder / "export.json", folder / "data"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if listing.is_file():
            export = msgspec.json.decode(listing.read_bytes(), type=Export)
        elif foreign := sorted(path.name for path in folder.iterdir() if path.suffix != TEMPORARY):
            raise UserError(f"hub output {folder}: contains {foreign[0]!r} but no export.json; use an empty directory")
        else:
            export = Export(fingerprint)
        if export.fingerprint != fingerprint:
            raise UserError(f"hub output {folder}: contains other documents; use another output, or delete this one")
        sizes = {path.name: path.stat().st_size for path in data.glob("train-*")}
        export.files = [file for file in export.files if sizes.get(file.name) == file.bytes]
        export.save(folder)
        data.mkdir(exist_ok=True)
        for name in sizes.keys() - {file.name for file in export.files}:
            (data / name).unlink()
    return export


def export_hub(settings: RenderSettings, hub: HubSettings, export: Export, shards: Shards, documents: str) -> None:
    """Writes the missing files, then the card."""
    folder, total = Path(hub.output), len(shards.paths)
    paths = [folder / "data" / f"train-{shard:05d}-of-{total:05d}.{hub.format}" for shard in range(total)]
    complete = {file.name for file in export.files}
    missing = [(shard, path) for shard, path in enumerate(paths) if path.name not in complete]
    workers = 1 if len(shards) < FEW_GROUPS else None
    counts: Counter[str] = Counter()
    with writing(folder):
        for _, written in run_units(partial(write_file, settings), missing, workers=workers):
            export.files = sorted([*export.files, written], key=lambda file: file.name)
            export.save(folder)
        for file in export.files:
            counts.update(file.counts)
        card = dataset_card(settings, hub, counts, examples(settings), documents)
        write_whole(folder / "README.md", card.encode())


def examples(settings: RenderSettings) -> list[Document]:
    """The first two augmented documents among the first `SEARCHED` documents."""
    near = (document for _, document, _ in islice(shard_documents(settings, 0, Counter(), Counter()), SEARCHED))
    return list(islice((document for document in near if document.kind == "augmented"), 2))


# ---- one file; runs in a worker process


def write_file(settings: RenderSettings, shard_and_path: tuple[int, Path]) -> ExportFile:
    shard, path = shard_and_path
    counts: Counter[str] = Counter()
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path.parent):
        found = rows(settings, shard, counts)
        if path.suffix == ".parquet":
            with pq.ParquetWriter(temporary, SCHEMA, compression="zstd", write_page_index=True) as writer:
                while some := list(islice(found, ROWS)):
                    writer.write_table(pa.Table.from_pylist(some, schema=SCHEMA))
        else:
            with temporary.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        checksum = file_digest(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    return ExportFile(path.name, counts["documents"], path.stat().st_size, checksum, merge_sources(counts))


def merge_sources(counts: Counter[str]) -> dict[str, int]:
    """The counts, with those of rare sources merged."""
    sources = Counter({name: count for name, count in counts.items() if name.startswith("source ")})
    rare = [name for name, _ in sources.most_common()[SOURCES:]]
    kept = {name: count for name, count in counts.items() if name not in rare}
    return kept | ({"source (others)": sum(sources[name] for name in rare)} if rare else {})


def rows(settings: RenderSettings, shard: int, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for group, document, _ in shard_documents(settings, shard, Counter(), Counter()):
        row = document_row(group, document)
        counts[f"synthesizer {group.synthesizer}\t{group.weights}"] += 1
        counts.update(["documents", f"kind {row['kind']}", f"source {row['source']}"])
        counts["characters"] += len(row["text"])
        counts["pairs"] += len(row["pairs"])
        counts.update(f"format {pair['format']}" for pair in row["pairs"])
        if row["layout"]:
            counts[f"layout {row['layout']}"] += 1
        yield row


def document_row(group: SynthGroup, document: Document) -> dict[str, Any]:
    """A document with its pairs, parents and spans."""
    spans = document.meta.get("spans", {})
    texts = [group.texts[place] for place in document.meta.get("places", [])]
    numbers = {(text, pair): number for number, (text, pair, *_) in enumerate(spans.get("question", []))}
    return {
        "id": document.id,
        "text": document.text,
        "source": document.source,
        "kind": document.kind,
        "layout": document.meta.get("layout"),
        "pairs": [pair_row(texts[text].pairs[pair], text) for text, pair in numbers],
        "parents": msgspec.to_builtins(document.parents),
        "spans": [
            {"part": part, "text": text, "pair": numbers[text, owner[0]] if owner else None, "start": start, "end": end}
            for part, found in spans.items()
            for text, *owner, start, end in found
        ],
    }


def pair_row(stored: Pair, text: int) -> dict[str, Any]:
    pair = parsed_pair(stored)
    return {
        "text": text,
        "question": question_stem(pair).strip(),
        "options": pair.options,
        "rationale": pair.rationale.strip() if pair.rationale is not None else None,
        "answer": final_answer(pair),
        "format": pair.format,
        "scores": [{"name": name, "value": score} for name, score in sorted(pair.scores.items())],
    }
