"""An engine without a model, for tests and rehearsals: its answers follow from the prompt, its faults from settings.

Each pair asks for the word after a few words of the prompt's last context. A request holds a place for
`faults.latency_seconds`, drawn from 0.5 to 1.5 times that. Cached prompt tokens are those that an unlimited prefix
cache would reuse of the same group's last request.
"""

import asyncio
from collections import OrderedDict
from random import Random

from ipt_jax.core.hashing import digest
from ipt_jax.core.seeding import draw
from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import FaultSettings, SynthesizerSettings
from synth.engine.base import Completion, EngineDied, GenerationRequest, Places, RequestFailed, time_limit
from synth.format.prompt import common_prefix
from synth.format.wire import ANSWER_TAG, END_TAG, PAIR_SEPARATOR, QUESTION_TAG, pair_text, wire_pair

REMEMBERED = 8  # groups per place whose last request is remembered: latencies differ by a factor of three at most


class ScriptedEngine:
    def __init__(self, settings: SynthesizerSettings, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.faults = settings.faults or FaultSettings()
        self.places = settings.max_num_seqs
        self._places = Places(self.places)
        self._timeout = settings.request_timeout_seconds
        self._asked = 0
        self._remembered = REMEMBERED * settings.max_num_seqs
        self._last: OrderedDict[str, list[int]] = OrderedDict()

    async def generate(self, request: GenerationRequest) -> Completion:
        prompt_ids = request.prompt_ids
        rng = draw(request.seed if request.temperature > 0 else 0, digest(prompt_ids))
        await self._take_time(rng, request.priority)
        context = request.messages[-1]["content"] if request.messages else last_context(self.tokenizer, prompt_ids)
        if context.endswith(ANSWER_TAG):
            return self._answer_question(context, prompt_ids)
        pairs = [pair_text(pair) for pair in quote_pairs(context, rng)]
        if rng.random() < self.faults.malformed:
            broken = rng.randrange(len(pairs))
            pairs[broken] = malform(pairs[broken], rng)
        ids = self.tokenizer.encode(PAIR_SEPARATOR.join(pairs), continuing=True)
        room = request.max_new_tokens  # the closing EOS takes one of them
        if rng.random() < self.faults.truncated:
            room = min(room, rng.randrange(len(ids)))
        finish_reason, ids = ("stop" if len(ids) < room else "length"), ids[:room]
        chain = request.id.split("/")[0]
        cached = common_prefix(self._last.get(chain, []), prompt_ids)
        self._remember(chain, prompt_ids + ids)
        return Completion(ids, finish_reason, len(prompt_ids), cached)

    async def _take_time(self, rng: Random, priority: int) -> None:
        async with self._places.hold(priority), time_limit(self._timeout):
            await self._work(rng)

    async def _work(self, rng: Random) -> None:
        self._asked += 1
        if self.faults.dies_at is not None and self._asked >= self.faults.dies_at:
            raise EngineDied("the scripted engine died (faults.dies_at)")
        await asyncio.sleep(self.faults.latency_seconds * rng.uniform(0.5, 1.5))
        fault = rng.random()
        if fault < self.faults.error:
            raise RequestFailed("scripted error")
        if fault < self.faults.error + self.faults.timeout:
            await asyncio.get_running_loop().create_future()  # never done

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Per token -0.1 nats, and up to -3 more by the share of the answer's words that the context lacks."""
        await self._take_time(draw(0, digest([prompt_ids, answer_ids])), 0)
        known = set(last_context(self.tokenizer, prompt_ids).partition(QUESTION_TAG)[0].split())
        answered = self.tokenizer.decode(answer_ids).removesuffix(END_TAG).split()
        missing = sum(word not in known for word in answered) / max(1, len(answered))
        return -len(answer_ids) * (0.1 + 3 * missing)

    def _answer_question(self, asked: str, prompt_ids: list[int]) -> Completion:
        """The word of the context after those that the question quotes, or its first word."""
        context, _, question = asked.rpartition(QUESTION_TAG)
        words, before = context.split() or ["nothing"], question.partition('"')[2].partition('"')[0].split()
        ends = [end for end in range(len(words)) if words[max(0, end - len(before)) : end] == before]
        ids = self.tokenizer.encode(f" {words[ends[0] if ends else 0]} {END_TAG}", continuing=True)
        return Completion(ids, "stop", len(prompt_ids), 0)

    def _remember(self, chain: str, ids: list[int]) -> None:
        self._last[chain] = ids
        self._last.move_to_end(chain)
        if len(self._last) > self._remembered:
            self._last.popitem(last=False)

    async def close(self) -> None:
        self._last.clear()


def last_context(tokenizer: Tokenizer, prompt_ids: list[int]) -> str:
    """The text of the open example: after the prompt's last BOS or EOS, without the tags."""
    starts = [place for place, token in enumerate(prompt_ids) if token in (tokenizer.bos_id, tokenizer.eos_id)]
    opened = tokenizer.decode(prompt_ids[starts[-1] + 1 if starts else 0 :])
    return opened.strip().removeprefix("<CON>").removesuffix("</CON>").strip()


def quote_pairs(context: str, rng: Random) -> list[Pair]:
    """One to four pairs of the four formats; every answer is a word of the context."""
    words = context.split() or ["nothing"]
    pairs = []
    for place in rng.sample(range(len(words)), min(len(words), rng.randint(1, 4))):
        before, answer = " ".join(words[max(0, place - 3) : place]), words[place]
        question = f'What stands behind "{before}"?' if before else "What is the first word?"
        others = sorted(set(words) - {answer})
        options = rng.sample([answer, *rng.sample(others, min(3, len(others)))], min(4, len(others) + 1))
        several = len(options) > 1 and rng.random() < 0.5
        rationale = f'The text says "{before} {answer}".' if rng.random() < 0.5 else None
        pairs.append(wire_pair(question, answer, options if several else None, rationale))
    return pairs


def malform(pair: str, rng: Random) -> str:
    """A pair's text with one of the faults that real models make."""
    return rng.choice(
        [
            pair.replace("<ANS>", ""),
            pair.replace("<QUE>", ""),
            pair.replace("<ANS>", "<ANS> twice <ANS>"),
            pair.replace("<QUE>", "<QUE> again <QUE>"),
            pair.replace("</END>", ""),
            f"Sure! {pair}",
            "<QUE> <ANS> yes </END>",
            "<QUE> Why? <ANS> </END>",
            "<QUE> Which?\nOptions:\n- one\n- two <ANS> three </END>",
        ]
    )
