"""Cost of a plan by the number of documents: time, memory, the first row after a cold start, a random row.

Writes token directories of the paper's mix (nine tenths raw documents, of which a fifth were converted and are
excluded, augmented documents with two of them each, tuning documents four times) with everything that planning reads:
manifests and index files of lognormal lengths. Token shards of 2e8 documents would take 200 GB. Here a shard is an
empty file of the right name, except for the blocks of the timed rows, which are written as real records among one-byte
ones. Planning, cold start and rows each run in a process of their own. Before the cold start the files' pages are
dropped from the page cache.

    python benchmarks/plan_scale.py [--documents 1e5 1e6] [--directory DIR]        2e8: 4 GB of disk for index files
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from token_corpus import VOCAB, web_lengths

from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.core.manifest import SCHEMA, Manifest, ShardEntry
from ipt_jax.core.stage import UNPACKED, write_shard
from ipt_jax.corpus.records import Kind, TokenDocument
from ipt_jax.data.loader import batches
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan
from ipt_jax.data.token_index import INDEX, PARENTS, id_key, index_path
from ipt_jax.data.token_shards import PAGE_TOKENS, RECORDS, encode_page

SEQ_LEN, ROWS, LAST_STEPS, RANDOM_ROWS = 2048, 16, 8, 40
SMALLEST_BLOCK = 64
SHARD_DOCUMENTS = 30_000  # 64 MiB of text, as `ipt tokenize` cuts its input
PARTS: list[tuple[str, Kind, float, float]] = [
    ("raw", "raw", 0.9, 500), ("augmented", "augmented", 0.09, 1200), ("tasks", "task", 0.01, 600),
]  # fmt: skip
LIMIT = {"plan_s": 900, "peak_gib": 6, "first_row_s": 10, "random_row_ms": 20}


def key_of(record: np.ndarray, source: int) -> np.ndarray:
    """A distinct 64-bit key for each record, in place of the hash of an id."""
    return (record.astype(np.uint64) + np.uint64(source << 40)) * np.uint64(0x9E3779B97F4A7C15)


def write_directory(root: Path, number: int, documents: int) -> None:
    """Index files, parents and a manifest; the shards are empty files."""
    name, kind, part, mean = PARTS[number]
    path, count = root / name, max(int(documents * part), 1)
    path.mkdir(parents=True)
    total, shards, digests = -(-count // SHARD_DOCUMENTS), [], {}
    raw = int(documents * PARTS[0][2])
    for shard in range(total):
        first, stop = shard * SHARD_DOCUMENTS, min((shard + 1) * SHARD_DOCUMENTS, count)
        records = np.arange(first, stop)
        index, parents = np.zeros(stop - first, INDEX), np.zeros(0, PARENTS)
        index["tokens"] = web_lengths(stop - first, mean, shard * 3 + number)
        index["id"] = key_of(records, number)
        index["page"] = pages_of(index["tokens"])
        if kind == "raw":
            index["characters"] = 4 * index["tokens"]
        if kind == "augmented":  # each has two converted texts; every fifth raw document is one
            parents = np.zeros(2 * (stop - first), PARENTS)
            parents["id"] = key_of((5 * np.arange(2 * first, 2 * stop)) % raw, 0)
            parents["end"] = 0xFFFFFFFF
        entry = f"tokens-{shard:05d}-of-{total:05d}.array_record"
        for what, rows in (("index", index), ("parents", parents)):
            np.save(index_path(path, entry, what), rows)
            digests[index_path(path, entry, what).name] = file_digest(index_path(path, entry, what))
        (path / entry).touch()
        tokens = int(index["tokens"].sum(dtype=np.int64))
        pages = int(index["page"][-1]) + 1
        shards.append(ShardEntry(entry, pages, tokens, 0, f"{number}-{shard}", {kind: stop - first}))
    save_manifest(path, shards, kind, digests)


def pages_of(lengths: np.ndarray) -> np.ndarray:
    """The page of each document of a shard: as many pages as `ipt tokenize` would make, or a few more."""
    filled = (np.cumsum(lengths, dtype=np.int64) - 1) // PAGE_TOKENS
    return np.cumsum(np.diff(filled, prepend=0) > 0)


def save_manifest(path: Path, shards: list[ShardEntry], kind: str, digests: dict[str, str]) -> None:
    identity = {"records": RECORDS, "tokenizer": "benchmark", "vocab_size": VOCAB}
    manifest = Manifest(SCHEMA, "tokenize", digest(identity), identity, True, shards=shards)
    manifest.records, manifest.tokens = sum(one.records for one in shards), sum(one.tokens for one in shards)
    manifest.counts = {kind: sum(one.counts[kind] for one in shards)}
    manifest.summary = {"side_files": digests, "duplicate_ids": 0}
    manifest.checksum = manifest.digest()
    (path / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def open_plan(root: Path) -> Plan:
    sources = [
        {"name": "raw", "path": str(root / "raw"), "epochs": 1, "exclude_converted": "augmented"},
        {"name": "augmented", "path": str(root / "augmented"), "epochs": 1},
        {"name": "tasks", "path": str(root / "tasks"), "epochs": 4},
    ]
    return build_plan(DataSettings.model_validate({"seq_len": SEQ_LEN, "sources": sources}), rows_per_step=ROWS)


def timed_rows(plan: Plan) -> list[int]:
    drawn = np.random.default_rng(0).choice(plan.rows, min(RANDOM_ROWS, plan.rows), replace=False)
    return drawn.tolist()


def write_records(root: Path) -> None:
    """Makes the documents of the timed rows real: their records in the shards, their ids in the index files."""
    plan = open_plan(root)
    rows = {*timed_rows(plan), *range((plan.steps - LAST_STEPS) * ROWS, plan.rows)}
    wanted: dict[tuple[int, int], set[int]] = {}
    pieces = plan.pieces(sorted(rows))
    for source, record in zip(pieces["source"].tolist(), pieces["document"]["record"].tolist(), strict=True):
        documents = plan.sources[source].documents
        block = max(documents.table.size, SMALLEST_BLOCK)  # the loader reads all of it
        first = record // block * block
        for number in range(first, min(first + block, documents.records)):
            shard, local = divmod(number, SHARD_DOCUMENTS)
            wanted.setdefault((source, shard), set()).add(local)
    for number, source in enumerate(plan.sources):
        shards = source.manifest.shards
        for (_, shard), locals_ in sorted(item for item in wanted.items() if item[0][0] == number):
            shards[shard].bytes = _write_shard(source.path, shards[shard].name, PARTS[number][1], locals_)
        save_manifest(source.path, shards, PARTS[number][1], source.manifest.summary["side_files"])


def _write_shard(path: Path, name: str, kind: Kind, wanted: set[int]) -> int:
    index = np.load(index_path(path, name, "index"), mmap_mode="r+")
    made = {}
    for page in {int(index["page"][local]) for local in wanted}:
        held = np.flatnonzero(index["page"] == page).tolist()
        documents = []
        for local in held:
            length, document_id = int(index["tokens"][local]), f"{name}-{local}"
            tokens = np.random.default_rng(local).integers(3, VOCAB, length).astype("<u2").tobytes()
            documents.append(TokenDocument(document_id, kind, "uint16", tokens, [(1, length)], [], "web"))
            index["id"][local] = id_key(document_id)
        made[page] = encode_page(held[0], documents)
    write_shard(path / name, (made.get(page, b"-") for page in range(int(index["page"][-1]) + 1)), UNPACKED)
    return (path / name).stat().st_size


def drop_pages(root: Path) -> None:
    """Takes the directory's files out of the page cache."""
    os.sync()
    for file in root.rglob("*.*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(what: str, root: Path) -> dict[str, Any]:
    started = time.perf_counter()
    plan = open_plan(root)
    if what == "plan":
        summary = plan.summary()
        documents = sum(source["documents"] for source in summary["sources"])
        result = {"plan_s": time.perf_counter() - started, "plan_cpu_s": time.process_time()}
        result |= {"tokens": plan.tokens, "occurrences": documents}
    elif what == "loader":
        next(batches(plan, start_step=plan.steps - LAST_STEPS, rows_per_step=ROWS))
        result = {"first_batch_s": time.perf_counter() - started}
    else:
        seconds, cpu = [], []
        for row in timed_rows(plan):
            at, used = time.perf_counter(), time.process_time()
            plan.batch([row])
            seconds.append(time.perf_counter() - at)
            cpu.append(time.process_time() - used)
            result = {"first_row_s": at - started + seconds[0]} if len(seconds) == 1 else result
        result["random_row_ms"] = 1000 * statistics.median(seconds[1:])
        result["row_cpu_ms"] = 1000 * statistics.median(cpu[1:])
        result["slowest_row_ms"] = 1000 * max(seconds[1:])
    return result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run(what: str, root: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, "--directory", str(root)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def cost(root: Path, documents: int) -> dict[str, Any]:
    for number in range(len(PARTS)):
        write_directory(root, number, documents)
    drop_pages(root)
    planned = run("plan", root)
    again = run("plan", root)
    subprocess.run([sys.executable, __file__, "--measure", "write", "--directory", str(root)], check=True)
    drop_pages(root)
    rows = run("rows", root)
    drop_pages(root)
    loaded = run("loader", root)
    return (
        planned
        | rows
        | {
            "documents": documents,
            "peak_gib": planned["peak_gib"],
            "again_s": again["plan_s"],
            "first_batch_s": loaded["first_batch_s"],
            "loader_gib": loaded["peak_gib"],
        }
    )


COLUMNS = {
    "documents": "{:,}", "tokens": "{:,}", "plan_s": "{:.1f}", "plan_cpu_s": "{:.1f}", "peak_gib": "{:.2f}",
    "again_s": "{:.2f}", "first_row_s": "{:.2f}", "first_batch_s": "{:.2f}", "random_row_ms": "{:.1f}",
    "row_cpu_ms": "{:.1f}",
    "slowest_row_ms": "{:.1f}", "loader_gib": "{:.2f}",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, nargs="+", default=[1e5, 1e6], help="sizes (default 1e5 1e6)")
    parser.add_argument("--directory", type=Path, help="an empty or new one for the files; default a temporary one")
    parser.add_argument("--measure", choices=["plan", "rows", "loader", "write"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure == "write":
        write_records(given.directory)
    elif given.measure:
        print(json.dumps(measure(given.measure, given.directory)))
    else:
        report([int(documents) for documents in given.documents], given.directory)


def report(sizes: list[int], directory: Path | None) -> None:
    print(f"bars for 2e8 documents: {LIMIT}; {platform.processor()} {os.cpu_count()} CPUs")
    print("".join(f"{name:>16}" for name in COLUMNS), flush=True)
    for documents in sizes:
        root = Path(tempfile.mkdtemp(dir=directory))
        try:
            found = cost(root, documents)
        finally:
            shutil.rmtree(root)
        print("".join(f"{form.format(found[name]):>16}" for name, form in COLUMNS.items()), flush=True)


if __name__ == "__main__":
    main()
