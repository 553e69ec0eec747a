"""One few-shot group: a coroutine that asks for the pairs of its texts, one text after the other (design decision 8).

Guaranteed: prompt and answer fit the model's length, counted with the synthesizer's tokens; a text too long for a
prompt is cut at a sentence end and its span recorded; a history too long loses its oldest examples; every answer or
failure of the model is recorded. Groups are independent of each other: no request waits for a round to end.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.seeding import uniform
from ipt_jax.core.stage import format_counts
from ipt_jax.corpus.paths import contents_digest
from ipt_jax.corpus.records import Document, GroupText, SynthGroup
from ipt_jax.corpus.sources import find_files
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.collect.data_sets import CollectInput, DataSet, RowTally, merge_examples, read_examples
from synth.config import OPTIONAL_MEANING, RunSettings, SeedExamples, SynthesizerSettings
from synth.engine.base import FAILURES, Completion, Engine, GenerationRequest, RequestFailed, with_retries
from synth.format.chat import ChatPrompt, chat_format, text_tokens
from synth.format.parser import parse_completion
from synth.format.prompt import Prompt, context_tokens
from synth.format.reply import read_reply
from synth.format.truncate import Span, fit_text, surely_fits
from synth.groups import Group, full_span
from synth.verify.verifier import Verifier, make_verifier

RERUN = "fix the cause and rerun with --retry-failed"
LEAST_TEXT_TOKENS = 16  # a prompt with less room for a text is a mistake in the recipe
ENOUGH_PAIRS = 4  # of a seed example: more do not make it better
HOPELESS = 50  # failed texts before the first answer: all would fail
REPORTED = 5  # failures that are reported one by one
log = logging.getLogger(__name__)


class Failures:
    """The texts that failed in this process, and whether any request was answered."""

    def __init__(self) -> None:
        self.texts, self.reasons, self.answered, self.last = 0, Counter[str](), False, ""

    def add(self, text: str, failure: RequestFailed) -> None:
        """Reports the failure, later ones less often. Raises Fault if many requests failed and none was answered."""
        self.texts += 1
        self.reasons[failure.reason] += 1
        self.last = f", the last: {failure}"
        if self.texts <= REPORTED:
            log.warning("%s: failed, stored without pairs: %s", text, failure)
        elif self.texts.bit_count() == 1:  # 8, 16, 32, …
            log.warning("%d texts have failed (%s)%s", self.texts, format_counts(self.reasons), self.last)
        if self.texts >= HOPELESS and not self.answered:
            raise Fault(f"no request was answered and {self.texts} texts have failed{self.last}; {RERUN}")


@dataclass(frozen=True)
class Chain:
    """What all groups of a run share: the model's name and contents, the budget, the seed examples."""

    synthesizer: SynthesizerSettings
    tokenizer: Tokenizer
    seed: int
    examples: list[Any]
    name: str
    weights: str
    fingerprint: str
    verifier: Verifier | None = None
    failures: Failures = field(default_factory=Failures)

    async def run(self, engine: Engine, group: Group) -> SynthGroup:
        """The group's record. A text of which nothing fits the budget is dropped and counted."""
        prompt = self.new_prompt(self.examples)
        texts: list[GroupText] = []
        meta = {"number": group.number, "texts_cut": 0, "texts_split": 0, "examples_dropped": 0}
        meta |= {"cache_lost_tokens": 0, "recoded_tokens": 0, "no_room": 0}
        for number, (text, part) in enumerate(zip(group.texts, group.spans, strict=True), start=1):
            span = self.fit(text.text, part)
            if span is None:
                meta["no_room"] += 1
                continue
            meta["texts_cut"] += span != part
            meta["texts_split"] += part != full_span(text)
            texts.append(await self.ask(engine, prompt, group.id, text, span, number, meta))
        answer = SynthGroup(group.id, texts, self.name, self.weights, self.sampling, self.fingerprint, meta)
        return await self.verifier.run(engine, answer) if self.verifier else answer

    def new_prompt(self, examples: Sequence[Any] = ()) -> Prompt | ChatPrompt:
        chat = chat_format(self.synthesizer, self.tokenizer)
        return ChatPrompt(chat, examples) if chat else Prompt(self.tokenizer, examples)

    def fit(self, text: str, part: Span) -> Span | None:
        """The beginning of the part that a prompt of its own can hold. None if not even one character fits."""
        limit = self.synthesizer.max_prompt_tokens
        asked, count = text[slice(*part)], text_tokens(self.synthesizer, self.tokenizer)
        if count is context_tokens and surely_fits(asked, self.tokenizer, limit):  # saves encoding most texts twice
            return part
        size = fit_text(asked, self.tokenizer, limit, count)[1]
        if size == 1 and count(asked[:1], self.tokenizer) > limit:
            return None
        return part[0], part[0] + size

    async def ask(
        self,
        engine: Engine,
        prompt: Prompt | ChatPrompt,
        group_id: str,
        text: Document,
        span: Span,
        number: int,
        meta: dict[str, int],
    ) -> GroupText:
        """One round: asks for the pairs of a text and appends the accepted ones to the prompt."""
        context = text.text[slice(*span)]
        shown = len(prompt.examples)
        prompt_ids = prompt.open(context, self.synthesizer.max_prompt_tokens)
        meta["examples_dropped"] += shown - len(prompt.examples)
        messages = prompt.messages if isinstance(prompt, ChatPrompt) else None
        completion = await self.generate(engine, prompt_ids, group_id, number, messages)
        meta["recoded_tokens"] += len(completion.ids) if completion.recoded else 0
        add_counts(
            meta,
            text_prompts=completion.text_prompt,
            drafts=completion.drafts,
            accepted_draft_tokens=completion.accepted_draft_tokens,
        )
        answer = self.tokenizer.decode(completion.ids) if completion.text is None else completion.text
        finished = completion.finish_reason == "stop"
        if messages is None:
            pairs = parse_completion(answer, finished)
        else:
            pairs, removed = read_reply(answer, finished or completion.finish_reason in FAILURES)
            add_counts(meta, **{f"chat_{name}": count for name, count in removed.items()})
        meta["cache_lost_tokens"] += prompt.close(completion.ids, pairs)
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

    async def generate(
        self,
        engine: Engine,
        prompt_ids: list[int],
        group_id: str,
        number: int,
        messages: list[dict[str, str]] | None = None,
    ) -> Completion:
        """The engine's completion; after failed retries an empty one, with the failure as its finish reason."""
        request = GenerationRequest(
            f"{group_id}/{number}",
            prompt_ids,
            max_new_tokens=self.synthesizer.max_new_tokens,
            temperature=self.synthesizer.temperature,
            seed=int(digest([self.seed, "generate", group_id, number])[:8], 16),
            priority=-number,
            messages=messages,
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
        fields = self.synthesizer.model_dump(include={"max_model_len", "max_new_tokens", "temperature"})
        return {**fields, **self.synthesizer.stated(OPTIONAL_MEANING), "seed": self.seed}


def add_counts(meta: dict[str, int], **counts: int) -> None:
    """Adds the counts that are not 0."""
    for name, count in counts.items():
        if count:
            meta[name] = meta.get(name, 0) + int(count)


def make_chain(settings: RunSettings, tokenizer: Tokenizer, identity: dict[str, Any]) -> Chain:
    room = settings.synthesizer.max_prompt_tokens - text_tokens(settings.synthesizer, tokenizer)("", tokenizer)
    if room < LEAST_TEXT_TOKENS:
        raise UserError(
            f"synthesizer.max_model_len: {settings.synthesizer.max_model_len} less max_new_tokens leaves a text {room} "
            f"tokens, expected {LEAST_TEXT_TOKENS} or more; raise max_model_len"
        )
    chain = Chain(
        synthesizer=settings.synthesizer,
        tokenizer=tokenizer,
        seed=settings.seed,
        examples=[],
        name=Path(settings.synthesizer.model).resolve().name,
        weights=identity["synthesizer"]["weights"],
        fingerprint=digest(identity),
        verifier=make_verifier(settings.verify, settings.synthesizer, settings.seed) if settings.verify else None,
    )
    return replace(chain, examples=load_seed_examples(settings, tokenizer, chain.new_prompt()))


def seed_identity(seeds: SeedExamples | None) -> dict[str, Any] | None:
    """The seed examples as part of a fingerprint. Raises UserError if they are missing."""
    if seeds is None:
        return None
    try:
        contents = [contents_digest(file.path) for file in find_files(CollectInput(path=seeds.path))]
    except UserError as error:
        raise UserError(str(error).replace("input", "seed_examples", 1)) from error
    return {"contents": contents[0] if len(contents) == 1 else contents, "count": seeds.count}


def load_seed_examples(settings: RunSettings, tokenizer: Tokenizer, prompt: Prompt | ChatPrompt) -> list[Any]:
    """The seed examples: token ids, BOS to EOS, or turns of a chat. Raises UserError if too few rows of the file fit.

    They open every group of a run, so an untuned model can serve and the prefix cache holds them once. Drawn from
    (seed, id) among the rows short enough to leave a text its share of the prompt, rows with several pairs first
    (SmolLM2-135M, three draws of three FairytaleQA rows: 43 pairs on 76 sections, and 18 by uniform draws).
    """
    if settings.seed_examples is None:
        return []
    path, count = settings.seed_examples.path, settings.seed_examples.count
    share = settings.synthesizer.max_prompt_tokens // (count + 1)
    tally = RowTally()
    rows = merge_examples(read_examples(DataSet("seeds", "generic", find_files(CollectInput(path=path))), tally))
    if not rows:
        raise UserError(f"seed_examples {path}: no row has pairs ({tally.misfit or format_counts(tally.dropped)})")
    rows.sort(key=lambda one: (-min(len(one.pairs), ENOUGH_PAIRS), uniform(settings.seed, "seed_examples", one.id)))
    examples = (prompt.sized_example(row.context, row.pairs) for row in rows)
    fitting = list(islice((example for example, size in examples if size <= share), count))
    if len(fitting) < count:
        raise UserError(
            f"seed_examples {path}: count is {count}, but {len(fitting)} of {len(rows)} rows with pairs have at most "
            f"{share} tokens, the room of an example in a prompt; lower count or raise max_model_len"
        )
    return fitting
