"""Token shards for benchmarks: documents of lognormal lengths, ids with a skew, as `ipt tokenize` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ipt_jax.core.stage import UNPACKED, NewShard, Output, write_shard
from ipt_jax.corpus.records import Kind, TokenDocument
from ipt_jax.data.token_index import index_digests
from ipt_jax.data.token_shards import RECORDS, Written, token_pages

VOCAB = 32_000
SHARD_DOCUMENTS = 20_000


def web_lengths(count: int, mean: float, seed: int) -> np.ndarray:
    """Lognormal lengths of about the given mean, like web text: most short, a few of many thousands."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(drawn, 8, 20_000).astype(np.int64)


def write_corpus(path: Path, lengths: np.ndarray, kind: Kind, seed: int) -> None:
    """A finished directory of token shards; kept if it exists."""
    if (path / "manifest.json").exists():
        return
    total = -(-len(lengths) // SHARD_DOCUMENTS)
    identity = {"records": RECORDS, "tokenizer": "benchmark", "vocab_size": VOCAB}
    identity |= {"documents": len(lengths), "seed": seed, "kind": kind}
    with Output(path, stage="tokenize", identity=identity, shard_name="tokens") as output:
        for shard in range(total):
            mine = lengths[shard * SHARD_DOCUMENTS : (shard + 1) * SHARD_DOCUMENTS]
            new = NewShard(output.temporary(shard), tokens=int(mine.sum()), counts=Counter({kind: len(mine)}))
            pages = token_pages(_documents(mine, f"{kind}-{shard}", kind, [seed, shard]), new)
            new.records = write_shard(new.path, pages, UNPACKED)
            output.seal_file(shard, total, new)
        output.finish({"side_files": index_digests(output.manifest), "duplicate_ids": 0})


def _documents(lengths: np.ndarray, name: str, kind: Kind, seed: list[int]) -> Iterator[Written]:
    draw = np.random.default_rng(seed)
    for number, length in enumerate(lengths.tolist()):
        tokens = (VOCAB * draw.random(length) ** 3).astype("<u2").tobytes()
        yield Written(TokenDocument(f"{name}-{number}", kind, "uint16", tokens, [(1, length)], [], "web"))
