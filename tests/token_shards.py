"""Token shards for tests, made from ids alone, as `ipt tokenize` would write them."""

from pathlib import Path

import numpy as np

from ipt_jax.corpus.records import Kind, Parent, TokenDocument, encode
from ipt_jax.corpus.shards import Manifest, Output, write_shard
from ipt_jax.data.lengths import SideFiles, name_side_files, side_digests


def write_tokens(
    path: Path,
    documents: list[list[int]],
    *,
    kind: Kind = "raw",
    ids: list[str] | None = None,
    parents: list[list[Parent]] | None = None,
    loss_runs: list[list[tuple[int, int]]] | None = None,
    tokenizer: str = "t",
    shards: int = 1,
) -> Path:
    """A finished directory. Documents begin with BOS; each later token covers two characters, the last one (EOS) none."""
    identity = {"tokenizer": tokenizer, "vocab_size": 100, "of": str(documents)}
    names = ids or [f"{kind}-{i}" for i in range(len(documents))]
    with Output(path, stage="tokenize", identity=identity, shard_name="tokens") as output:
        for shard, numbers in enumerate(np.array_split(np.arange(len(documents)), shards)):
            side, records = SideFiles(), []
            for i in numbers.tolist():
                tokens, mine = documents[i], (parents[i] if parents else [])
                runs = loss_runs[i] if loss_runs else [(1, len(tokens))]
                data = np.array(tokens, "<u2").tobytes()
                records.append(encode(TokenDocument(names[i], kind, "uint16", data, runs, mine, "test")))
                ends = np.minimum(2 * np.arange(len(tokens)), 2 * max(len(tokens) - 2, 0))
                side.add(names[i], len(tokens), ends if kind == "raw" else None, mine)
            temporary = output.temporary(shard)
            write_shard(temporary, records)
            side.write(temporary)
            name_side_files(temporary, f"tokens-{shard:05d}-of-{shards:05d}.array_record")
            count = sum(len(documents[i]) for i in numbers)
            output.seal_file(shard, shards, len(numbers), tokens=count, counts={kind: len(numbers)})
        output.finish({"side_files": side_digests(path, output.manifest), "duplicate_ids": 0})
    return path


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Documents of the given lengths: BOS 1, ids from 3 to 99, EOS 2."""
    generator = np.random.default_rng(seed)
    return [[1, *generator.integers(3, 100, length - 2).tolist(), 2][:length] for length in lengths]


def manifest_of(path: Path) -> Manifest:
    from ipt_jax.corpus.shards import read_manifest

    return read_manifest(path, "tokenize")
