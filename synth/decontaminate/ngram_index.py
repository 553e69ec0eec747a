"""Index of the n-grams of benchmark items: candidates are found in texts by hash and confirmed word by word.

Words are runs of letters, marks and digits after NFKC and case folding. In scripts without spaces (Chinese, Japanese,
Thai, Lao, Khmer, Burmese, Tibetan) every character is a word.

Guarantees: a match is one of an item's runs of `ngram` words, found in the text word for word. Of an item with fewer
words, all words are one run; so are those of a shorter field of an item with several, if it has `FIELD_WORDS`. Hash
collisions cause no match. All items that share a matched run are named, up to `ITEMS_NAMED`.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import numpy as np

from synth.text.words import UNSPACED

ITEMS_NAMED = 16  # a run at the start of every item of a benchmark would name thousands for each pair
# Shorter answers occur in other texts by chance: FairytaleQA's questions and answers of one split, searched in the
# other, match 19 of 7,769 pairs from 4 words on, 3 from 5, 1 from 6, none from 8.
FIELD_WORDS = 8
BUILD_STRINGS = 4096
RUN = np.dtype([("hash", np.uint64), ("source", np.uint32), ("place", np.uint32), ("size", np.uint16)])
LETTER_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
WORD_BASE = 0xD1342543DE82EF95
OUTSIDE, INSIDE, ALONE = 0, 1, 2  # of words; ALONE: a word by itself
LAST_LETTER = 0x3FFFF  # beyond are only variation selectors, of ideographs, which are words by themselves
MatchedItems = dict[int, str]  # the items that a text matches, each with its first run


# ---- words and their n-grams


class RunHashes:
    """Hashes of runs of numbers: polynomials modulo 2^64, each from two prefix sums."""

    def __init__(self, values: np.ndarray, base: int) -> None:
        self._sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * powers(base, len(values)), out=self._sums[1:])
        self._scales = powers(pow(base, -1, 1 << 64), len(values))

    def between(self, starts: np.ndarray | slice, ends: np.ndarray | slice) -> np.ndarray:
        return (self._sums[ends] - self._sums[starts]) * self._scales[starts]


class Words(NamedTuple):
    """The words of several texts in order: characters [start, end) of `folded`, and the index of the text of each."""

    folded: str
    starts: np.ndarray
    ends: np.ndarray
    texts: np.ndarray
    hashes: RunHashes

    def __len__(self) -> int:
        return len(self.starts)

    def run(self, place: int, size: int) -> tuple[str, ...]:
        """The words [place, place + size)."""
        starts, ends = self.starts[place : place + size].tolist(), self.ends[place : place + size].tolist()
        return tuple(self.folded[a:b] for a, b in zip(starts, ends, strict=True))

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(places, hashes) of all runs of `size` words within one text."""
        count = max(0, len(self) - size + 1)
        within = self.texts[:count] == self.texts[size - 1 :]
        return np.flatnonzero(within), self.hashes.between(slice(0, count), slice(size, None))[within]

    def ngrams_at(self, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`ngrams` that begin at one of `places`."""
        places = places[places + size <= len(self)]
        places = places[self.texts[places] == self.texts[places + size - 1]]
        return places, self.hashes.between(places, places + size)


def read_words(texts: Sequence[str]) -> Words:
    folded = [fold(text) for text in texts]
    joined = "\n".join(folded)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    starts, ends = word_bounds(codes)
    bounds = np.cumsum([len(text) + 1 for text in folded])
    hashes = mixed(RunHashes(codes, LETTER_BASE).between(starts, ends))
    return Words(joined, starts, ends, np.searchsorted(bounds, starts, side="right"), RunHashes(hashes, WORD_BASE))


def fold(text: str) -> str:
    """'Ａnna’s STRAẞE' -> 'anna’s strasse'"""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def word_bounds(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, one past the last) character of every word."""
    kinds = np.zeros(len(codes) + 2, np.uint8)
    letter_kinds().take(codes, out=kinds[1:-1], mode="clip")
    letters, within = kinds == INSIDE, kinds[1:-1] != OUTSIDE
    joined = letters[:-1] & letters[1:]  # with the letter before
    return np.flatnonzero(within & ~joined[:-1]), np.flatnonzero(within & ~joined[1:]) + 1


@lru_cache(maxsize=1)
def letter_kinds() -> np.ndarray:
    """OUTSIDE, INSIDE or ALONE for every character; the last value is that of all characters beyond."""
    named = [unicodedata.category(chr(code))[0] in "LMN" for code in range(LAST_LETTER)]
    kinds = np.array([*named, False], np.uint8)
    for first, last in UNSPACED:
        kinds[first : last + 1] *= ALONE
    return kinds


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on all bits (the finalizer of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^(count-1) modulo 2^64."""
    return _powers(base, max(1, count - 1).bit_length())[:count]


@lru_cache(maxsize=16)
def _powers(base: int, bits: int) -> np.ndarray:
    factors = np.full(1 << bits, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


# ---- the runs of benchmark items


class BenchmarkItem(msgspec.Struct, frozen=True):
    """One question of a benchmark: `fields` are its texts in the order in which they are joined."""

    benchmark: int
    id: str
    fields: tuple[str, ...]


class NgramIndex(msgspec.Struct):
    """The runs of all items, sorted by hash: RUN rows as bytes, so that workers read them from one file."""

    ngram: int
    shortest: int
    items: list[BenchmarkItem]
    names: list[str]  # of the benchmarks
    strings: list[str]  # words separated by spaces
    owners: list[int]  # item of each string
    runs: bytes  # RUN: `size` words from `place` on of string `source`
    too_short: list[int]  # items without a run

    @classmethod
    def build(cls, items: Sequence[BenchmarkItem], names: Sequence[str], ngram: int, shortest: int) -> Self:
        """Runs have `ngram` words. Items with fewer words are one run if they have `shortest` words."""
        shortest = min(shortest, ngram)
        strings, owners, batches = list[str](), list[int](), [np.zeros(0, RUN)]
        waiting = item_strings(items)
        while batch := list(islice(waiting, BUILD_STRINGS)):
            words = read_words([text for _, text, _ in batch])
            runs = find_runs(words, np.array([is_field for *_, is_field in batch]), ngram, shortest)
            runs["source"] += np.uint32(len(strings))
            batches.append(runs)
            edges = np.searchsorted(words.texts, np.arange(len(batch) + 1)).tolist()
            strings += [" ".join(words.run(a, b - a)) for a, b in zip(edges, edges[1:], strict=False)]
            owners += [owner for owner, *_ in batch]
        runs = np.concatenate(batches)
        runs = runs[np.argsort(runs["hash"], kind="stable")]
        indexed = {owners[source] for source in np.unique(runs["source"]).tolist()}
        too_short = [number for number in range(len(items)) if number not in indexed]
        return cls(ngram, shortest, list(items), list(names), strings, owners, runs.tobytes(), too_short)

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.msgpack.encode(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        return msgspec.msgpack.decode(path.read_bytes(), type=cls)


def item_strings(items: Iterable[BenchmarkItem]) -> Iterator[tuple[int, str, bool]]:
    """(item, text, whether it is one field of several): all fields joined, then each by itself."""
    for number, item in enumerate(items):
        yield number, "\n".join(item.fields), False
        if len(item.fields) > 1:
            yield from ((number, field, True) for field in item.fields)


def find_runs(words: Words, are_fields: np.ndarray, ngram: int, shortest: int) -> np.ndarray:
    """RUN rows. Those of a field with `ngram` words or more are among those of the joined fields."""
    starts = np.searchsorted(words.texts, np.arange(len(are_fields)))
    counts = np.bincount(words.texts, minlength=len(are_fields))
    places, hashes = words.ngrams(ngram)
    of_items = ~are_fields[words.texts[places]]
    found = [(places[of_items], hashes[of_items], ngram)]
    for size in range(shortest, ngram):
        complete = (counts == size) & (~are_fields | (size >= FIELD_WORDS))
        found.append((*words.ngrams_at(starts[complete], size), size))
    runs = np.zeros(sum(len(places) for places, *_ in found), RUN)
    places, runs["hash"] = (np.concatenate([run[column] for run in found]) for column in (0, 1))
    runs["size"] = np.repeat([size for *_, size in found], [len(places) for places, *_ in found])
    runs["source"] = words.texts[places]
    runs["place"] = places - starts[runs["source"]]
    return runs


# ---- search


class Finder:
    """Finds the runs of an index in texts. Filters reject nearly all places before the search among the hashes."""

    def __init__(self, needles: NgramIndex) -> None:
        self.needles = needles
        self.runs = np.frombuffer(needles.runs, RUN)
        self.hashes, sizes = np.ascontiguousarray(self.runs["hash"]), self.runs["size"]
        self._long = Filter(self.hashes[sizes == needles.ngram])
        short = np.flatnonzero(sizes < needles.ngram)
        self._short = {size: Filter(self.hashes[sizes == size]) for size in np.unique(sizes[short]).tolist()}
        self._openings = Filter(np.array([self._opening(run) for run in short.tolist()], np.uint64))
        self._known: dict[int, dict[tuple[str, ...], list[int]]] = {}

    def _opening(self, run: int) -> int:
        """The hash of a short run's first `shortest` words. Short runs are searched by it first."""
        words = read_words([" ".join(self._words(run)[: self.needles.shortest])])
        return int(words.ngrams(self.needles.shortest)[1][0])

    def _words(self, run: int) -> tuple[str, ...]:
        _, source, place, size = self.runs[run].item()
        return tuple(self.needles.strings[source].split(" ")[place : place + size])

    def find(self, texts: Sequence[str]) -> list[MatchedItems]:
        """For each text the items that it matches."""
        found: list[MatchedItems] = [{} for _ in texts]
        words = read_words(texts)
        for size, places, hashes in self._candidates(words):
            runs = np.searchsorted(self.hashes, hashes)
            same = self.hashes[np.minimum(runs, len(self.hashes) - 1)] == hashes
            for place, run in zip(places[same].tolist(), runs[same].tolist(), strict=True):
                shared = words.run(place, size)
                for item in self._owners(run).get(shared, ()):
                    found[words.texts[place]].setdefault(item, " ".join(shared))
        return found

    def _candidates(self, words: Words) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(size, places, hashes) of runs that may be indexed."""
        yield self.needles.ngram, *self._long.likely(*words.ngrams(self.needles.ngram))
        if self._short:
            openings, _ = self._openings.likely(*words.ngrams(self.needles.shortest))
            for size, known in self._short.items():
                yield size, *known.likely(*words.ngrams_at(openings, size))

    def _owners(self, run: int) -> dict[tuple[str, ...], list[int]]:
        """The items of all runs with this one's hash, by their words; cached, because hits repeat."""
        key = int(self.hashes[run])
        if key not in self._known:
            owners: dict[tuple[str, ...], list[int]] = {}
            for other in range(run, int(np.searchsorted(self.hashes, key, side="right"))):
                items = owners.setdefault(self._words(other), [])
                owner = self.needles.owners[self.runs["source"][other]]
                if len(items) < ITEMS_NAMED and owner not in items:
                    items.append(owner)
            self._known[key] = owners
        return self._known[key]


class Filter:
    """Rejects most hashes outside a set, by two tables of eight slots per member: of leading and of trailing bits."""

    def __init__(self, hashes: np.ndarray) -> None:
        bits = max(10, (8 * len(hashes)).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        self._leading, self._trailing = np.zeros(1 << bits, bool), np.zeros(1 << bits, bool)
        self._leading[hashes >> self._shift] = True
        self._trailing[hashes & self._mask] = True

    def likely(self, places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The hashes that may be in the set, and their places."""
        passed = np.flatnonzero(self._leading[hashes >> self._shift])
        passed = passed[self._trailing[hashes[passed] & self._mask]]
        return places[passed], hashes[passed]
