"""A text prepared once, for the scores of all its pairs: each part is made when the first score asks for it.

Whether two texts are in the same language: py3langid's probabilities, and the scripts of their letters.
"""

import unicodedata
from collections import defaultdict
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any

from synth.text.sentences import sentences
from synth.text.words import content_stems, is_content, is_negation, stem, words

Languages = dict[str, float]  # the probability of each language that is not out of the question
ENOUGH_LETTERS = 1_000  # of a text; more change nothing
LEAST_SHARE = 1e-3


@cache
def identifier() -> Any:
    """0.6 s and 5 MB, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages(text: str) -> Languages:
    return {name: share for name, share in identifier().rank(text[:ENOUGH_LETTERS]) if share >= LEAST_SHARE}


def in_common(one: Languages, other: Languages) -> float:
    """What two distributions share: 1 where they are the same, but for what is too small to be held."""
    return sum(min(share, other.get(name, 0.0)) for name, share in one.items())


@lru_cache(maxsize=1 << 16)
def script(letter: str) -> str:
    """'a' -> 'LATIN', '谁' -> 'CJK'"""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


NEGATION_REACH = 3  # words behind "not" that it turns around


class PreparedText:
    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return words(self.text)

    @cached_property
    def ordered_stems(self) -> list[str]:
        return [stem(word) for word in self.words]

    @cached_property
    def stems(self) -> set[str]:
        return set(self.ordered_stems)

    @cached_property
    def neighbours(self) -> set[tuple[str, str]]:
        return set(pairwise(self.ordered_stems))

    @cached_property
    def lower_case(self) -> set[str]:
        """The words that stand in it without a capital: no names."""
        return {word for word in self.words if word[0].islower()}

    @cached_property
    def windows(self) -> list[set[str]]:
        """The stems of every two sentences that follow each other."""
        each = [content_stems(sentence) for sentence in sentences(self.text)]
        return [one | other for one, other in pairwise(each)] or each

    @cached_property
    def turned(self) -> dict[str, set[bool]]:
        return turned_stems(self.words)

    @cached_property
    def languages(self) -> Languages:
        return languages(self.text)

    @cached_property
    def scripts(self) -> set[str]:
        return {script(letter) for letter in set(self.text) if letter.isalpha()}


def turned_stems(of: list[str]) -> dict[str, set[bool]]:
    """Each content word's stem: does it stand behind a negation? ['not', 'old', …, 'old'] -> {'old': {True, False}}"""
    found: dict[str, set[bool]] = defaultdict(set)
    negated = -NEGATION_REACH - 1
    for place, word in enumerate(of):
        if is_negation(word):
            negated = place
        elif is_content(word):
            found[stem(word)].add(place - negated <= NEGATION_REACH)
    return found
