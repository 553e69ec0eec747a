"""Scores that need a pair and its text only, between 0 and 1, higher for better (table: docs/reference/verify.md).

Guarantees: a score is a pure function of text and pair. A pair that cannot be judged raises `Unscored` with the reason.
A score whose object is missing (no name in the answer, no number in the question) is 1.

`combined` estimates from the other scores how likely the pair is right:

    combined = answered · asked · entities · polarity · answer_type · unrepeated · min(1, 2 · language)
    answered = sigmoid(a · grounded + b · quoted + c · brevity + d),  brevity = 1 / (1 + words of the final answer)
    asked    = sigmoid(e · question_grounded + f)

It is a product because each part detects faults that the others miss. One weighted sum of all parts, fitted on all
faults, is worse on each (AUC for swapped answers 0.86 instead of 0.95). `answered` separates the answers of
FairytaleQA's training split from answers about other stories, `asked` its questions.
`python benchmarks/verify.py --fit` fits the weights.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from math import exp
from typing import Any

from ipt_jax.corpus.records import Pair
from synth.format.parser import gold_option, plain
from synth.format.wire import final_answer, question_stem
from synth.text.words import (
    content_stems,
    content_words,
    is_content,
    is_negation,
    plain_word,
    sentences,
    stem,
    words,
)

Languages = dict[str, float]  # the probability of each language, if above LEAST_SHARE
ENOUGH_LETTERS = 1_000  # of a text, to identify its language
LEAST_SHARE = 1e-3
NEGATION_REACH = 3  # words after "not" that it negates
REPEATED = 3  # words of a repetition
AMOUNTS = frozenset("many much old long far often tall big large high heavy deep".split())
NUMBERS = frozenset(
    """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands
    million millions billion dozen half once twice many few several no none all both single another pair every
    most""".split()
)
TIMES = frozenset(
    """when while after before during until till as time day days night nights morning evening noon midnight dawn
    year years month months week weeks hour hours minute minutes second seconds soon later then once ago century
    spring summer autumn winter today yesterday tomorrow sunrise sunset now at in on always never since by""".split()
)
PLACES = frozenset(
    """in on at to from under over near by behind above below beside between inside outside into through along across
    upon out toward towards up down home there here everywhere within the a an his her its their our my""".split()
)
PERSONAL = frozenset("he she it they i we you".split())
NO_PERSON = PERSONAL | frozenset("because by to so in if would was were had did could will is when".split())
SHORT_REASON = 2  # words


class Unscored(Exception):
    """No score for this pair. The message is the reason, as it is counted."""


@cache
def identifier() -> Any:
    """Loads in 0.6 s, once per process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def find_languages(text: str) -> Languages:
    return {name: share for name, share in identifier().rank(text[:ENOUGH_LETTERS]) if share >= LEAST_SHARE}


@lru_cache(maxsize=1 << 16)
def script(letter: str) -> str:
    """'a' -> 'LATIN', '谁' -> 'CJK'"""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


