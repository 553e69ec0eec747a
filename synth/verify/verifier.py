"""Adds scores to the accepted pairs of a group. Rejected pairs get none, because no filter reads them.

A pair without a score has none under that name. The reason is counted in the group's `meta["unscored"]`, so that the
figures of a run are sums over its records.
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
from synth.groups import counts_under
from synth.verify.engine_scores import Case, Judge, ask_score
from synth.verify.text_scores import PARTS, TEXT_SCORES, PreparedText, Unscored, combined

VERSION = 1  # raised when the meaning of a score changes; part of the identity
DIGITS = 4  # of a score; counts hold exact sums in units of 1 / 10 ** DIGITS
UNSCORED = "unscored"
FoundScores = dict[str, float | str]  # a score, or the reason for its absence


@dataclass(frozen=True)
class Verifier:
    """The scores to compute. Without a judge, only those that need no engine."""

    names: tuple[str, ...]
    judge: Judge | None = None

    @property
    def asked(self) -> list[str]:
        """The scores that need the engine."""
        return [name for name in self.names if name in BETTER_WITH_ENGINE] if self.judge else []

    def read(self, group: SynthGroup) -> SynthGroup:
        """The group with the scores that need no engine."""
        return with_scores(group, [self.read_text(text) for text in group.texts])

    async def run(self, engine: Engine, group: SynthGroup) -> SynthGroup:
        """The group with all scores. Texts are scored in order, the pairs of one text concurrently."""
        if not self.asked:
            return self.read(group)
        found = [await self.ask_text(engine, text, f"{group.id}/{place}") for place, text in enumerate(group.texts)]
        return with_scores(group, found)

    def read_text(self, text: GroupText) -> list[FoundScores]:
        prepared = PreparedText(text.text)
        return [read_pair(prepared, pair, self.names) for pair in text.accepted_pairs]

    async def ask_text(self, engine: Engine, text: GroupText, id: str) -> list[FoundScores]:
        assert self.judge is not None
        opened = Prompt(self.judge.tokenizer).start_example(text.text)
        cases = [
            Case(self.judge, engine, opened, pair, f"{id}/{place}") for place, pair in enumerate(text.accepted_pairs)
        ]
        found = self.read_text(text)
        return list(await asyncio.gather(*(self.ask_pair(case, one) for case, one in zip(cases, found, strict=True))))

    async def ask_pair(self, case: Case, found: FoundScores) -> FoundScores:
        # Malformed options already have the score 0, and a pair without options has a reason.
        names = [name for name in self.asked if name != "options" or found[name] == 1.0]
        given = await asyncio.gather(*(ask_score(name, case) for name in names))
        return found | dict(zip(names, given, strict=True))


def make_verifier(scores: list[Any], synthesizer: SynthesizerSettings | None, seed: int) -> Verifier:
    """A verifier with a judge if one of the scores needs an engine or is better with one."""
    names = tuple(sorted(set(scores)))
    if synthesizer is None or BETTER_WITH_ENGINE.isdisjoint(names):
        return Verifier(names)
    return Verifier(names, Judge(synthesizer, synthesizer_tokenizer(synthesizer), seed))


def read_pair(text: PreparedText, pair: Pair, names: tuple[str, ...]) -> FoundScores:
    """The scores among `names` that need no engine."""
    needed = TEXT_SCORES.keys() & {*names, *(PARTS if "combined" in names else ())}
    found: FoundScores = {}
    for name in sorted(needed):
        try:
            found[name] = TEXT_SCORES[name](text, pair)
        except Unscored as error:
            found[name] = str(error)
    if "combined" in names:
        known = {name: score for name, score in found.items() if isinstance(score, float)}
        found["combined"] = combined(pair, known) if "grounded" in known else found["grounded"]
    return {name: found[name] for name in names if name in found}


def with_scores(group: SynthGroup, found: list[list[FoundScores]]) -> SynthGroup:
    """The group with the scores of the accepted pairs of each text. Earlier scores of the same names are replaced."""
    names = {name for pairs in found for one in pairs for name in one}
    earlier = group.meta.get(UNSCORED, {})
    reasons = Counter({key: count for key, count in earlier.items() if key.partition(".")[0] not in names})
    texts = []
    for text, pairs in zip(group.texts, found, strict=True):
        remaining = iter(pairs)
        scored = []
        for pair in text.pairs:
            if pair.accepted:
                new = next(remaining)
                reasons.update(f"{name}.{reason}" for name, reason in new.items() if isinstance(reason, str))
                scores = {name: score for name, score in pair.scores.items() if name not in new}
                scores |= {name: round(score, DIGITS) for name, score in new.items() if isinstance(score, float)}
                pair = msgspec.structs.replace(pair, scores=dict(sorted(scores.items())))
            scored.append(pair)
        texts.append(msgspec.structs.replace(text, pairs=scored))
    meta = {name: value for name, value in group.meta.items() if name != UNSCORED}
    if reasons:
        meta[UNSCORED] = dict(sorted(reasons.items()))
    return msgspec.structs.replace(group, texts=texts, meta=meta)


def tally_scores(group: SynthGroup) -> Counter[str]:
    """The counts of one group: 'score.NAME' is the sum in units of 1 / 10 ** DIGITS, 'scored.NAME' the number."""
    counts: Counter[str] = Counter()
    for text in group.texts:
        for pair in text.accepted_pairs:
            for name, score in pair.scores.items():
                counts[f"score.{name}"] += round(score * 10**DIGITS)
                counts[f"scored.{name}"] += 1
    counts.update({f"{UNSCORED}.{key}": count for key, count in group.meta.get(UNSCORED, {}).items()})
    return counts


def score_figures(counts: dict[str, int]) -> dict[str, Any]:
    """The mean of each score, and the number of pairs without it, by reason."""
    scored = counts_under(counts, "scored.")
    means = {name: round(counts[f"score.{name}"] / 10**DIGITS / number, DIGITS) for name, number in scored.items()}
    return {"scores": means, UNSCORED: counts_under(counts, f"{UNSCORED}.")}
