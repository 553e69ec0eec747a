"""Whether two texts are in the same language: py3langid's probabilities, and the scripts of their letters."""

import unicodedata
from functools import cache, lru_cache
from typing import Any

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
