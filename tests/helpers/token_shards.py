"""Token shards for tests, made from ids alone, as `ipt tokenize` would write them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ipt_jax.core.stage import UNPACKED, NewShard, Output, write_shard
from ipt_jax.corpus.records import Kind, Parent, TokenDocument
from ipt_jax.data.block_table import BlockTable, SourceDocuments, block_size
from ipt_jax.data.exclude_converted import Remains
from ipt_jax.data.plan import Plan
from ipt_jax.data.token_index import INDEX, index_digests
from ipt_jax.data.token_shards import RECORDS, Written, token_pages


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
    """A finished directory. In a raw document BOS and EOS (first, last) cover no character, other tokens two each."""
    identity = {"records": RECORDS, "tokenizer": tokenizer, "vocab_size": 100, "of": str(documents)}
    names = ids or [f"{kind}-{i}" for i in range(len(documents))]
    with Output(path, stage="tokenize", identity=identity, shard_name="tokens") as output:
        for shard, numbers in enumerate(np.array_split(np.arange(len(documents)), shards)):
            written = []
            for i in numbers.tolist():
                tokens, mine = documents[i], (parents[i] if parents else [])
                runs = loss_runs[i] if loss_runs else [(1, len(tokens))]
                data = np.array(tokens, "<u2").tobytes()
                characters = np.full(len(tokens), 2, np.uint32)
                characters[:1] = characters[1:][-1:] = 0
                document = TokenDocument(names[i], kind, "uint16", data, runs, mine, "test")
                written.append(Written(document, characters if kind == "raw" else None))
            count = sum(len(documents[i]) for i in numbers)
            new = NewShard(output.temporary(shard), tokens=count, counts=Counter({kind: len(numbers)}))
            new.records = write_shard(new.path, token_pages(written, new), UNPACKED)
            output.seal_file(shard, shards, new)
        output.finish({"side_files": index_digests(output.manifest), "duplicate_ids": 0})
    return path


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Documents of the given lengths: BOS 1, ids from 3 to 99, EOS 2."""
    generator = np.random.default_rng(seed)
    return [[1, *generator.integers(3, 100, length - 2).tolist(), 2][:length] for length in lengths]


def documents_in_memory(lengths: Sequence[int]) -> SourceDocuments:
    """A source of documents of the given lengths, without files."""
    index = np.zeros(len(lengths), INDEX)
    index["tokens"] = lengths
    size = block_size(len(lengths), int(index["tokens"].sum(dtype=np.int64)))
    firsts = np.arange(0, len(lengths), size)
    tokens = np.add.reduceat(index["tokens"].astype(np.int64), firsts)
    documents = np.diff(np.append(firsts, len(lengths)))

    def read(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([index[first:stop] for first, stop in ranges])

    pages = np.zeros((len(firsts), 2), np.uint32)
    return SourceDocuments(BlockTable(size, tokens, documents, pages, Remains.nothing()), read, len(lengths), "memory")


class RowPiece(NamedTuple):
    """Tokens [start, start + length) of a record of a source, by its place in the recipe, from column `at` of a row."""

    source: int
    record: int
    start: int
    length: int
    at: int


def row_pieces(plan: Plan, row: int) -> list[RowPiece]:
    found = plan.pieces([row])
    start = found["document"]["start"] + found["offset"]
    columns = (found["source"], found["document"]["record"], start, found["length"], found["at"])
    return [RowPiece(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def row_fields(plan: Plan, row: int) -> dict[str, np.ndarray]:
    """Each field's array [T]."""
    return {name: array[0] for name, array in plan.batch([row]).items()}


def save_tokenizer(folder: Path, *, controls: bool = True) -> Path:
    """A byte-level BPE of about 300 ids: <s> is 1, </s> is 2."""
    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"] if controls else ["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a small world of words"] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
