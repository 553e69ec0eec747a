"""Scores that need a pair and its text alone, between 0 and 1, higher for better (docs/verify.md has the table).

Guaranteed: a pure function of text and pair; what cannot be judged raises `Unscored` with its reason, and a score whose
object is missing (no name in the answer, no number asked for) is 1: nothing speaks against the pair.

Whether an answer has the form that its English question asks for. Refuses only what is plainly of another kind.

One score from the others: how likely is the pair right, as far as its words tell.

    combined = answered · asked · entities · polarity · answer_type · unrepeated · min(1, 2 · language)
    answered = sigmoid(a · grounded + b · quoted + c · brevity + d),  brevity = 1 / (1 + the final answer's words)
    asked    = sigmoid(e · question_grounded + f)

A product, because each part sees faults that the others do not: one weighted sum of all, fitted on all faults at once,
learns to forgive each (AUC for swapped answers 0.86 instead of 0.95). `answered` tells the answers of FairytaleQA's
training split from those of other stories, `asked` its questions. `python benchmarks/verify.py --fit` makes the
weights.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import exp

from ipt_jax.corpus.records import Pair
from synth.format.parser import gold_option, plain
from synth.format.wire import final_answer, question_stem
from synth.text.sentences import sentences
from synth.text.words import content_stems, content_words, is_content, is_negation, plain_word, stem, words
from synth.verify.prepared_text import PreparedText, in_common, languages, script, turned_stems

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


def fits_question(question: str, answer: str) -> bool:
    asked, told = [plain_word(word) for word in words(question)], [plain_word(word) for word in words(answer)]
    if not asked or not told:
        return True
    numbered = any(word[0].isdigit() for word in told)
    match asked[0], asked[1:2]:
        case "how", [amount] if amount in AMOUNTS:
            return numbered or not NUMBERS.isdisjoint(told) or (amount in ("long", "often") and is_time(told))
        case "when", _:
            return numbered or is_time(told)
        case (("who" | "whom" | "whose"), _):
            return told[0] not in NO_PERSON
        case "where", _:
            return not PLACES.isdisjoint(told) or any(word[0].isupper() and is_content(word) for word in words(answer))
        case "why", _:
            return len(told) > SHORT_REASON
    return True


def is_time(told: list[str]) -> bool:
    return not TIMES.isdisjoint(told)


REPEATED = 3  # words that make a repetition when they come again


class Unscored(Exception):
    """The score cannot be given; the message is the reason, counted as such."""


def told(pair: Pair) -> str:
    """The answer without the words that only the format puts in."""
    return f"{pair.rationale or ''} {final_answer(pair)}"


def share(hits: int, all_: int) -> float:
    return hits / all_ if all_ else 1.0


def grounded(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's content words that stand in the text; of reasoning and final answer, the mean.

    An answer without one ('Yes.', 'He did.') says what its question says, so the question's words count.
    """
    parts = [content_words(part) for part in (final_answer(pair), pair.rationale or "")]
    judged = [part for part in parts if part] or [content_words(question_stem(pair))]
    if not judged[0]:
        raise Unscored("no_words")
    return sum(share(sum(stem(word) in text.stems for word in part), len(part)) for part in judged) / len(judged)


