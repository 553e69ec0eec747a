"""The order of training data as arithmetic: a keyed permutation of documents, and the merge of sources by tokens.

`shuffled` is a pure function of (position, number of documents, key) with no state and no table, so the document at any
place can be computed alone. It has two levels: blocks of neighbouring documents are permuted over the corpus, and the
documents of a window of blocks among themselves; reads therefore stay within a window's blocks. `interleave` merges
sources so that each one's progress stays within one document of its share at every point.
"""

from collections.abc import Sequence

import numpy as np

from ipt_jax.corpus.settings import draw

BLOCK = 256  # neighbouring documents that stay together across the corpus
WINDOW = 256 * BLOCK  # documents that are shuffled among themselves
SMALL = 256
ROUNDS = 6


def order_key(seed: int, *names: str | int) -> int:
    return draw(seed, "order", *names).getrandbits(64)


def permute(index: np.ndarray, count: int, key: int) -> np.ndarray:
    """Where a bijection of [0, count) chosen by `key` sends each `index`.

    A Feistel network over the next power of four; what falls outside [0, count) is sent on until it falls inside.
    Small networks mix badly: up to SMALL places are sorted by hash.
    """
    if count <= SMALL:
        return np.argsort(_mix(np.arange(count, dtype=np.uint64), key), kind="stable")[index]
    index = np.asarray(index, np.uint64)
    half = ((count - 1).bit_length() + 1) // 2  # bits of each half
    result = _feistel(index, half, key)
    outside = np.flatnonzero(result >= count)
    while outside.size:
        result[outside] = _feistel(result[outside], half, key)
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _feistel(index: np.ndarray, half: int, key: int) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = index >> bits, index & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right, _round_key(key, number)) & mask)
    return (left << bits) | right


def _round_key(key: int, number: int) -> int:
    return (key * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % (1 << 64)


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit finalizer (splitmix64's shape): every bit of value and key reaches every bit of the result."""
    value = (value ^ np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def shuffled(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """The document at each place of `positions` (ascending) in the shuffled order of `count` documents."""
    blocks = count // BLOCK  # whole blocks; the turn below decides which documents make up the short one
    turn = _round_key(key, 1 << 20) % count
    result = np.empty(len(positions), np.int64)
    windows = np.asarray(positions, np.int64) // WINDOW
    for window in np.unique(windows):
        start = int(window) * WINDOW
        here = slice(*np.searchsorted(windows, [window, window + 1]))
        inside = start + permute(positions[here] - start, min(WINDOW, count - start), _round_key(key, int(window) + 1))
        block = inside // BLOCK
        whole = block < blocks
        block[whole] = permute(block[whole], blocks, key)
        result[here] = (block * BLOCK + inside % BLOCK + turn) % count
    return result


def interleave(lengths: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Merges the documents of several sources, each in its own order: (source, place within the source) of each.

    A document stands at the fraction of its source's tokens that its middle has reached.
    """
    middles = []
    for tokens in lengths:
        ends = np.cumsum(tokens, dtype=np.int64)
        middles.append((2 * ends - tokens) / (2 * ends[-1]))
    merged = np.argsort(np.concatenate(middles), kind="stable")
    source = np.repeat(np.arange(len(lengths), dtype=np.uint8), [len(tokens) for tokens in lengths])[merged]
    starts = np.cumsum([0] + [len(tokens) for tokens in lengths])[:-1]
    return source, merged - starts[source]
