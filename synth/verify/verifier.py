"""Puts scores on the accepted pairs of a group. Nothing else changes; rejected pairs get none: no filter sees them.

A score that cannot be given is absent from its pair, and its reason is counted in the group's `meta["unscored"]`, so
that a run's figures are sums over its records.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec

from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.config import BETTER_WITH_ENGINE, SynthesizerSettings
from synth.engine import Engine, synthesizer_tokenizer
from synth.format.prompt import Prompt
from synth.verify.engine_scores import Case, Judge, ask_score
from synth.verify.prepared_text import PreparedText
from synth.verify.text_scores import PARTS, TEXT_SCORES, Unscored, combined

VERSION = 1  # of what the scores mean; another one is another recipe
DIGITS = 4  # of a score; sums of rounded scores are whole numbers of 1 / 10 ** DIGITS, and exact
UNSCORED = "unscored"
FoundScores = dict[str, float | str]  # a score, or the reason why there is none


@dataclass(frozen=True)
class Verifier:
    """The scores to give. Without a judge there are only those that need no engine."""

    names: tuple[str, ...]
    judge: Judge | None = None

    @property
    def asked(self) -> list[str]:
        """The scores that an engine gives."""
        return [name for name in self.names if name in BETTER_WITH_ENGINE] if self.judge else []

    def read(self, group: SynthGroup) -> SynthGroup:
        """The group with the scores that need its texts alone."""
        return marked(group, [self.read_text(text) for text in group.texts])

    async def run(self, engine: Engine, group: SynthGroup) -> SynthGroup:
        """The group with all scores. Texts come one after the other, the pairs of one all at once."""
        if not self.asked:
            return self.read(group)
        found = [await self.ask_text(engine, text, f"{group.id}/{place}") for place, text in enumerate(group.texts)]
        return marked(group, found)

    def read_text(self, text: GroupText) -> list[FoundScores]:
        reading = PreparedText(text.text)
        return [read_pair(reading, pair, self.names) for pair in text.accepted_pairs]

    async def ask_text(self, engine: Engine, text: GroupText, id: str) -> list[FoundScores]:
        assert self.judge is not None
        opened = Prompt(self.judge.tokenizer).start_example(text.text)
        cases = [
            Case(self.judge, engine, opened, pair, f"{id}/{place}") for place, pair in enumerate(text.accepted_pairs)
        ]
        found = self.read_text(text)
        return list(await asyncio.gather(*(self.ask_pair(case, one) for case, one in zip(cases, found, strict=True))))

    async def ask_pair(self, case: Case, found: FoundScores) -> FoundScores:
        # Options in a faulty form have their score, 0, and a pair without any has its reason.
        names = [name for name in self.asked if name != "options" or found[name] == 1.0]
        given = await asyncio.gather(*(ask_score(name, case) for name in names))
        return found | dict(zip(names, given, strict=True))


def make_verifier(scores: list[Any], synthesizer: SynthesizerSettings | None, seed: int) -> Verifier:
    """An engine is asked only where a score gains by it."""
    names = tuple(sorted(set(scores)))
    if synthesizer is None or BETTER_WITH_ENGINE.isdisjoint(names):
        return Verifier(names)
    return Verifier(names, Judge(synthesizer, synthesizer_tokenizer(synthesizer), seed))


def read_pair(text: PreparedText, pair: Pair, names: tuple[str, ...]) -> FoundScores:
    """The scores among `names` that need the text alone."""
    wanted = {name for name in names if name in TEXT_SCORES} | set(PARTS if "combined" in names else ())
    found: FoundScores = {}
    for name in sorted(wanted):
        try:
            found[name] = TEXT_SCORES[name](text, pair)
        except Unscored as error:
            found[name] = str(error)
    if "combined" in names:
        known = {name: score for name, score in found.items() if isinstance(score, float)}
        found["combined"] = combined(pair, known) if "grounded" in known else found["grounded"]
    return {name: found[name] for name in names if name in found}


def marked(group: SynthGroup, found: list[list[FoundScores]]) -> SynthGroup:
    """The group with what was found for the accepted pairs of each text; what it held under the same names goes."""
    counted = Counter(group.meta.get(UNSCORED, {}))
    names = {name for pairs in found for one in pairs for name in one}
    reasons = Counter({key: count for key, count in counted.items() if key.partition(".")[0] not in names})
    reasons.update(
        f"{name}.{reason}"
        for pairs in found
        for one in pairs
        for name, reason in one.items()
        if isinstance(reason, str)
    )
    texts = []
    for text, pairs in zip(group.texts, found, strict=True):
        news = iter(pairs)
        scored = [with_scores(pair, next(news)) if pair.accepted else pair for pair in text.pairs]
        texts.append(msgspec.structs.replace(text, pairs=scored))
    meta = {name: value for name, value in group.meta.items() if name != UNSCORED}
    if reasons:
        meta[UNSCORED] = dict(sorted(reasons.items()))
    return msgspec.structs.replace(group, texts=texts, meta=meta)


def with_scores(pair: Pair, found: FoundScores) -> Pair:
    kept = {name: score for name, score in pair.scores.items() if name not in found}
    given = {name: round(score, DIGITS) for name, score in found.items() if isinstance(score, float)}
    return msgspec.structs.replace(pair, scores=dict(sorted((kept | given).items())))


def tally_scores(group: SynthGroup) -> Counter[str]:
    """The figures of one group: 'score.NAME' is the sum in units of 1 / 10 ** DIGITS, 'scored.NAME' the number."""
    counts: Counter[str] = Counter()
    for text in group.texts:
        for pair in text.accepted_pairs:
            for name, score in pair.scores.items():
                counts[f"score.{name}"] += round(score * 10**DIGITS)
                counts[f"scored.{name}"] += 1
    counts.update({f"{UNSCORED}.{key}": count for key, count in group.meta.get(UNSCORED, {}).items()})
    return counts


def score_figures(counts: dict[str, int]) -> dict[str, Any]:
    """The mean of each score, and how many could not be given, by reason."""
    numbers = {name.partition(".")[2]: count for name, count in counts.items() if name.startswith("scored.")}
    means = {name: round(counts[f"score.{name}"] / 10**DIGITS / number, DIGITS) for name, number in numbers.items()}
    missing = {name.partition(".")[2]: count for name, count in counts.items() if name.startswith(f"{UNSCORED}.")}
    return {"scores": means, UNSCORED: missing}
