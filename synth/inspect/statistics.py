"""Statistics of groups: pairs per text, answers, questions, formats, reasons of rejection, scores.

Guarantees: a directory larger than the sample is sampled evenly over its records, the same ones at each call. Memory
grows with the sample only.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from ipt_jax.corpus.records import Pair, SynthGroup
from ipt_jax.corpus.shards import READ_RECORDS, Shards
from synth.format.wire import final_answer, question_stem
from synth.groups import decode_group

FIRST_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
GAP = re.compile(r"_{2,}|\[blank\]|\[mask\]", re.IGNORECASE)
# What a question asks for, by its first words. The first line that matches counts.
CATEGORIES = {
    "quantity": "how many|how much|how old|how long|how far|how often|how tall|how big",
    "person": "who|whose|whom",
    "time": "when|what year|in what year|what time|what day",
    "place": "where|in which country|in which city|what country|what city",
    "reason": "why|what caused|for what reason|how come",
    "manner": "how",
    "thing or fact": "what|which|in what|in which|on what|to what|at what|by what|with what|from what|of what|to which",
    "yes or no": (
        "is|are|was|were|am|do|does|did|can|could|has|have|had|will|would|should|may|might|must|isn't|aren't|wasn't|"
        "weren't|don't|doesn't|didn't|true or false"
    ),
    "instruction": (
        "name|list|describe|explain|summarize|summarise|write|give|tell|complete|identify|define|translate|choose|"
        "select|state|discuss|compare|find|fill|answer|rewrite|paraphrase|classify|decide|determine|provide|generate|"
        "finish|continue|arrange|calculate|suggest|outline"
    ),
}
PATTERNS = {name: re.compile(rf"(?:{words})\b") for name, words in CATEGORIES.items()}


@dataclass
class GroupStatistics:
    """Counts over `groups` of `total` groups. Formats, words, categories and scores are of accepted pairs."""

    total: int
    groups: int = 0
    texts: int = 0
    accepted: int = 0
    pairs_a_text: Counter[int] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    first_words: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, group: SynthGroup) -> None:
        self.groups += 1
        for text in group.texts:
            accepted = text.accepted_pairs
            self.texts += 1
            self.accepted += len(accepted)
            self.pairs_a_text[len(accepted)] += 1
            self.reasons.update(pair.rejection for pair in text.pairs if pair.rejection)
            for pair in accepted:
                self.add_pair(pair)

    def add_pair(self, pair: Pair) -> None:
        question = question_stem(pair)
        self.formats[pair.format] += 1
        self.answer_words[len(final_answer(pair).split())] += 1
        self.first_words[first_word(question)] += 1
        self.categories[category(question)] += 1
        for name, score in pair.scores.items():
            if isfinite(score):
                self.scores[name].append(score)


def count_groups(shards: Shards, sample: int) -> GroupStatistics:
    stats = GroupStatistics(total=len(shards))
    for group in spread(shards, sample):
        stats.add(group)
    return stats


def spread(shards: Shards, sample: int) -> Iterator[SynthGroup]:
    """At most `sample` groups, evenly spread."""
    total = len(shards)
    places = [place * total // sample for place in range(sample)] if sample < total else list(range(total))
    for start in range(0, len(places), READ_RECORDS):
        for record in shards.__getitems__(places[start : start + READ_RECORDS]):
            yield decode_group(record, shards)


def first_word(question: str) -> str:
    found = FIRST_WORD.search(question)
    return found[0].lower() if found else "(no word)"


def category(question: str) -> str:
    """What the question asks for."""
    if GAP.search(question):
        return "gap to fill"
    start = question.casefold().lstrip(" \t\n\"'“‘(")
    return next((name for name, pattern in PATTERNS.items() if pattern.match(start)), "other")
