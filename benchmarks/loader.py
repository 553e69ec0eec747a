"""Speed of the loader, compared with Grain, Hugging Face `datasets` and one flat file of tokens.

Every contestant runs in a new process that shuffles one corpus of documents, joins them and yields batches of rows of
2,048 tokens. The clock starts before the first file is opened and stops after the last batch, imports excluded. All
contestants run in turn in every round, and the table has medians. This project yields six checked fields per row, Grain
tokens, segment ids and positions, the others tokens only. Grain cannot read this project's pages, so it has ArrayRecord
files of its own: one uncompressed record per document with its token ids. The last lines run this project with 10 ms
added to every read, on this corpus and on one of eight times the tokens (`cc` is needed for it).

    python benchmarks/loader.py [--tokens 40e6] [--rounds 3] [--directory DIR]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from token_corpus import SHARD_DOCUMENTS, web_lengths, write_corpus

SEQ_LEN, ROWS = 2048, 16
DELAY_US = 10_000
LONG_TIMES = 8
LONG = f"{LONG_TIMES} times the tokens"
Batches = Iterator[np.ndarray]


def ours(root: Path, _: int) -> Batches:
    from ipt_jax.data.loader import batches
    from ipt_jax.data.mixture import DataSettings
    from ipt_jax.data.plan import build_plan

    source = {"name": "raw", "path": str(root / "raw"), "epochs": 1}
    plan = build_plan(DataSettings.model_validate({"seq_len": SEQ_LEN, "sources": [source]}), rows_per_step=ROWS)
    return (batch["tokens"] for batch in batches(plan, start_step=0, rows_per_step=ROWS))


def grain_concat(root: Path, _: int) -> Batches:
    import grain

    source = grain.sources.ArrayRecordDataSource(sorted(map(str, (root / "singles").glob("*.array_record"))))
    documents = (
        grain.MapDataset.source(source)
        .seed(0)
        .shuffle()
        .map(lambda record: {"tokens": np.frombuffer(record, "<u2").astype(np.int32)})
        .to_iter_dataset()
    )
    packed = grain.experimental.ConcatThenSplitIterDataset(documents, length_struct={"tokens": SEQ_LEN})
    return (batch["tokens"] for batch in packed.batch(ROWS))


def datasets_documents(root: Path, _: int) -> Batches:
    import datasets

    held = datasets.load_from_disk(str(root / "documents")).shuffle(seed=0).with_format("numpy")
    return _cut(np.concatenate(part["tokens"]) for part in held.iter(batch_size=1000))


def _cut(parts: Iterator[np.ndarray]) -> Batches:
    left = np.zeros(0, np.int32)
    for part in parts:
        left = np.concatenate([left, part])
        whole = len(left) // (ROWS * SEQ_LEN) * ROWS * SEQ_LEN
        yield from left[:whole].reshape(-1, ROWS, SEQ_LEN).astype(np.int32)
        left = left[whole:]


def datasets_singly(root: Path, _: int) -> Batches:
    import datasets

    held = datasets.load_from_disk(str(root / "documents")).shuffle(seed=0).with_format("numpy")
    return _cut(_gathered(document["tokens"] for document in held))


def _gathered(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Joined by the thousand. Joining each to the rest would be a cost of the contestant."""
    while part := list(itertools.islice(documents, 1000)):
        yield np.concatenate(part)


def datasets_rows(root: Path, _: int) -> Batches:
    import datasets

    held = datasets.load_from_disk(str(root / "rows")).shuffle(seed=0).with_format("numpy")
    return (part["tokens"].astype(np.int32) for part in held.iter(batch_size=ROWS, drop_last_batch=True))


def flat_file(root: Path, _: int) -> Batches:
    held = np.memmap(root / "flat.bin", "<u2", "r")
    order = np.random.default_rng(0).permutation(len(held) // SEQ_LEN)
    for at in range(0, len(order) - ROWS + 1, ROWS):
        rows = order[at : at + ROWS].tolist()
        yield np.stack([held[row * SEQ_LEN : (row + 1) * SEQ_LEN] for row in rows]).astype(np.int32)


CONTESTANTS: dict[str, Callable[[Path, int], Batches]] = {
    "this project": ours,
    "grain ConcatThenSplit": grain_concat,
    "datasets, one by one": datasets_singly,
    "datasets, a thousand at once": datasets_documents,
    "datasets, rows packed before": datasets_rows,
    "flat file": flat_file,
}


def measure(name: str, root: Path, tokens: int) -> None:
    """In a process of its own: one contestant from start to end."""
    import datasets  # noqa: F401  (imports are not timed)
    import grain  # noqa: F401

    import ipt_jax.data.plan  # noqa: F401

    wall, cpu, first, given = time.perf_counter(), time.process_time(), 0.0, 0
    for batch in CONTESTANTS[name](root, tokens):
        first = first or time.perf_counter() - wall
        given += batch.size
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()  # getrusage would return the peak of the parent
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"given": given, "wall": wall, "cpu": cpu, "first": first, "peak_mib": peak}))


