"""One score from the others: how likely is the pair right, as far as its words tell.

    combined = answered · asked · entities · polarity · answer_type · unrepeated · min(1, 2 · language)
    answered = sigmoid(a · grounded + b · quoted + c · brevity + d),  brevity = 1 / (1 + the final answer's words)
    asked    = sigmoid(e · question_grounded + f)

A product, because each part sees faults that the others do not: one weighted sum of all, fitted on all faults at once,
learns to forgive each (AUC for swapped answers 0.86 instead of 0.95). `answered` tells the answers of FairytaleQA's
training split from those of other stories, `asked` its questions. `python benchmarks/verify.py --fit` makes the
weights.
"""

from math import exp

from ipt_jax.corpus.records import Pair
from synth.prompt import final_answer
from synth.verify.words import words

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
