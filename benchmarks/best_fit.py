"""Padding of `best_fit`, compared with Grain's best-fit packing on the same documents.

Both sides cut documents longer than a row into rows and a rest. Padding is counted without the last row. Grain packs
into a number of open rows (`--bins`). This project packs the documents of 512 rows at a time.

    python benchmarks/best_fit.py [--seq-len 2048] [--documents 30000] [--bins 512] [--texts FILE.jsonl ...]

`--texts` are JSON Lines with a `context` or `text`. Each word and each punctuation mark counts as a token.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from token_corpus import web_lengths

from ipt_jax.data.packing import CHUNK_ROWS, BestFit
from ipt_jax.data.shuffle import MergedOrder, Stream


def text_lengths(path: Path) -> np.ndarray:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array([2 + len(re.findall(r"\w+|[^\w\s]", row.get("context") or row["text"])) for row in rows])


def ours(lengths: np.ndarray, seq_len: int) -> tuple[int, float]:
    """Rows, and the share of padding in all but the last."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from token_shards import documents_in_memory

    stream = Stream(documents_in_memory(lengths.tolist()), int(lengths.sum()), 0, "documents")
    packing = BestFit(MergedOrder([stream], CHUNK_ROWS * seq_len), seq_len)
    pieces = packing.pieces(0, packing.rows - 1)
    return packing.rows, 1 - int(pieces["length"].sum()) / ((packing.rows - 1) * seq_len)


def grains(lengths: np.ndarray, seq_len: int, bins: int) -> tuple[int, float]:
    order = np.random.default_rng(0).permutation(len(lengths))
    pieces = [n for length in lengths[order].tolist() for n in cut(length, seq_len)]
    source = grain.MapDataset.source(pieces).map(lambda n: {"tokens": np.ones(n, np.uint8)}).to_iter_dataset()
    packed = grain.experimental.BestFitPackIterDataset(
        source, length_struct={"tokens": seq_len}, num_packing_bins=bins, shuffle_bins=False
    )
    filled = [int((row["tokens_segment_ids"] > 0).sum()) for row in packed]
    filled.remove(min(filled))  # the least full row counts as the last
    return len(filled) + 1, 1 - sum(filled) / (len(filled) * seq_len)


def cut(length: int, seq_len: int) -> Iterator[int]:
    for start in range(0, length, seq_len):
        yield min(seq_len, length - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=30_000, help="of lognormal lengths (default 30000)")
    parser.add_argument("--bins", type=int, default=512, help="rows that Grain keeps open (default 512)")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="JSON Lines of texts")
    given = parser.parse_args()
    corpora = {"lognormal": web_lengths(given.documents, 450, 0)} | {str(p): text_lengths(p) for p in given.texts}
    print(f"{'documents of':40}{'tokens':>12}{'padding':>10}{'seconds':>9}{'Grain':>10}{'seconds':>9}")
    for name, lengths in corpora.items():
        started = time.perf_counter()
        _, padding = ours(lengths, given.seq_len)
        middle = time.perf_counter()
        _, rival = grains(lengths, given.seq_len, given.bins)
        ended = time.perf_counter()
        print(
            f"{name[-38:]:40}{lengths.sum():>12,}{padding:>10.3%}{middle - started:>9.1f}"
            f"{rival:>10.3%}{ended - middle:>9.1f}"
        )


if __name__ == "__main__":
    main()
