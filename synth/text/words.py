"""Words as the scores see them: split, stemmed, with function words, negations, names and sentences told apart.

Stop words, stems and negations are English. Other languages are split the same way, scripts without spaces letter by
letter; their function words count as content, so shares are a little higher there, for right and wrong answers alike.
"""

import re
from functools import lru_cache

# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces: a letter is a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"\d+(?:[.,]\d+)*|[{UNSPACED}]|[^\W\d_{UNSPACED}]+(?:['’][^\W\d_]+)*")
STOP_WORDS = frozenset(
    """a about after again also am an and any are as at be because been before being both but by can could did do does
    doing down each every few for from had has have having he her here hers him his how i if in into is it its just
    may me might more most must my no nor not of off on once one only onto or other our out over own same shall she
    should so some such than that the their theirs them then there these they this those through to too under until
    up upon us very was we were what when where which while who whom whose why will with would you your yes true
    false although accordingly alternatively consequently despite finally furthermore hence however many moreover
    nevertheless similarly since therefore thus""".split()
)
NEGATIONS = frozenset("not no never none nothing nobody nowhere neither nor cannot without hardly".split())
SUFFIXES = ("ingly", "edly", "ing", "ies", "ied", "ed", "es", "ly", "s", "e", "y")
LEAST_STEM = 3
remembered = lru_cache(maxsize=1 << 18)  # most words have been seen before


def words(text: str) -> list[str]:
    """'Anna\\'s 2 boats.' -> ["Anna's", '2', 'boats']"""
    return WORD.findall(text)


@remembered
def stem(word: str) -> str:
    """'walked', 'walks' and 'Walking' -> 'walk'; one ending goes, three letters stay."""
    word = plain_word(word).removesuffix("'s")
    for suffix in SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= LEAST_STEM:
            word = word[: -len(suffix)]
            break
    doubled = len(word) > LEAST_STEM and word[-1] == word[-2] and word[-1] not in "aeiouls"
    return word[:-1] if doubled else word


def plain_word(word: str) -> str:
    return word.casefold().replace("’", "'")


@remembered
def is_content(word: str) -> bool:
    return plain_word(word) not in STOP_WORDS and "'" not in plain_word(word)[1:-2]


@remembered
def is_negation(word: str) -> bool:
    word = plain_word(word)
    return word in NEGATIONS or word.endswith("n't")


def content_words(text: str) -> list[str]:
    return [word for word in words(text) if is_content(word)]


def content_stems(text: str) -> set[str]:
    return {stem(word) for word in content_words(text)}