class PreparedText:
    """A text prepared once for the scores of all its pairs. Each property is computed on first use."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return words(self.text)

    @cached_property
    def stems(self) -> set[str]:
        return set(stems(self.text))

    @cached_property
    def neighbours(self) -> set[tuple[str, str]]:
        return set(pairwise(stems(self.text)))

    @cached_property
    def lower_case(self) -> set[str]:
        """The words that occur without a capital. They are not names."""
        return {word for word in self.words if word[0].islower()}

    @cached_property
    def windows(self) -> list[set[str]]:
        """The content stems of every two consecutive sentences."""
        each = [content_stems(sentence) for sentence in sentences(self.text)]
        return [one | other for one, other in pairwise(each)] or each

    @cached_property
    def negations(self) -> dict[str, set[bool]]:
        return find_negations(self.words)

    @cached_property
    def languages(self) -> Languages:
        return find_languages(self.text)

    @cached_property
    def scripts(self) -> set[str]:
        return {script(letter) for letter in set(self.text) if letter.isalpha()}


def stems(text: str) -> list[str]:
    return [stem(word) for word in words(text)]


def find_negations(of: list[str]) -> dict[str, set[bool]]:
    """Whether each content stem is negated. ['not', 'old', …, 'old'] -> {'old': {True, False}}"""
    found: dict[str, set[bool]] = defaultdict(set)
    negated = -NEGATION_REACH - 1
    for place, word in enumerate(of):
        if is_negation(word):
            negated = place
        elif is_content(word):
            found[stem(word)].add(place - negated <= NEGATION_REACH)
    return found


# ---- scores


def answer_text(pair: Pair) -> str:
    """Reasoning and answer without the words of the wire format."""
    return f"{pair.rationale or ''} {final_answer(pair)}"


def share(hits: int, all_: int) -> float:
    return hits / all_ if all_ else 1.0


def grounded(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's content words that are in the text. The mean of reasoning and final answer.

    An answer without content words ('Yes.', 'He did.') affirms its question, so the question's words count.
    """
    parts = [content_words(part) for part in (final_answer(pair), pair.rationale or "")]
    judged = [part for part in parts if part] or [content_words(question_stem(pair))]
    if not judged[0]:
        raise Unscored("no_words")
    return sum(share(sum(stem(word) in text.stems for word in part), len(part)) for part in judged) / len(judged)


