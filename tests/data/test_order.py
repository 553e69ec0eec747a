"""The order of one source: every document once an epoch, each part of an epoch like the whole, any part alone."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_shards import documents_in_memory

from ipt_jax.data.block_table import block_size
from ipt_jax.data.shuffle import Stream, deal, shuffle, windows_of


def stream_of(lengths: Sequence[int], epochs: float = 1, seed: int = 0) -> Stream:
    return Stream(documents_in_memory(lengths), int(epochs * sum(lengths)), seed, "a")


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_shuffle_reaches_each_place_once(count: int, key: int) -> None:
    assert sorted(shuffle(count, key)) == list(range(count))


def test_shuffles_mix_well() -> None:
    count = 4096
    for key in (0, 1, 2**63 + 12345):
        order = shuffle(count, key)
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.06
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
        assert (order == shuffle(count, key ^ 1)).sum() < 12 and (np.diff(order) == 1).sum() < 12


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_blocks_are_of_about_131072_tokens_or_a_thousandth(records: int, mean: int) -> None:
    size = block_size(records, records * mean)
    assert size == 1 or (size * mean <= 1 << 17 and size * 1024 <= records)
    assert 2 * size * mean > 1 << 17 or 2 * size * 1024 > records or size == 1 << 16


@given(st.integers(1, 3000), st.integers(1, 80), st.integers(0, 2**64 - 1))
def test_windows_take_their_blocks_evenly_from_the_whole_corpus(blocks: int, windows: int, key: int) -> None:
    windows = min(windows, blocks)
    dealt, stops = deal(blocks, windows, key)
    assert sorted(dealt) == list(range(blocks)) and len(stops) == windows and stops[-1] == blocks
    for window in np.split(dealt, stops[:-1]):
        assert len(window) in (blocks // windows, -(-blocks // windows))
        assert (window // windows).tolist() == list(range(len(window)))  # one of each `windows` neighbours


def test_a_small_corpus_is_one_window() -> None:
    assert windows_of(5_000_000, 33_000, 1100) == windows_of(1 << 24, 1 << 18, 2000) == 1
    assert windows_of((1 << 24) + 1, 100_000, 1500) == 5
    assert windows_of(10**11, 2 * 10**8, 780_000) == 23_842
    assert windows_of(1 << 24, 1 << 24, 2048) == 64  # documents of a token each
    assert windows_of(1 << 30, 7, 7) == 7  # no more windows than blocks


@pytest.mark.parametrize(("documents", "windows"), [(700, 1), (30_000, 1), (150_000, 11)])
@pytest.mark.parametrize("layout", ["longer second half", "sorted", "every hundredth is long"])
def test_each_tenth_of_an_epoch_is_like_the_whole(documents: int, windows: int, layout: str) -> None:
    """Mean lengths, and mean places in the corpus, of tenths of an epoch are within four standard errors."""
    lengths = np.random.default_rng(documents).integers(100, 300, documents)
    if layout == "longer second half":
        lengths[documents // 2 :] += 200
    elif layout == "sorted":
        lengths.sort()
    else:
        lengths[::100] *= 20
    for seed in range(3):
        stream = stream_of(lengths.tolist(), 1, seed)
        assert layout != "longer second half" or stream.windows == windows
        epoch = stream.between(0, stream.amount).documents
        for values in (epoch["length"].astype(float), epoch["record"].astype(float)):
            for tenth in np.array_split(values, 10):
                assert abs(tenth.mean() - values.mean()) < 4 * values.std() / np.sqrt(len(tenth))


@given(
    st.lists(st.sampled_from([1, 2, 16, 17, 400]), min_size=1, max_size=80),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 40),
)
def test_every_epoch_has_every_document_once(lengths: list[int], epochs: int, window: int, least_blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipt_jax.data.block_table.MIN_BLOCKS", least_blocks)
        patch.setattr("ipt_jax.data.shuffle.WINDOW_DOCUMENTS", window)
        stream = stream_of(lengths, epochs)
        whole = stream.between(0, stream.amount).documents
    for epoch in np.split(whole, epochs):
        assert sorted(epoch["record"]) == list(range(len(lengths)))
        assert epoch["length"].tolist() == np.array(lengths)[epoch["record"]].tolist()


def test_any_part_of_a_stream_alone() -> None:
    """Several windows of blocks, several epochs: any stretch is what the whole has there."""
    lengths = np.random.default_rng(3).integers(200, 6000, 9000)
    stream = stream_of(lengths.tolist(), 2.5)
    assert stream.windows == 7
    whole = stream.between(0, stream.amount)
    assert whole.begins.tolist() == [0, *np.cumsum(whole.documents["length"], dtype=np.int64)[:-1].tolist()]
    first, second = whole.documents["record"][:9000], whole.documents["record"][9000:18000]
    assert sorted(first) == sorted(second) == list(range(9000)) and (first == second).sum() < 20
    assert (first == np.arange(9000)).sum() < 20
    alone = stream_of(lengths.tolist(), 2.5)
    for place in (17_000, 4, 9001, 22_000):
        low, high = whole.begins[place], whole.begins[place + 9]
        assert alone.between(int(low), int(high)).documents.tolist() == whole.documents[place : place + 9].tolist()
