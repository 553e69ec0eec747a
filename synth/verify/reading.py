"""A text prepared once, for the scores of all its pairs: each part is made when the first score asks for it."""

from collections import defaultdict
from functools import cached_property
from itertools import pairwise

from synth.verify.language import Languages, languages, script
from synth.verify.words import content_stems, is_content, is_negation, sentences, stem, words

NEGATION_REACH = 3  # words behind "not" that it turns around


class Reading:
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
