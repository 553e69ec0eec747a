"""Words and sentences of natural language: the splitters of the product, and word properties for the scores.

Stop words, stems and negations are English. In other languages function words count as content, so shares are a little
higher there, for right and wrong answers alike.
"""

import re
from functools import lru_cache

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|\n")
# Scripts without spaces: every character is a word. NFKC replaces half- and full-width forms.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F40, 0x0FBC),  # Tibetan letters; a punctuation mark separates its syllables
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
LONE = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
WORD = re.compile(rf"\d+(?:[.,]\d+)*|[{LONE}]|[^\W\d_{LONE}]+(?:['’][^\W\d_]+)*")
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
cached = lru_cache(maxsize=1 << 18)  # words repeat


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The sentences as spans without the blanks around them: 'A b. C.' -> [(0, 4), (5, 7)]"""
    edges = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    spans = []
    for start, end in zip(edges, edges[1:], strict=False):
        words = text[start:end]
        if words.strip():
            spans.append((start + len(words) - len(words.lstrip()), end - len(words) + len(words.rstrip())))
    return spans


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


def words(text: str) -> list[str]:
    """'Anna\\'s 2 boats.' -> ["Anna's", '2', 'boats']"""
    return WORD.findall(text)


@cached
def stem(word: str) -> str:
    """'walked', 'walks' and 'Walking' -> 'walk'. Removes one ending and keeps at least three letters."""
    word = plain_word(word).removesuffix("'s")
    for suffix in SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= LEAST_STEM:
            word = word[: -len(suffix)]
            break
    doubled = len(word) > LEAST_STEM and word[-1] == word[-2] and word[-1] not in "aeiouls"
    return word[:-1] if doubled else word


def plain_word(word: str) -> str:
    return word.casefold().replace("’", "'")


@cached
def is_content(word: str) -> bool:
    return plain_word(word) not in STOP_WORDS and "'" not in plain_word(word)[1:-2]


@cached
def is_negation(word: str) -> bool:
    word = plain_word(word)
    return word in NEGATIONS or word.endswith("n't")


def content_words(text: str) -> list[str]:
    return [word for word in words(text) if is_content(word)]


def content_stems(text: str) -> set[str]:
    return {stem(word) for word in content_words(text)}
