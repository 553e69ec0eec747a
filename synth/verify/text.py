"""Scores that need a pair and its text alone, between 0 and 1, higher for better (docs/verify.md has the table).

Guaranteed: a pure function of text and pair; what cannot be judged raises `Unscored` with its reason, and a score whose
object is missing (no name in the answer, no number asked for) is 1: nothing speaks against the pair.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

from ipt_jax.corpus.records import Pair
from synth.parse import gold_option, plain
from synth.prompt import final_answer, question_stem
from synth.verify.answer_type import fits_question
from synth.verify.language import in_common, languages, script
from synth.verify.reading import Reading, turned_stems
from synth.verify.words import content_stems, content_words, is_content, is_negation, plain_word, sentences, stem, words

REPEATED = 3  # words that make a repetition when they come again


class Unscored(Exception):
    """The score cannot be given; the message is the reason, counted as such."""


def told(pair: Pair) -> str:
    """The answer without the words that only the format puts in."""
    return f"{pair.rationale or ''} {final_answer(pair)}"


def share(hits: int, all_: int) -> float:
    return hits / all_ if all_ else 1.0


def grounded(text: Reading, pair: Pair) -> float:
    """The share of the answer's content words that stand in the text; of reasoning and final answer, the mean.

    An answer without one ('Yes.', 'He did.') says what its question says, so the question's words count.
    """
    parts = [content_words(part) for part in (final_answer(pair), pair.rationale or "")]
    judged = [part for part in parts if part] or [content_words(question_stem(pair))]
    if not judged[0]:
        raise Unscored("no_words")
    return sum(share(sum(stem(word) in text.stems for word in part), len(part)) for part in judged) / len(judged)


def quoted(text: Reading, pair: Pair) -> float:
    """The share of the answer's neighbouring words that are neighbours in the text; of a single word, its presence."""
    stems = [stem(word) for word in words(told(pair))]
    if not stems:
        raise Unscored("no_words")
    if len(stems) == 1:
        return float(stems[0] in text.stems)
    return share(sum(couple in text.neighbours for couple in pairwise(stems)), len(stems) - 1)


def located(text: Reading, pair: Pair) -> float:
    """Two sentences in a row that hold much of question and answer: the best product of the two shares."""
    asked, answered = content_stems(question_stem(pair)), content_stems(told(pair))
    if not asked and not answered:
        raise Unscored("no_words")
    found = (
        (share(len(asked & near), len(asked)), share(len(answered & near), len(answered))) for near in text.windows
    )
    return max((one * other for one, other in found), default=0.0)


def question_grounded(text: Reading, pair: Pair) -> float:
    """The share of the question's content words that stand in the text."""
    asked = content_stems(question_stem(pair))
    if not asked:
        raise Unscored("no_words")
    return share(len(asked & text.stems), len(asked))


def entities(text: Reading, pair: Pair) -> float:
    """The share of the answer's names and numbers that stand in text or question."""
    asked = {stem(word) for word in words(pair.question)}
    named = [stem(word) for word in names(told(pair), text)]
    return share(sum(name in text.stems or name in asked for name in named), len(named))


def names(answer: str, text: Reading) -> Iterator[str]:
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


def polarity(text: Reading, pair: Pair) -> float:
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


def answer_type(text: Reading, pair: Pair) -> float:
    """1 where the answer has the form that the question asks for (who, when, where, why, how many), else 0."""
    return float(fits_question(question_stem(pair), final_answer(pair)))


def unrepeated(text: Reading, pair: Pair) -> float:
    """The share of three-word runs, of question and of answer, that come once there; the lower of the two."""
    return min(map(share_unrepeated, (pair.question, told(pair))))


def share_unrepeated(written: str) -> float:
    stems = [stem(word) for word in words(written)]
    runs = Counter(zip(*(stems[start:] for start in range(REPEATED)), strict=False))
    return share(len(runs), runs.total())


def language(text: Reading, pair: Pair) -> float:
    """What the pair's likely languages share with the text's, times the share of its letters in the text's scripts."""
    written = f"{question_stem(pair)} {told(pair)}"
    letters = [letter for letter in written if letter.isalpha()]
    if not letters or not text.scripts:
        raise Unscored("no_letters")
    known = sum(script(letter) in text.scripts for letter in letters)
    return in_common(text.languages, languages(written)) * share(known, len(letters))


def options(text: Reading, pair: Pair) -> float:
    """1 where the answer is one of two or more different options. With an engine, `synth.verify.ask` goes on."""
    if not pair.options:
        raise Unscored("no_options")
    different = len({plain(option) for option in pair.options}) == len(pair.options) >= 2
    return float(different and gold_option(pair) is not None)


TEXT_SCORES: dict[str, Callable[[Reading, Pair], float]] = {
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
