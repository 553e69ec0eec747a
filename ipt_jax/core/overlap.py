"""Token F1, for answers that are compared with expected ones."""

from collections import Counter
from collections.abc import Iterable


def token_f1(predicted: Iterable[str], expected: Iterable[str]) -> float:
    """Harmonic mean of precision and recall over words, with repeats. 0 if no word is shared."""
    first, second = Counter(predicted), Counter(expected)
    shared = (first & second).total()
    return 2 * shared / (first.total() + second.total()) if shared else 0.0