def quoted(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's word pairs that are in the text. For one word, whether it is."""
    answered = stems(answer_text(pair))
    if not answered:
        raise Unscored("no_words")
    if len(answered) == 1:
        return float(answered[0] in text.stems)
    return share(sum(couple in text.neighbours for couple in pairwise(answered)), len(answered) - 1)


def located(text: PreparedText, pair: Pair) -> float:
    """The best two consecutive sentences: the share of the question's words times that of the answer's."""
    asked, answered = content_stems(question_stem(pair)), content_stems(answer_text(pair))
    if not asked and not answered:
        raise Unscored("no_words")
    shares = (
        share(len(asked & near), len(asked)) * share(len(answered & near), len(answered)) for near in text.windows
    )
    return max(shares, default=0.0)


def question_grounded(text: PreparedText, pair: Pair) -> float:
    """The share of the question's content words that are in the text."""
    asked = content_stems(question_stem(pair))
    if not asked:
        raise Unscored("no_words")
    return share(len(asked & text.stems), len(asked))


def entities(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's names and numbers that are in the text or the question."""
    known = text.stems.union(stems(pair.question))
    named = [stem(word) for word in names(answer_text(pair), text)]
    return share(sum(name in known for name in named), len(named))


def names(answer: str, text: PreparedText) -> Iterator[str]:
    """Numbers, and capitalised words that are not in the text in lower case.

    Every first word of a sentence is capitalised. With several sentences it counts only before another capital.
    """
    parts = sentences(answer)
    for found in map(words, parts):
        for place, word in enumerate(found):
            opens = place == 0 and len(parts) > 1 and not any(other[0].isupper() for other in found[1:2])
            named = word[0].isupper() and is_content(word) and plain_word(word) not in text.lower_case
            if word[0].isdigit() or (named and not opens):
                yield word


def polarity(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's content words that the text negates, or does not negate, as the answer does.

    A negated word must be negated in the text. Another word of the text must occur there without negation.
    """
    answered = words(final_answer(pair))
    negated = {word: True in forms for word, forms in find_negations(answered).items()}
    agree = [
        negation in text.negations.get(word, ()) or not (negation or word in text.negations)
        for word, negation in negated.items()
    ]
    negates_nothing = any(map(is_negation, answered)) and not any(negated.values())
    return share(sum(agree), len(agree) + negates_nothing)


def answer_type(text: PreparedText, pair: Pair) -> float:
    """1 if the answer has the form that an English question asks for (who, when, where, why, how many), else 0."""
    return float(fits_question(words(question_stem(pair)), words(final_answer(pair))))


def fits_question(question: list[str], answer: list[str]) -> bool:
    """False only for an answer that is plainly of another kind."""
    asked, answered = [plain_word(word) for word in question], [plain_word(word) for word in answer]
    if not asked or not answered:
        return True
    numbered = any(word[0].isdigit() for word in answered)
    timed = not TIMES.isdisjoint(answered)
    match asked[0], asked[1:2]:
        case "how", [amount] if amount in AMOUNTS:
            return numbered or not NUMBERS.isdisjoint(answered) or (amount in ("long", "often") and timed)
        case "when", _:
            return numbered or timed
        case (("who" | "whom" | "whose"), _):
            return answered[0] not in NO_PERSON
        case "where", _:
            return not PLACES.isdisjoint(answered) or any(word[0].isupper() and is_content(word) for word in answer)
        case "why", _:
            return len(answered) > SHORT_REASON
    return True


def unrepeated(text: PreparedText, pair: Pair) -> float:
    """The share of distinct three-word runs, in the question or in the answer, whichever is lower."""
    shares = []
    for written in (stems(pair.question), stems(answer_text(pair))):
        runs = list(zip(*(written[start:] for start in range(REPEATED)), strict=False))
        shares.append(share(len(set(runs)), len(runs)))
    return min(shares)


def language(text: PreparedText, pair: Pair) -> float:
    """The overlap of the language probabilities of pair and text, times the share of letters in the text's scripts."""
    written = f"{question_stem(pair)} {answer_text(pair)}"
    letters = [letter for letter in written if letter.isalpha()]
    if not letters or not text.scripts:
        raise Unscored("no_letters")
    known = sum(script(letter) in text.scripts for letter in letters)
    likely = find_languages(written)
    common = sum(min(probability, likely.get(name, 0.0)) for name, probability in text.languages.items())
    return common * share(known, len(letters))


def options(text: PreparedText, pair: Pair) -> float:
    """1 if the answer is one of two or more different options. With an engine, synth.verify.verifier scores it."""
    if not pair.options:
        raise Unscored("no_options")
    different = len({plain(option) for option in pair.options}) == len(pair.options) >= 2
    return float(different and gold_option(pair) is not None)


TEXT_SCORES: dict[str, Callable[[PreparedText, Pair], float]] = {
    score.__name__: score
    for score in (
        grounded,
        quoted,
        located,
        question_grounded,
        entities,
        polarity,
        answer_type,
        unrepeated,
        language,
        options,
    )
}


ANSWERED = {"grounded": 5.0, "quoted": 3.8, "brevity": 5.99, "constant": -3.98}
ASKED = {"question_grounded": 12.28, "constant": -4.4}
AS_THEY_ARE = ("entities", "polarity", "answer_type", "unrepeated")
PARTS = ("grounded", "quoted", "question_grounded", "language", *AS_THEY_ARE)
UNSURE_LANGUAGE = 0.5  # a pair of a dozen words has this probability of its language, not always more


def combined(pair: Pair, parts: dict[str, float]) -> float:
    """`parts` are the scores of `PARTS`. An absent one counts as 1."""
    known = dict.fromkeys(PARTS, 1.0) | parts
    result = min(1.0, known["language"] / UNSURE_LANGUAGE)
    result *= sigmoid(weighted(ANSWERED, known | {"brevity": brevity(pair)})) * sigmoid(weighted(ASKED, known))
    for name in AS_THEY_ARE:
        result *= known[name]
    return result


def brevity(pair: Pair) -> float:
    """A short answer that is not in the text may be a correct summary. A long one rarely is."""
    return 1 / (1 + len(words(final_answer(pair))))


def weighted(weights: dict[str, float], known: dict[str, float]) -> float:
    return sum(weight * (1.0 if name == "constant" else known[name]) for name, weight in weights.items())


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))
