"""The order of training data: the place of a document follows from (seed, source, epoch) and sums of blocks.

An epoch deals the blocks of a source out to W windows, of every W consecutive blocks one to each window, and shuffles
the documents within a window: every window is an even sample of the corpus, and reads stay local. A corpus of up to
16.8M tokens is one window, so its epochs are full shuffles. Sources are merged by tokens: a document is placed at the
fraction of the tokens of its source that its middle has reached, so every source stays within one document of its share
at every point. The merged order is cut into chunks at fractions c / chunks, and each chunk is computed independently.

Memory: 16 bytes per block and epoch in use, and the latest windows. There is no table of documents and no state.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ipt_jax.core.seeding import draw
from ipt_jax.data.block_table import DOCUMENT, SourceDocuments
from ipt_jax.data.shared_cache import SharedCache

WINDOW_TOKENS = 1 << 22  # mean tokens per window of a large corpus: a single row reads the index of a complete window
WINDOW_DOCUMENTS = 1 << 18  # mean documents per window if documents are tiny: 8 MiB
ONE_WINDOW_TOKENS = 1 << 24  # a corpus of at most this size is one window; the loader caches its records
EPOCHS_CACHED = 2
WINDOWS_CACHED = 6  # per source; the chunks in use need one or two


def shuffle(count: int, key: int) -> np.ndarray:
    """A permutation of [0, count) by `key`: numbers sorted by their hash, the same on every machine."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64), key))


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """The finalizer of splitmix64, a bijection: every bit of value and key affects every bit of the result."""
    value = value ^ np.uint64(key)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def windows_of(tokens: int, documents: int, blocks: int) -> int:
    """The number of windows of an epoch of a source."""
    by_documents = -(-documents // WINDOW_DOCUMENTS)
    by_tokens = -(-tokens // WINDOW_TOKENS) if tokens > ONE_WINDOW_TOKENS else 1
    return min(max(by_documents, by_tokens), blocks)


def deal(blocks: int, windows: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks window by window, and where each window ends. Of every `windows` consecutive blocks each window gets
    one, chosen by `key`; the last, incomplete run goes to some windows."""
    neighbours = np.arange(-(-blocks // windows) * windows).reshape(-1, windows)
    chosen = np.argsort(_mix(neighbours.astype(np.uint64), key), axis=1)
    dealt = (chosen + neighbours[:, :1]).T
    there = dealt < blocks
    return dealt[there], np.cumsum(there.sum(axis=1))


def _window_key(key: int, window: int) -> int:
    return (key * 0x9E3779B97F4A7C15 + (window + 1) * 0xD1B54A32D192ED03) % (1 << 64)


class Epoch(NamedTuple):
    """One pass over a source: its blocks in order, and the blocks, tokens and documents up to each window's end."""

    blocks: np.ndarray
    stops: np.ndarray
    ends: np.ndarray
    documents: np.ndarray
    key: int


class StreamSlice(NamedTuple):
    """Consecutive documents of a stream. `begins`: the token of the stream at which each begins."""

    documents: np.ndarray
    begins: np.ndarray


class Stream:
    """The documents of one source in training order, epoch by epoch: tokens [first, amount) of an endless sequence that
    depends on neither. Documents are cut at both ends."""

    def __init__(self, documents: SourceDocuments, amount: int, seed: int, name: str, first: int = 0):
        self.first, self.amount, self.source = first, amount, documents
        blocks = len(documents.table.tokens)
        self.windows = windows_of(documents.tokens, documents.documents, blocks)
        self.window_blocks = -(-blocks // self.windows)  # at most, per window
        self._seed, self._name = seed, name
        self._epochs = SharedCache(self._epoch, EPOCHS_CACHED)
        self._windows = SharedCache(self._window, WINDOWS_CACHED)

    def before(self, part: int, parts: int) -> int:
        """Tokens of the documents whose middle is before the fraction part / parts of the stream."""
        token = self.first + (self.amount - self.first) * part // parts
        if token >= self.amount:
            return self.amount
        window = self._windows(self._place(token))
        first = int(np.searchsorted(self.middles(window), part / parts, side="left"))
        return int(window.begins[first]) if first < len(window.begins) else _end(window)

    def middles(self, stream_slice: StreamSlice) -> np.ndarray:
        """The fraction of the stream at the middle of each document."""
        begins = stream_slice.begins - self.first
        return (2 * begins + stream_slice.documents["length"]) / (2 * (self.amount - self.first))

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
        """Documents among tokens [0, amount), and the tokens that its end cuts off the last one."""
        place = epoch, window = self._place(self.amount - 1)
        before = int(self._epochs(epoch).documents[window - 1]) if window else 0
        lengths = self._shuffled(place)["length"].astype(np.int64)
        ends = self._begin(place) + np.cumsum(lengths)
        last = int(np.searchsorted(ends, self.amount, side="left"))
        return epoch * self.source.documents + before + last + 1, int(ends[last]) - self.amount

    def _place(self, token: int) -> tuple[int, int]:
        """Epoch and window that hold a token of the stream."""
        epoch, inside = divmod(token, self.source.tokens)
        return epoch, int(np.searchsorted(self._epochs(epoch).ends, inside, side="right"))

    def _epoch(self, epoch: int) -> Epoch:
        key = draw(self._seed, "order", self._name, epoch).getrandbits(64)
        table = self.source.table
        blocks, stops = deal(len(table.tokens), self.windows, key)
        ends, documents = (np.cumsum(sums[blocks])[stops - 1] for sums in (table.tokens, table.documents))
        return Epoch(blocks, stops, ends, documents, key)

    def _window(self, place: tuple[int, int]) -> StreamSlice:
        documents = self._shuffled(place)
        lengths = documents["length"].astype(np.int64)
        ends = self._begin(place) + np.cumsum(lengths)
        begins = ends - lengths
        taken = slice(
            np.searchsorted(ends, self.first, side="right"), np.searchsorted(begins, self.amount, side="left")
        )
        documents, begins, ends = documents[taken], begins[taken], ends[taken]
        before = np.maximum(self.first - begins, 0)  # tokens of the first document that are before the stream
        documents["start"] += before.astype(np.uint32)
        documents["length"] = np.minimum(ends, self.amount) - begins - before
        return StreamSlice(documents, begins + before)

    def _begin(self, place: tuple[int, int]) -> int:
        """The token at which a window begins."""
        number, window = place
        return number * self.source.tokens + (int(self._epochs(number).ends[window - 1]) if window else 0)

    def _shuffled(self, place: tuple[int, int]) -> np.ndarray:
        """The documents of a window, none cut by the amount."""
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
        self.tokens = sum(stream.amount - stream.first for stream in streams)
        self.chunks = max(self.tokens // chunk_tokens, 1)
        self.bounds = SharedCache(self._bound, 64)  # the token of each stream at which a chunk begins

    def start(self, chunk: int) -> int:
        """The token of the merged order at which a chunk begins."""
        return sum(self.bounds(chunk)) - sum(stream.first for stream in self.streams)

    def chunk(self, chunk: int) -> Chunk:
        bounds = zip(self.streams, self.bounds(chunk), self.bounds(chunk + 1), strict=True)
        slices = [stream.between(first, stop) for stream, first, stop in bounds]
        middles = [stream.middles(one) for stream, one in zip(self.streams, slices, strict=True)]
        merged = np.argsort(np.concatenate(middles), kind="stable")
        counts = [len(one.begins) for one in slices]
        source = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[merged]
        return Chunk(source, np.concatenate([one.documents for one in slices])[merged], self.start(chunk))

    def chunk_at(self, token: int) -> int:
        """The chunk with a token of the merged order. Chunks have almost equal size, so the first guess is close."""
        chunk = min(token * self.chunks // self.tokens, self.chunks - 1)
        while self.start(chunk) > token:
            chunk -= 1
        while chunk + 1 < self.chunks and self.start(chunk + 1) <= token:
            chunk += 1
        return chunk

    def _bound(self, chunk: int) -> tuple[int, ...]:
        return tuple(stream.before(chunk, self.chunks) for stream in self.streams)