def quoted(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's neighbouring words that are neighbours in the text; of a single word, its presence."""
    stems = [stem(word) for word in words(told(pair))]
    if not stems:
        raise Unscored("no_words")
    if len(stems) == 1:
        return float(stems[0] in text.stems)
    return share(sum(couple in text.neighbours for couple in pairwise(stems)), len(stems) - 1)


def located(text: PreparedText, pair: Pair) -> float:
    """Two sentences in a row that hold much of question and answer: the best product of the two shares."""
    asked, answered = content_stems(question_stem(pair)), content_stems(told(pair))
    if not asked and not answered:
        raise Unscored("no_words")
    found = (
        (share(len(asked & near), len(asked)), share(len(answered & near), len(answered))) for near in text.windows
    )
    return max((one * other for one, other in found), default=0.0)


def question_grounded(text: PreparedText, pair: Pair) -> float:
    """The share of the question's content words that stand in the text."""
    asked = content_stems(question_stem(pair))
    if not asked:
        raise Unscored("no_words")
    return share(len(asked & text.stems), len(asked))


def entities(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's names and numbers that stand in text or question."""
    asked = {stem(word) for word in words(pair.question)}
    named = [stem(word) for word in names(told(pair), text)]
    return share(sum(name in text.stems or name in asked for name in named), len(named))


def names(answer: str, text: PreparedText) -> Iterator[str]:
    """Numbers, and capitalised words that the text has nowhere in lower case.

    Of several sentences' first words, which are capitalised anyway, only those that another such word follows.
    """
    parts = sentences(answer)
    for found in map(words, parts):
        for place, word in enumerate(found):
            opens = place == 0 and len(parts) > 1 and not any(other[0].isupper() for other in found[1:2])
            named = word[0].isupper() and is_content(word) and plain_word(word) not in text.lower_case
            if word[0].isdigit() or (named and not opens):
                yield word


def polarity(text: PreparedText, pair: Pair) -> float:
    """The share of the answer's content words that the text affirms, or negates, as the answer does.

    A negated word must stand negated in the text; another one, where it stands there, must stand plain somewhere.
    """
    answered = words(final_answer(pair))
    turned = turned_stems(answered)
    agree = [
        negated in text.turned.get(word, ()) or not (negated or word in text.turned)
        for word, ways in turned.items()
        for negated in [True in ways]
    ]
    negates_nothing = any(map(is_negation, answered)) and not any(True in ways for ways in turned.values())
    return share(sum(agree), len(agree) + negates_nothing)


def answer_type(text: PreparedText, pair: Pair) -> float:
    """1 where the answer has the form that the question asks for (who, when, where, why, how many), else 0."""
    return float(fits_question(question_stem(pair), final_answer(pair)))


def unrepeated(text: PreparedText, pair: Pair) -> float:
    """The share of three-word runs, of question and of answer, that come once there; the lower of the two."""
    return min(map(share_unrepeated, (pair.question, told(pair))))


def share_unrepeated(written: str) -> float:
    stems = [stem(word) for word in words(written)]
    runs = Counter(zip(*(stems[start:] for start in range(REPEATED)), strict=False))
    return share(len(runs), runs.total())


def language(text: PreparedText, pair: Pair) -> float:
    """What the pair's likely languages share with the text's, times the share of its letters in the text's scripts."""
    written = f"{question_stem(pair)} {told(pair)}"
    letters = [letter for letter in written if letter.isalpha()]
    if not letters or not text.scripts:
        raise Unscored("no_letters")
    known = sum(script(letter) in text.scripts for letter in letters)
    return in_common(text.languages, languages(written)) * share(known, len(letters))


def options(text: PreparedText, pair: Pair) -> float:
    """1 where the answer is one of two or more different options. With an engine, `synth.verify.engine_scores` goes
    on."""
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
UNSURE_LANGUAGE = 0.5  # of a pair: a dozen words are enough for half of the probability, not always for more


def combined(pair: Pair, parts: dict[str, float]) -> float:
    """`parts` are the scores of `PARTS`; one that could not be given speaks neither way and is left out as 1."""
    known = dict.fromkeys(PARTS, 1.0) | parts
    result = min(1.0, known["language"] / UNSURE_LANGUAGE)
    result *= sigmoid(weighted(ANSWERED, known | {"brevity": brevity(pair)})) * sigmoid(weighted(ASKED, known))
    for name in AS_THEY_ARE:
        result *= known[name]
    return result


def brevity(pair: Pair) -> float:
    """A short answer that the text does not hold may be a right summary, a long one hardly."""
    return 1 / (1 + len(words(final_answer(pair))))


def weighted(weights: dict[str, float], known: dict[str, float]) -> float:
    return sum(weight * (1.0 if name == "constant" else known[name]) for name, weight in weights.items())


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))