def prepare(root: Path, tokens: int) -> int:
    """The corpus in each contestant's own format; returns its tokens."""
    lengths = web_lengths(tokens // 450, 450, 0)
    write_corpus(root / "raw", lengths, "raw", 0)
    if not (root / "flat.bin").exists():
        _write_rivals(root)
    return int(lengths.sum())


def _write_rivals(root: Path) -> None:
    import datasets
    import pyarrow as pa

    from ipt_jax.core.stage import UNPACKED, write_shard
    from ipt_jax.data.token_shards import read_token_documents

    documents = [np.frombuffer(document.tokens, "<u2") for document in read_token_documents(root / "raw")]
    (root / "singles").mkdir()
    for start in range(0, len(documents), SHARD_DOCUMENTS):
        mine = documents[start : start + SHARD_DOCUMENTS]
        write_shard(root / "singles" / f"{start:09d}.array_record", (one.tobytes() for one in mine), UNPACKED)
    flat = np.concatenate(documents)
    offsets = np.cumsum([0, *map(len, documents)])
    held = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat))
    datasets.Dataset(pa.table({"tokens": held})).save_to_disk(str(root / "documents"))
    rows = pa.FixedSizeListArray.from_arrays(pa.array(flat[: len(flat) // SEQ_LEN * SEQ_LEN]), SEQ_LEN)
    datasets.Dataset(pa.table({"tokens": rows})).save_to_disk(str(root / "rows"))
    (root / "flat.bin").write_bytes(flat.tobytes())


def run(name: str, root: Path, tokens: int, slow: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, "--directory", str(root), "--tokens", str(tokens)]
    environment = dict(os.environ)
    if slow:
        environment |= {"LD_PRELOAD": str(slow), "SLOW_DISK": f"{root.resolve()}/raw", "SLOW_DISK_US": str(DELAY_US)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compile_slow_disk(root: Path) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        print("no cc: the line with 10 ms per read is skipped", file=sys.stderr)
        return None
    library = root / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def compare(root: Path, tokens: int, rounds: int) -> None:
    tokens = prepare(root, tokens)
    slow = compile_slow_disk(root)
    if slow:  # a start on such a disk takes 0.2 s, a fifth of the time of the smaller corpus
        write_corpus(root / LONG / "raw", web_lengths(LONG_TIMES * tokens // 450, 450, 1), "raw", 1)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name in CONTESTANTS:
            runs.setdefault(name, []).append(run(name, root, tokens))
        if slow:
            runs.setdefault("this project, 10 ms a read", []).append(run("this project", root, tokens, slow))
            runs.setdefault(LONG, []).append(run("this project", root / LONG, tokens))
            runs.setdefault(f"{LONG}, 10 ms a read", []).append(run("this project", root / LONG, tokens, slow))
    print(f"{tokens:,} tokens, rows of {SEQ_LEN:,}, batches of {ROWS}; {platform.processor()} {os.cpu_count()} CPUs")
    print(f"{'':30}{'M tokens/s':>12}{'per core':>10}{'first batch':>14}{'peak MiB':>10}{'this project is':>18}")
    speed = {name: statistics.median(one["given"] / one["wall"] for one in found) for name, found in runs.items()}
    for name, found in runs.items():
        core = statistics.median(one["given"] / one["cpu"] for one in found)
        first = statistics.median(one["first"] for one in found)
        peak = max(one["peak_mib"] for one in found)
        print(
            f"{name:30}{speed[name] / 1e6:>12.1f}{core / 1e6:>10.1f}{first:>12.2f} s{peak:>10.0f}"
            f"{speed['this project'] / speed[name]:>17.2f}x"
        )
    if slow:
        print(f"10 ms a read, of its own speed: {speed[f'{LONG}, 10 ms a read'] / speed[LONG]:.2f} of {LONG}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=40e6, help="size of the corpus (default 40e6)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contestant runs (default 3)")
    parser.add_argument("--directory", type=Path, help="where the corpus is written, and kept; default a temporary one")
    parser.add_argument("--measure", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.directory, int(given.tokens))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(given.directory or Path(temporary), int(given.tokens), given.rounds)


if __name__ == "__main__":
    main()
