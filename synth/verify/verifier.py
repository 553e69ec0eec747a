"""Adds scores to the accepted pairs of a group, with or without an engine. No filter reads rejected pairs.

A pair without a score has none under that name. The reason is counted in the group's `meta["unscored"]`, so that the
figures of a run are sums over its records.

Scores that need the synthesizer are the probability of an answer, and its own answer. Prompts are in its
wire format: the text's block, then the question up to `<ANS>`. The text's tokens come first, so that the engine's
prefix cache serves all pairs of a text.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from math import exp
from typing import Any

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import draw
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from ipt_jax.corpus.tokenizer import Tokenizer
from ipt_jax.evaluate.tasks import token_f1
from synth.config import BETTER_WITH_ENGINE, ENGINE_SCORES, SynthesizerSettings
from synth.engine import synthesizer_tokenizer
from synth.engine.base import Engine, GenerationRequest, RequestFailed, with_retries
from synth.format.parser import gold_option
from synth.format.prompt import Prompt, start_ids
from synth.format.wire import (
    ANSWER_CUE,
    ANSWER_TAG,
    END_TAG,
    PAIR_SEPARATOR,
    QUESTION_TAG,
    final_answer,
    question_stem,
    wire_pair,
)
from synth.groups import counts_under
from synth.text.words import plain_word, stem, words
from synth.verify.text_scores import PARTS, TEXT_SCORES, PreparedText, Unscored, combined, sigmoid

VERSION = 1  # raised when the meaning of a score changes; part of the identity
DIGITS = 4  # of a score; counts hold exact sums in units of 1 / 10 ** DIGITS
UNSCORED = "unscored"
FoundScores = dict[str, float | str]  # a score, or the reason for its absence
ORDERS = 2  # of the options
ARTICLES = frozenset(("a", "an", "the"))
MORE_TOKENS = 16  # limit of the second answer, beyond twice the tokens of the first


@dataclass(frozen=True)
class Judge:
    """What the requests of all pairs share."""

    synthesizer: SynthesizerSettings
    tokenizer: Tokenizer
    seed: int


@dataclass(frozen=True)
class Case:
    """An accepted pair to score. `opened`: the tokens of its text's block. `id`: '<group>/<text>/<pair>'."""

    judge: Judge
    engine: Engine
    opened: list[int]
    pair: Pair
    id: str
    attempt: int = 1

    def ask(self, before: list[int], question: str, reasoning: str | None = None) -> list[int]:
        """The prompt up to the answer's first token."""
        cue = f"{QUESTION_TAG} {question} {ANSWER_TAG}"
        if reasoning is not None:
            cue += f" {reasoning}{ANSWER_CUE.rstrip()}"
        return before + self.judge.tokenizer.encode(cue, continuing=len(before) > len(start_ids(self.judge.tokenizer)))

    async def logprob(self, prompt: list[int], answer: str, name: str) -> tuple[float, int]:
        """The log-probability (nats) of the answer's tokens after the prompt, and their number."""
        ids = self.judge.tokenizer.encode(f" {answer}", continuing=True)
        self.refuse_long(len(prompt) + len(ids) + 1)
        return await self.engine.score(prompt, ids, request_id=f"{self.id}/{name}/{self.attempt}"), len(ids)

    def refuse_long(self, tokens: int) -> None:
        if tokens > self.judge.synthesizer.max_model_len:
            raise Unscored("too_long")


async def open_closed(case: Case) -> float:
    """How much likelier the answer is with the text than without: sigmoid of the difference in nats per token."""
    alone = start_ids(case.judge.tokenizer)  # BOS only
    prompts = {"open": case.ask(case.opened, case.pair.question), "closed": case.ask(alone, case.pair.question)}
    (with_text, tokens), (without, _) = await asyncio.gather(
        *(case.logprob(prompt, case.pair.answer, name) for name, prompt in prompts.items())
    )
    return sigmoid((with_text - without) / tokens)


async def agreement(case: Case) -> float:
    """F1 of the words of the final answer and of the synthesizer's greedy answer."""
    prompt = case.ask(case.opened, case.pair.question)
    limit = 2 * len(case.judge.tokenizer.encode(case.pair.answer)) + MORE_TOKENS
    limit = min(limit, case.judge.synthesizer.max_new_tokens)
    case.refuse_long(len(prompt) + limit)
    request = GenerationRequest(f"{case.id}/agreement/{case.attempt}", prompt, max_new_tokens=limit)
    completion = await case.engine.generate(request)
    answer = case.judge.tokenizer.decode(completion.ids).partition(END_TAG)[0].strip().partition(PAIR_SEPARATOR)[0]
    return word_f1(answer.rpartition(ANSWER_CUE)[2], final_answer(case.pair))


def word_f1(one: str, other: str) -> float:
    """'the old mill', 'old mills' -> 1.0: articles and endings do not count."""
    compared = ([word for word in words(text) if plain_word(word) not in ARTICLES] for text in (one, other))
    return token_f1(*(map(stem, kept) for kept in compared))


async def options(case: Case) -> float:
    """The mean probability of the chosen option among all options, over orders drawn from (seed, id)."""
    chosen = gold_option(case.pair)
    assert chosen is not None  # options that are malformed are not asked for
    orders = [draw(case.judge.seed, "options", case.id, number) for number in range(ORDERS)]
    shown = [order.sample(case.pair.options, len(case.pair.options)) for order in orders]
    shares = await asyncio.gather(*(in_order(case, order, number) for number, order in enumerate(shown)))
    return sum(share[case.pair.options[chosen]] for share in shares) / ORDERS


async def in_order(case: Case, order: list[str], number: int) -> dict[str, float]:
    """The probability of each option and the end of the answer, with the options in this order."""
    pair = case.pair
    question = wire_pair(question_stem(pair), "", order, pair.rationale).question
    prompt = case.ask(case.opened, question, pair.rationale)
    found = await asyncio.gather(
        *(
            case.logprob(prompt, f"{option} {END_TAG}", f"options/{number}/{place}")
            for place, option in enumerate(order)
        )
    )
    best = max(logprob for logprob, _ in found)
    weights = [exp(logprob - best) for logprob, _ in found]
    return {option: weight / sum(weights) for option, weight in zip(order, weights, strict=True)}


ASKED_SCORES: dict[str, Callable[[Case], Awaitable[float]]] = {
    "open_closed": open_closed,
    "agreement": agreement,
    "options": options,
}


async def ask_score(name: str, case: Case) -> float | str:
    """The score, or the reason for its absence."""
    try:
        return await with_retries(lambda attempt: ASKED_SCORES[name](replace(case, attempt=attempt)))
    except Unscored as error:
        return str(error)
    except RequestFailed as error:
        return error.reason


# ---- all scores of a group


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
    if synthesizer is not None and synthesizer.prompt == "chat":  # requests are in the wire format
        if asked := sorted(ENGINE_SCORES.intersection(names)):
            raise UserError(f"scores {', '.join(asked)}: need a synthesizer with prompt: completion; remove them")
        return Verifier(names)
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
