"""What is looked for: the n-grams of benchmark items, found in other texts by hash and confirmed word by word.

Guaranteed: a match is one of an item's runs of `ngram` words standing in the text, word for word after folding; an item
of fewer words is looked for as a whole, and so is a shorter field of an item with several if it has `FIELD_WORDS`;
nothing else matches, whatever the hashes do. All items that share a matched run are named, up to `ITEMS_NAMED`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import numpy as np

from synth.decontaminate.ngrams import Words, read_words

ITEMS_NAMED = 16  # a run that every item of a benchmark begins with would name thousands for each pair
# Shorter answers stand in other texts by chance: FairytaleQA's questions and answers of one split, looked for in the
# other, hit 19 of 7,769 pairs from 4 words on, 3 from 5, 1 from 6, none from 8.
FIELD_WORDS = 8
BUILD_STRINGS = 4096
RUN = np.dtype([("hash", np.uint64), ("source", np.uint32), ("place", np.uint32), ("size", np.uint16)])
MatchedItems = dict[int, str]  # the items that a text matches, each with its first run


class BenchmarkItem(msgspec.Struct, frozen=True):
    """One question of a benchmark: `fields` are its texts in the order in which they are joined."""

    benchmark: int
    id: str
    fields: tuple[str, ...]


class Bounds(NamedTuple):
    """Runs of `ngram` words are looked for, and whole items that are shorter but have `shortest` words."""

    ngram: int
    shortest: int


class NgramIndex(msgspec.Struct):
    """The runs of all items, sorted by hash. Arrays as bytes, so that workers read them from one file."""

    ngram: int
    shortest: int
    items: list[BenchmarkItem]
    names: list[str]  # of the benchmarks
    strings: list[str]  # words between blanks
    owners: list[int]  # each string's item
    hashes: bytes  # uint64, sorted
    sources: bytes  # uint32, each run's string
    places: bytes  # uint32, its first word in there
    sizes: bytes  # uint16, its words
    too_short: list[int]  # items of which nothing is looked for

    @classmethod
    def build(cls, items: Sequence[BenchmarkItem], names: Sequence[str], bounds: Bounds) -> Self:
        strings, owners, runs = list[str](), list[int](), list[np.ndarray]()
        waiting = item_strings(items)
        while batch := list(islice(waiting, BUILD_STRINGS)):
            words = read_words([text for _, text, _ in batch])
            runs.append(find_runs(words, [is_field for *_, is_field in batch], bounds, len(strings)))
            edges = np.searchsorted(words.texts, np.arange(len(batch) + 1)).tolist()
            strings += [" ".join(words.run(a, b - a)) for a, b in zip(edges, edges[1:], strict=False)]
            owners += [owner for owner, *_ in batch]
        found = np.concatenate([np.zeros(0, RUN), *runs])
        found = found[np.argsort(found["hash"], kind="stable")]
        looked_for = {owners[source] for source in np.unique(found["source"]).tolist()}
        hashes, sources, places, sizes = (np.ascontiguousarray(found[name]).tobytes() for name in RUN.names or ())
        short = [number for number in range(len(items)) if number not in looked_for]
        return cls(
            bounds.ngram,
            bounds.shortest,
            list(items),
            list(names),
            strings,
            owners,
            hashes,
            sources,
            places,
            sizes,
            too_short=short,
        )

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


def find_runs(words: Words, are_fields: list[bool], bounds: Bounds, first_string: int) -> np.ndarray:
    """The runs to look for; those of a field with `ngram` words or more are among those of the joined fields."""
    starts = np.searchsorted(words.texts, np.arange(len(are_fields)))
    counts = np.bincount(words.texts, minlength=len(are_fields))
    whole_items = ~np.array(are_fields)
    places, hashes = words.ngrams(bounds.ngram)
    wanted = whole_items[words.texts[places]]
    parts = [make_runs(words, places[wanted], hashes[wanted], bounds.ngram)]
    for size in range(bounds.shortest, bounds.ngram):
        wanted = (counts == size) & (whole_items | (size >= FIELD_WORDS))
        places, hashes = words.ngrams_at(starts[wanted], size)
        parts.append(make_runs(words, places, hashes, size))
    runs = np.concatenate(parts)
    runs["place"] -= starts[runs["source"]].astype(np.uint32)
    runs["source"] += np.uint32(first_string)
    return runs


def make_runs(words: Words, places: np.ndarray, hashes: np.ndarray, size: int) -> np.ndarray:
    runs = np.zeros(len(places), RUN)
    runs["hash"], runs["source"], runs["place"], runs["size"] = hashes, words.texts[places], places, size
    return runs


class Finder:
    """Finds needles in texts. Filters turn nearly all places away before any search among the hashes."""

    def __init__(self, needles: NgramIndex) -> None:
        self.needles = needles
        self.hashes = np.frombuffer(needles.hashes, np.uint64)
        self.sources = np.frombuffer(needles.sources, np.uint32)
        self.places = np.frombuffer(needles.places, np.uint32)
        self.sizes = np.frombuffer(needles.sizes, np.uint16)
        self._long = Filter(self.hashes[self.sizes == needles.ngram])
        short = np.flatnonzero(self.sizes < needles.ngram)
        self._short = {size: Filter(self.hashes[self.sizes == size]) for size in np.unique(self.sizes[short]).tolist()}
        self._openings = Filter(np.array([self._opening(run) for run in short.tolist()], np.uint64))
        self._known: dict[int, dict[tuple[str, ...], list[int]]] = {}

    def _opening(self, run: int) -> int:
        """The hash of a short run's first `shortest` words: what all short runs are first looked for by."""
        words = read_words([" ".join(self._words(run)[: self.needles.shortest])])
        return int(words.ngrams(self.needles.shortest)[1][0])

    def _words(self, run: int) -> tuple[str, ...]:
        words = self.needles.strings[self.sources[run]].split(" ")
        return tuple(words[self.places[run] : int(self.places[run]) + int(self.sizes[run])])

    def find(self, texts: Sequence[str]) -> list[MatchedItems]:
        """For each text the items that it matches."""
        found: list[MatchedItems] = [{} for _ in texts]
        words = read_words(texts)
        for size, places, hashes in self._candidates(words):
            runs = np.searchsorted(self.hashes, hashes)
            same = self.hashes[np.minimum(runs, len(self.hashes) - 1)] == hashes
            for place, run in zip(places[same].tolist(), runs[same].tolist(), strict=True):
                told = words.run(place, size)
                for item in self._owners(run).get(told, ()):
                    found[words.texts[place]].setdefault(item, " ".join(told))
        return found

    def _candidates(self, words: Words) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(size, places, hashes) of what may be a needle."""
        places, hashes = self._long.likely(*words.ngrams(self.needles.ngram))
        yield self.needles.ngram, places, hashes
        if self._short:
            openings, _ = self._openings.likely(*words.ngrams(self.needles.shortest))
            for size, known in self._short.items():
                yield size, *known.likely(*words.ngrams_at(openings, size))

    def _owners(self, run: int) -> dict[tuple[str, ...], list[int]]:
        """The items of all runs with this one's hash, by their words; kept, as one hit is seldom the last."""
        key = int(self.hashes[run])
        if key not in self._known:
            owners: dict[tuple[str, ...], list[int]] = {}
            for other in range(run, int(np.searchsorted(self.hashes, key, side="right"))):
                items = owners.setdefault(self._words(other), [])
                owner = self.needles.owners[self.sources[other]]
                if len(items) < ITEMS_NAMED and owner not in items:
                    items.append(owner)
            self._known[key] = owners
        return self._known[key]


class Filter:
    """Turns away most hashes that are not in a set, by two tables of eight slots a member: one of leading bits, and for
    what passes it one of trailing bits."""

    def __init__(self, hashes: np.ndarray) -> None:
        bits = max(10, (8 * len(hashes)).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        self._leading, self._trailing = np.zeros(1 << bits, bool), np.zeros(1 << bits, bool)
        self._leading[hashes >> self._shift] = True
        self._trailing[hashes & self._mask] = True

    def likely(self, places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those that may be in the set, and their places."""
        passed = np.flatnonzero(self._leading[hashes >> self._shift])
        passed = passed[self._trailing[hashes[passed] & self._mask]]
        return places[passed], hashes[passed]
