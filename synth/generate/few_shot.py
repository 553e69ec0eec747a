"""One few-shot group: a coroutine that asks for its texts' pairs one after the other (design decision 8).

Guaranteed: prompt and answer fit the model's length, counted with the synthesizer's own tokens; a text too long alone
is cut at a sentence end and its span recorded; a history too long loses its oldest examples; whatever the model writes,
or fails to write, becomes a record. Groups know nothing of each other, so nothing waits for a round to end.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ipt_jax.core.errors import Fault
from ipt_jax.core.hashing import digest
from ipt_jax.corpus.records import Document, GroupText, Pair, SynthGroup
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine import Completion, Engine, GenerationRequest, RequestFailed, with_retries
from synth.format.parser import parse_completion
from synth.format.prompt import Prompt, context_tokens
from synth.format.truncate import Span, fit_text, surely_fits
from synth.generate.grouping import Group, whole
from synth.verify.verifier import Verifier

MEND = "mend the cause, and run again with --retry-failed"
HOPELESS = 50  # texts that failed before any was answered: what fails them would fail all
TOLD = 5  # failures that are told one by one
log = logging.getLogger(__name__)


class Failures:
    """The texts that failed in this process, and whether any request was answered."""

    def __init__(self) -> None:
        self.texts, self.reasons, self.answered, self.last = 0, Counter[str](), False, ""

    def add(self, text: str, failure: RequestFailed) -> None:
        """Tells of it, the more seldom the more there were. Raises Fault when nothing but failures has come."""
        self.texts += 1
        self.reasons[failure.reason] += 1
        self.last = f", the last: {failure}"
        if self.texts <= TOLD:
            log.warning("%s: failed, kept without pairs: %s", text, failure)
        elif self.texts.bit_count() == 1:  # 8, 16, 32, …
            log.warning("%d texts have failed (%s)%s", self.texts, counted(self.reasons), self.last)
        if self.texts >= HOPELESS and not self.answered:
            raise Fault(f"no request was answered and {self.texts} texts have failed{self.last}; {MEND}")


def counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


@dataclass(frozen=True)
class Chain:
    """What all groups of a run have in common: the model's name and contents, the budget, the examples shown first."""

    synthesizer: SynthesizerSettings
    tokenizer: Tokenizer
    seed: int
    examples: list[list[int]]
    name: str
    weights: str
    fingerprint: str
    verifier: Verifier | None = None
    failures: Failures = field(default_factory=Failures)

    async def run(self, engine: Engine, group: Group) -> SynthGroup:
        """The group's record. A text of which nothing fits the budget is left out and counted."""
        prompt = Prompt(self.tokenizer)
        prompt.examples = list(self.examples)
        texts: list[GroupText] = []
        meta = {"number": group.number, "texts_cut": 0, "texts_split": 0, "examples_dropped": 0}
        meta |= {"cache_lost_tokens": 0, "recoded_tokens": 0, "no_room": 0}
        for number, (text, part) in enumerate(zip(group.texts, group.spans, strict=True), start=1):
            span = self.fit(text.text, part)
            if span is None:
                meta["no_room"] += 1
                continue
            meta["texts_cut"] += span != part
            meta["texts_split"] += part != whole(text)
            texts.append(await self.ask(engine, prompt, group.id, text, span, number, meta))
        answer = SynthGroup(group.id, texts, self.name, self.weights, self.sampling, self.fingerprint, meta)
        return await self.verifier.run(engine, answer) if self.verifier else answer

    def fit(self, text: str, part: Span) -> Span | None:
        """As much of the part as a prompt of its own can hold; None where not even one character can."""
        limit = self.synthesizer.max_prompt_tokens
        asked = text[slice(*part)]
        if surely_fits(asked, self.tokenizer, limit):  # spares encoding most texts twice
            return part
        size = fit_text(asked, self.tokenizer, limit)[1]
        if size < len(asked) and context_tokens(asked[:size], self.tokenizer) > limit:
            return None
        return part[0], part[0] + size

    async def ask(
        self,
        engine: Engine,
        prompt: Prompt,
        group_id: str,
        text: Document,
        span: Span,
        number: int,
        meta: dict[str, int],
    ) -> GroupText:
        """One round: asks for the text's pairs and takes the accepted ones into the prompt."""
        context = text.text[slice(*span)]
        shown = len(prompt.examples)
        prompt_ids = prompt.open(context, self.synthesizer.max_prompt_tokens)
        meta["examples_dropped"] += shown - len(prompt.examples)
        completion = await self.generate(engine, prompt_ids, group_id, number)
        meta["recoded_tokens"] += len(completion.ids) if completion.recoded else 0
        pairs = parse_completion(self.tokenizer.decode(completion.ids), finished=completion.finish_reason == "stop")
        meta["cache_lost_tokens"] += close(prompt, completion.ids, pairs)
        return GroupText(
            raw_id=text.id,
            start=span[0],
            end=span[1],
            text=context,
            source=text.source,
            pairs=pairs,
            round=number,
            prompt_tokens=completion.prompt_tokens,
            cached_prompt_tokens=completion.cached_prompt_tokens,
            completion_tokens=len(completion.ids),
            finish_reason=completion.finish_reason,
        )

    async def generate(self, engine: Engine, prompt_ids: list[int], group_id: str, number: int) -> Completion:
        """The engine's completion; when it failed every time, an empty one that was finished by the failure."""
        request = GenerationRequest(
            f"{group_id}/{number}",
            prompt_ids,
            max_new_tokens=self.synthesizer.max_new_tokens,
            temperature=self.synthesizer.temperature,
            seed=int(digest([self.seed, "generate", group_id, number])[:8], 16),
            priority=-number,
        )
        try:
            completion = await with_retries(
                lambda attempt: engine.generate(replace(request, id=f"{request.id}/{attempt}"))
            )
        except RequestFailed as failure:
            self.failures.add(f"group {group_id}, text {number}", failure)
            return Completion([], failure.reason, len(prompt_ids), 0)
        self.failures.answered = True
        return completion

    @property
    def sampling(self) -> dict[str, Any]:
        return {
            **self.synthesizer.model_dump(include={"max_model_len", "max_new_tokens", "temperature"}),
            "seed": self.seed,
        }


def close(prompt: Prompt, completion_ids: list[int], pairs: list[Pair]) -> int:
    """Closes the open example; the number of its kept tokens that a prefix cache cannot reuse.

    Tokens behind a rejected pair that was cut out have moved, so their cached keys and values no longer fit.
    """
    opened, before = len(prompt.current), len(prompt.examples)
    prompt.close(completion_ids, pairs)
    if len(prompt.examples) == before:
        return 0
    kept = prompt.examples[-1][opened:-1]
    same = next((i for i, (a, b) in enumerate(zip(kept, completion_ids, strict=False)) if a != b), len(kept))
    return len(kept) - same
