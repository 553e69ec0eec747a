"""Words of texts and their n-grams, as arrays: each word is hashed once, each n-gram by a rolling sum of its words.

Words are runs of letters, marks and digits after NFKC and case folding; in scripts that are written without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) every character is a word. Hashes are polynomials modulo 2^64,
so that those of any run follow from two prefix sums; they only point at candidates, nothing is decided by them.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LETTER_BASE = 0x9E3779B97F4A7C15  # odd, so that it can be divided by modulo 2^64
WORD_BASE = 0xD1342543DE82EF95
OUTSIDE, INSIDE, ALONE = 0, 1, 2
LAST_LETTER = 0x3FFFF  # no letter is assigned beyond
# Blocks of scripts without spaces; half- and full-width forms are gone after NFKC.
SPACELESS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic marks
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # ideographs
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


class Words(NamedTuple):
    """The words of several texts in order. `starts` and `ends` are characters of `folded`, `texts` says whose they are,
    `sums` are the prefix sums of their hashes, one more than words."""

    folded: str
    starts: np.ndarray
    ends: np.ndarray
    texts: np.ndarray
    sums: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def run(self, place: int, size: int) -> tuple[str, ...]:
        """The words [place, place + size)."""
        starts, ends = self.starts[place : place + size].tolist(), self.ends[place : place + size].tolist()
        return tuple(self.folded[a:b] for a, b in zip(starts, ends, strict=True))

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(places, hashes) of all runs of `size` words that lie within one text."""
        count = max(0, len(self) - size + 1)
        whole = self.texts[:count] == self.texts[size - 1 :]
        return np.flatnonzero(whole), self._hashes(self.sums[size:], self.sums[:count], slice(0, count))[whole]

    def ngrams_at(self, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The same of those runs that begin at one of `places`."""
        places = places[places + size <= len(self)]
        places = places[self.texts[places] == self.texts[places + size - 1]]
        return places, self._hashes(self.sums[places + size], self.sums[places], places)

    def _hashes(self, after: np.ndarray, before: np.ndarray, places: np.ndarray | slice) -> np.ndarray:
        return (after - before) * powers(inverse(WORD_BASE), len(self))[places]


def read_words(texts: Sequence[str]) -> Words:
    """The words of `texts`."""
    folded = [fold(text) for text in texts]
    joined = "\n".join(folded)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    starts, ends = word_bounds(codes)
    bounds = np.cumsum([len(text) + 1 for text in folded])
    sums = prefix_sums(mixed(word_hashes(codes, starts, ends)), WORD_BASE)
    return Words(joined, starts, ends, np.searchsorted(bounds, starts, side="right"), sums)


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


def word_hashes(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    sums = prefix_sums(codes, LETTER_BASE)
    return (sums[ends] - sums[starts]) * powers(inverse(LETTER_BASE), len(codes))[starts]


def prefix_sums(values: np.ndarray, base: int) -> np.ndarray:
    """sums[i] = values[0] + values[1] base + … + values[i-1] base^(i-1), modulo 2^64."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers(base, len(values)), out=sums[1:])
    return sums


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


def inverse(base: int) -> int:
    return pow(base, -1, 1 << 64)


@lru_cache(maxsize=1)
def letter_kinds() -> np.ndarray:
    """For every character whether it stands outside of words, inside, or is a word by itself."""
    named = [unicodedata.category(chr(code))[0] in "LMN" for code in range(LAST_LETTER)]
    kinds = np.array([*named, False], np.uint8)  # the last one stands for all beyond
    for first, last in SPACELESS:
        kinds[first : last + 1] *= ALONE
    return kinds
