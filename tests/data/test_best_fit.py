"""best_fit on lengths of real and of web-like documents at 2,048: a padding of at most a hundredth, and no more than
Grain's own best fit with as many open rows."""

import json
import re
from pathlib import Path

import grain
import numpy as np
import pytest
from extras import shared
from token_shards import documents_in_memory

from ipt_jax.data.packing import CHUNK_ROWS, BestFit
from ipt_jax.data.shuffle import MergedOrder, Stream

SEQ_LEN = 2048


def text_lengths(file: Path) -> list[int]:
    """A token for each word and sign, BOS and EOS."""
    texts = [json.loads(line)["context"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [2 + len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def lengths_of(corpus: str) -> list[int]:
    if corpus == "web":
        drawn = np.random.default_rng(0).lognormal(np.log(450) - 0.5, 1.0, 4000)
        return np.clip(drawn, 8, 20_000).astype(int).tolist()
    return text_lengths(shared(f"data/{corpus}"))


def padding(filled: list[int]) -> float:
    """Of all rows but the last, for which the least full one stands."""
    full = sorted(filled)[1:]
    return 1 - sum(full) / (len(full) * SEQ_LEN)


def grain_rows(lengths: list[int]) -> list[int]:
    order = np.random.default_rng(0).permutation(len(lengths))
    pieces = [min(SEQ_LEN, lengths[i] - start) for i in order for start in range(0, lengths[i], SEQ_LEN)]
    source = grain.MapDataset.source(pieces).map(lambda n: {"tokens": np.ones(n, np.uint8)}).to_iter_dataset()
    packed = grain.experimental.BestFitPackIterDataset(
        source, length_struct={"tokens": SEQ_LEN}, num_packing_bins=CHUNK_ROWS
    )
    return [int((row["tokens_segment_ids"] > 0).sum()) for row in packed]


@pytest.mark.parametrize("corpus", ["web", "fairytaleqa/train.jsonl", "pubmedqa/part1.jsonl"])
def test_best_fit_pads_little_and_no_more_than_grains(corpus: str) -> None:
    lengths = lengths_of(corpus)
    stream = Stream(documents_in_memory(lengths), sum(lengths), 0, "documents")
    packing = BestFit(MergedOrder([stream], CHUNK_ROWS * SEQ_LEN), SEQ_LEN)
    pieces = packing.pieces(0, packing.rows)
    mine = padding(np.bincount(pieces["row"], pieces["length"]).astype(int).tolist())
    assert mine <= 0.01 and mine <= padding(grain_rows(lengths))
