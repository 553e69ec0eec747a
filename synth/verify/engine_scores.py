"""Scores that need the synthesizer: the probability that it gives an answer, and its own answer.

Prompts are in the synthesizer's wire format: the text's block, then the question up to `<ANS>`. The text's tokens come
first, so that the engine's prefix cache serves all pairs of a text.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from math import exp

from ipt_jax.core.seeding import draw
from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine import Engine, GenerationRequest, RequestFailed, with_retries
from synth.format.parser import gold_option
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
from synth.text.words import plain_word, stem, words
from synth.verify.text_scores import Unscored, sigmoid

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
        return before + self.judge.tokenizer.encode(cue, continuing=len(before) > 1)

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
    alone = case.opened[:1]  # BOS only
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
    first, second = (
        Counter(stem(word) for word in words(text) if plain_word(word) not in ARTICLES) for text in (one, other)
    )
    common = (first & second).total()
    return 2 * common / (first.total() + second.total()) if common else 0.0


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
