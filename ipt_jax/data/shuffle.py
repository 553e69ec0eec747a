"""The order of training data as arithmetic: a document's place follows from (seed, source, epoch) and sums of blocks.

A source's records lie in blocks of at most about 131,072 tokens. An epoch deals the blocks out to windows, of every W
neighbours one to each of the W windows, and shuffles the documents of each window among themselves: every window is
drawn evenly from the whole corpus, and reads stay near. A corpus of up to 16.8M tokens is one window: its epochs are
full shuffles. Sources are merged by tokens: a document stands at the fraction of its source's tokens that its middle
has reached, so every source keeps within one document of its share at every point. The merged order is cut into chunks
at fractions c / chunks, and any chunk is computed alone.

Held in memory: 16 bytes a block and epoch in use, and the latest windows. No table of documents, no state.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ipt_jax.core.seeding import draw
from ipt_jax.data.block_table import DOCUMENT, SourceDocuments
from ipt_jax.data.shared_cache import SharedCache

WINDOW_TOKENS = 1 << 22  # what a window of a large corpus holds at most, in the mean: a row read alone costs all of it
WINDOW_DOCUMENTS = 1 << 18  # the same where documents are tiny: 8 MiB of them
ONE_WINDOW_TOKENS = 1 << 24  # a corpus of so many is shuffled as a whole; the loader keeps its records in memory
EPOCHS_KEPT = 2
WINDOWS_KEPT = 6  # of each source: the chunks at hand lie in one or two


def order_key(seed: int, *names: str | int) -> int:
    return draw(seed, "order", *names).getrandbits(64)


def shuffle(count: int, key: int) -> np.ndarray:
    """A permutation of [0, count) chosen by `key`: places sorted by their hash, the same on every machine."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64), key))


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """A bijection of 64-bit numbers (splitmix64's finalizer): every bit of value and key reaches every bit of it."""
    value = value ^ np.uint64(key)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def windows_of(tokens: int, documents: int, blocks: int) -> int:
    """How many windows an epoch of a source has."""
    by_documents = -(-documents // WINDOW_DOCUMENTS)
    by_tokens = -(-tokens // WINDOW_TOKENS) if tokens > ONE_WINDOW_TOKENS else 1
    return min(max(by_documents, by_tokens), blocks)


def deal(blocks: int, windows: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks window after window, and where each window stops: of every `windows` neighbours each window gets one,
    chosen by `key`; what is left at the end goes to some."""
    neighbours = np.arange(-(-blocks // windows) * windows).reshape(-1, windows)
    chosen = np.argsort(_mix(neighbours.astype(np.uint64), key), axis=1)
    dealt = (chosen + neighbours[:, :1]).T
    there = dealt < blocks
    return dealt[there], np.cumsum(there.sum(axis=1))


def _window_key(key: int, window: int) -> int:
    return (key * 0x9E3779B97F4A7C15 + (window + 1) * 0xD1B54A32D192ED03) % (1 << 64)


class Epoch(NamedTuple):
    """One pass over a source: its blocks in order; blocks, tokens and documents up to the end of each window."""

    blocks: np.ndarray
    stops: np.ndarray
    ends: np.ndarray
    documents: np.ndarray
    key: int


class StreamSlice(NamedTuple):
    """Consecutive documents of a stream; `begins`: the token of the stream at which each begins."""

    documents: np.ndarray
    begins: np.ndarray


class Stream:
    """One source's documents in training order: epoch after epoch, cut after exactly `amount` tokens."""

    def __init__(self, documents: SourceDocuments, amount: int, seed: int, name: str):
        self.amount, self.source = amount, documents
        blocks = len(documents.table.tokens)
        self.windows = windows_of(documents.tokens, documents.documents, blocks)
        self.window_blocks = -(-blocks // self.windows)  # the most that a window has
        self._seed, self._name = seed, name
        self._epochs = SharedCache(self._epoch, EPOCHS_KEPT)
        self._windows = SharedCache(self._window, WINDOWS_KEPT)

    def before(self, part: int, parts: int) -> int:
        """Tokens of the documents whose middle lies before the fraction part / parts of the stream."""
        token = self.amount * part // parts
        if token >= self.amount:
            return self.amount
        window = self._windows(self._place(token))
        first = int(np.searchsorted(self.middles(window), part / parts, side="left"))
        return int(window.begins[first]) if first < len(window.begins) else _end(window)

    def middles(self, stream_slice: StreamSlice) -> np.ndarray:
        """The fraction of the stream at which each document's middle lies."""
        return (2 * stream_slice.begins + stream_slice.documents["length"]) / (2 * self.amount)

    def between(self, first: int, stop: int) -> StreamSlice:
        """The documents that begin at tokens [first, stop) of the stream."""
        slices = []
        while first < stop:
            window = self._windows(self._place(first))
            here = slice(*np.searchsorted(window.begins, [first, stop]))
            slices.append(StreamSlice(window.documents[here], window.begins[here]))
            first = _end(window)
        documents = np.concatenate([one.documents for one in slices] or [np.zeros(0, DOCUMENT)])
        return StreamSlice(documents, np.concatenate([one.begins for one in slices] or [np.zeros(0, np.int64)]))

    def count(self) -> tuple[int, int]:
        """Documents of the stream, and the tokens that its end cuts off the last one."""
        place = epoch, window = self._place(self.amount - 1)
        before = int(self._epochs(epoch).documents[window - 1]) if window else 0
        taken = len(self._windows(place).documents)
        last = self._shuffled(place)[taken - 1]
        cut = int(last["length"]) - int(self._windows(place).documents["length"][-1])
        return epoch * self.source.documents + before + taken, cut

    def _place(self, token: int) -> tuple[int, int]:
        """Epoch and window that hold a token of the stream."""
        epoch, inside = divmod(token, self.source.tokens)
        return epoch, int(np.searchsorted(self._epochs(epoch).ends, inside, side="right"))

    def _epoch(self, epoch: int) -> Epoch:
        key = order_key(self._seed, self._name, epoch)
        table = self.source.table
        blocks, stops = deal(len(table.tokens), self.windows, key)
        ends, documents = (np.cumsum(sums[blocks])[stops - 1] for sums in (table.tokens, table.documents))
        return Epoch(blocks, stops, ends, documents, key)

    def _window(self, place: tuple[int, int]) -> StreamSlice:
        number, window = place
        documents = self._shuffled(place)
        first = number * self.source.tokens + (int(self._epochs(number).ends[window - 1]) if window else 0)
        lengths = documents["length"].astype(np.int64)
        begins = first + np.cumsum(lengths) - lengths
        taken = int(np.searchsorted(begins, self.amount, side="left"))
        documents, begins = documents[:taken], begins[:taken]
        documents["length"] = np.minimum(lengths[:taken], self.amount - begins)
        return StreamSlice(documents, begins)

    def _shuffled(self, place: tuple[int, int]) -> np.ndarray:
        """The documents of a window, none of them cut."""
        epoch, window = self._epochs(place[0]), place[1]
        first = epoch.stops[window - 1] if window else 0
        documents = self.source.of_blocks(epoch.blocks[first : epoch.stops[window]])
        return documents[shuffle(len(documents), _window_key(epoch.key, window))]


def _end(stream_slice: StreamSlice) -> int:
    return int(stream_slice.begins[-1]) + int(stream_slice.documents["length"][-1])


class Chunk(NamedTuple):
    """Consecutive documents of the merged order. `first`: the token of the order at which they begin."""

    source: np.ndarray
    documents: np.ndarray
    first: int


class MergedOrder:
    """All streams merged by tokens, in chunks of about `chunk_tokens`."""

    def __init__(self, streams: Sequence[Stream], chunk_tokens: int):
        self.streams = streams
        self.tokens = sum(stream.amount for stream in streams)
        self.chunks = max(self.tokens // chunk_tokens, 1)
        self._bounds = SharedCache(self._bound, 64)

    def start(self, chunk: int) -> int:
        """The token of the merged order at which a chunk begins."""
        return sum(self._bounds(chunk))

    def chunk(self, chunk: int) -> Chunk:
        bounds = zip(self.streams, self._bounds(chunk), self._bounds(chunk + 1), strict=True)
        slices = [stream.between(first, stop) for stream, first, stop in bounds]
        middles = [stream.middles(one) for stream, one in zip(self.streams, slices, strict=True)]
        merged = np.argsort(np.concatenate(middles), kind="stable")
        counts = [len(one.begins) for one in slices]
        source = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[merged]
        return Chunk(source, np.concatenate([one.documents for one in slices])[merged], self.start(chunk))

    def chunk_at(self, token: int) -> int:
        """The chunk that holds a token of the merged order. Chunks are of almost equal size, so a guess is near."""
        chunk = min(token * self.chunks // self.tokens, self.chunks - 1)
        while self.start(chunk) > token:
            chunk -= 1
        while chunk + 1 < self.chunks and self.start(chunk + 1) <= token:
            chunk += 1
        return chunk

    def _bound(self, chunk: int) -> tuple[int, ...]:
        return tuple(stream.before(chunk, self.chunks) for stream in self.streams)
