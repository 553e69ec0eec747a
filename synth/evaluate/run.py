"""`synth eval`: scores a synthesizer on held-out questions and answers (paper, section 5.5, Table 5 and Figure 5).

Writes `results.json`, the page `report.html`, and the groups that were scored, as shards that `synth inspect` reads.
Finished groups are in a journal, so that a kill costs only what was in flight. A group with a failed request is neither
stored nor scored; a rerun retries it. Each call computes the measures from the stored groups.

Pairs come from the few-shot chain of `synth run`, unchanged. A gold question is asked in the wire format, after the
text's block and the seed examples. An answer has up to `max_new_tokens`, requested in growing portions until the model
closes it, so that no tokens are spent on the pairs that a synthesizer would write next.
"""

import asyncio
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.files import write_whole, writing
from ipt_jax.core.hashing import digest
from ipt_jax.core.html import write_page
from ipt_jax.core.progress import Progress
from ipt_jax.core.seeding import uniform
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.core.stage import Output, format_counts
from ipt_jax.corpus.paths import contents_digest
from ipt_jax.corpus.records import Document, GroupText, Pair, Segment, SynthGroup, decode, encode
from ipt_jax.corpus.shards import read_shard
from synth.collect.data_sets import CollectInput, DataSet, RowTally, find_data_sets, merge_examples, read_examples
from synth.config import CorpusSettings, RunSettings, SeedExamples, SynthesizerSettings
from synth.engine import open_engine, synthesizer_identity, synthesizer_tokenizer
from synth.engine.base import (
    FAILURES,
    Completion,
    Engine,
    EngineDied,
    GenerationRequest,
    RequestFailed,
    with_retries,
)
from synth.evaluate.quality import ANSWERS, FAILED, EvalTask, Helper, TextKey, results_page, score_sets, scored_texts
from synth.format.prompt import Prompt
from synth.format.truncate import Span
from synth.format.wire import ANSWER_CUE, ANSWER_TAG, END_TAG, FORMAT, PAIR_SEPARATOR, QUESTION_TAG
from synth.generate.few_shot import Chain, make_chain, seed_identity
from synth.generate.journal import Journal
from synth.generate.run import withdrawn_if_empty
from synth.generate.scheduler import Answers, run_groups
from synth.groups import Group, full_span, groups_digest, make_group, open_groups, read_groups
from synth.mine.patterns import rules_digest
from synth.mine.run import MineSettings, mine_text

SHARDS = "groups"
FIRST_PORTION = 24  # tokens of an answer's first request; each further one asks for twice as many
FindPairs = Callable[[Document], list[Pair] | None]


class TaskSettings(CollectInput):
    """A data set with gold pairs: rows {id, context, qa: [{question, answer, …}]}, as `synth collect` reads them."""

    seen: bool = True
    """Whether the synthesizer was tuned on this kind of data. Means are reported for seen and unseen sets apart."""


class EvalSettings(Settings):
    """The recipe of `synth eval`."""

    synthesizer: SynthesizerSettings | None = None
    """Model and engine that write pairs and answers. null: score `groups`, or the rules of `synth mine`."""
    groups: PathText | None = None
    """Output of `synth run`, `mine` or `verify` over the same texts, to score instead. Answers are not measured."""
    tasks: list[TaskSettings] = Field(min_length=1)
    """Data sets with gold pairs."""
    few_shot: int = Field(default=0, ge=0)
    """Texts per chain (M), as `rounds` of `synth run`. 0: each text alone."""
    seed_examples: SeedExamples | None = None
    """Texts with gold pairs to show before each chain. They are not scored, if a task contains them."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum texts per task, drawn from (seed, id). null: all."""
    helper: SynthesizerSettings | None = None
    """Model whose loss on gold answers is measured with and without the pairs in its prompt. null: not measured."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("groups")
    @classmethod
    def _instead_of_a_model(cls, groups: str | None, info: ValidationInfo) -> str | None:
        if groups is not None and info.data.get("synthesizer") is not None:
            raise ValueError("existing groups are scored without a synthesizer; remove one of the two")
        return groups


class Evaluation(NamedTuple):
    """What the steps of one call share. `groups` of all tasks are numbered through; those of one task are a shard."""

    settings: EvalSettings
    output: Output
    tasks: list[EvalTask]
    groups: list[list[Group]]
    gold: dict[TextKey, list[Pair]]
    chain: Chain | None
    existing: FindPairs | None

    @property
    def all_groups(self) -> Iterator[Group]:
        return (group for groups in self.groups for group in groups)

    def journal(self, name: str) -> Journal:
        return Journal(self.output.path / "spool" / f"{name}.spool")


def run_evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Asks for what is missing, scores all stored groups and returns what `--json` prints."""
    started = time.monotonic()
    fresh = not Path(settings.output).exists()
    identity, chain = evaluation_identity(settings)
    tasks = [read_task(task, settings, chain) for task in settings.tasks]
    gold = {(task.name, one.id): one.pairs for task in tasks for one in task.examples}
    groups = form_chains(tasks, max(1, settings.few_shot))
    found = None if chain else existing_pairs(settings, groups)
    failed: Counter[str] = Counter()
    with Output(settings.output, stage="eval", identity=identity, shard_name=SHARDS) as output:
        evaluation = Evaluation(settings, output, tasks, groups, gold, chain, found)
        with withdrawn_if_empty(output, fresh):
            if not output.manifest.complete:
                failed = fill(evaluation)
        texts = list(scored_texts(stored_groups(evaluation), gold))
        name = chain.name if chain else Path(settings.groups).name if settings.groups else "rules of synth mine"
        results = {
            **score_sets(tasks, texts, settings.seed),
            **{"synthesizer": name, "few_shot": settings.few_shot, "failed": dict(failed)},
        }
        with writing(output.path):
            write_whole(output.path / "results.json", msgspec.json.format(msgspec.json.encode(results), indent=1))
        write_page(output.path / "report.html", results_page(results, texts))
    if failed:
        count = f"{failed.total():,} requests failed ({format_counts(failed)})"
        print(
            f"synth eval: {count}; their groups are not scored, rerun the same command to retry them", file=sys.stderr
        )
    return {**results, "output": settings.output, "seconds": round(time.monotonic() - started, 3)}


# ---- tasks


def evaluation_identity(settings: EvalSettings) -> tuple[dict[str, Any], Chain | None]:
    """What the stored groups depend on, by contents, and the chain of the synthesizer."""
    identity: dict[str, Any] = {
        "format": FORMAT,
        "tasks": [
            [one.name, one.adapter, *(contents_digest(file.path) for file in one.files)]
            for one in map(data_set_of, settings.tasks)
        ],
        **settings.model_dump(include={"few_shot", "limit", "seed"}),
        "helper": None,
        "groups": settings.groups and groups_digest(open_groups(settings.groups)),
        "rules": None if settings.groups or settings.synthesizer else rules_digest(),
    }
    if settings.helper:
        identity["helper"] = synthesizer_identity(settings.helper, synthesizer_tokenizer(settings.helper))
    if settings.synthesizer is None:
        return identity, None
    seeds, model = settings.seed_examples, settings.synthesizer
    tokenizer = synthesizer_tokenizer(model)
    identity["seed_examples"] = seed_identity(seeds)
    identity["synthesizer"] = synthesizer_identity(model, tokenizer)
    return identity, make_chain(run_settings(settings, model), tokenizer, identity)


def run_settings(settings: EvalSettings, model: SynthesizerSettings) -> RunSettings:
    """The recipe of `synth run` whose groups are scored."""
    return RunSettings(
        synthesizer=model,
        corpus=[CorpusSettings(path=settings.tasks[0].path)],
        rounds=max(1, settings.few_shot),
        seed_examples=settings.seed_examples,
        seed=settings.seed,
        output=settings.output,
    )


def data_set_of(task: TaskSettings) -> DataSet:
    found = find_data_sets([task], exclude=[])
    if len(found) > 1:
        raise UserError(
            f"tasks: {task.path} holds {len(found)} data sets; give each an entry, or set `name` to join them"
        )
    return found[0]


def read_task(task: TaskSettings, settings: EvalSettings, chain: Chain | None) -> EvalTask:
    """The texts of a data set to score: those with pairs, without seed examples, at most `limit` of them."""
    data_set, tally = data_set_of(task), RowTally()
    name, dropped = data_set.name, tally.dropped
    examples = merge_examples(read_examples(data_set, tally))
    if chain and chain.examples:
        prompt = chain.new_prompt()
        shown = [one for one in examples if prompt.sized_example(one.context, one.pairs)[0] in chain.examples]
        dropped["seed_example"] += len(shown)
        examples = [one for one in examples if one not in shown]
    if settings.limit and len(examples) > settings.limit:
        ranked = sorted(examples, key=lambda one: (uniform(settings.seed, "eval", name, one.id), one.id))
        drawn = {one.id for one in ranked[: settings.limit]}
        examples = [one for one in examples if one.id in drawn]
    if not examples:
        raise UserError(
            f"task {name!r}: no text with pairs to score (dropped: {format_counts(dropped)}{'; ' * bool(tally.misfit)}"
            f"{tally.misfit}); check {task.path} and its adapter"
        )
    return EvalTask(name, task.seen, examples, dropped)


def form_chains(tasks: list[EvalTask], texts: int) -> list[list[Group]]:
    """The groups of each task: neighbours in file order."""
    names = Counter(task.name for task in tasks)
    if doubled := [name for name, count in names.items() if count > 1]:
        raise UserError(f"tasks: duplicate name {doubled[0]!r}; set a different `name` for one of them")
    formed: list[list[Group]] = []
    number = 0
    for task in tasks:
        documents = [Document(one.id, task.name, "raw", [Segment(one.context)]) for one in task.examples]
        chains = [documents[start : start + texts] for start in range(0, len(documents), texts)]
        formed.append([make_group(number + place, chain) for place, chain in enumerate(chains)])
        number += len(chains)
    return formed


# ---- asking


def fill(evaluation: Evaluation) -> Counter[str]:
    """Makes the missing groups and seals them. With failed requests, which it returns, nothing is sealed."""
    helper = evaluation.settings.helper
    with closing(evaluation.journal("pairs")) as pairs:
        failed = ask_synthesizer(evaluation, evaluation.chain, pairs) if evaluation.chain else Counter[str]()
        if evaluation.existing:
            copy_pairs(evaluation, evaluation.existing, pairs)
        if failed or helper is None:
            return failed or seal(evaluation, pairs)
        with closing(evaluation.journal("losses")) as losses:
            return ask_helper(evaluation, helper, pairs, losses) or seal(evaluation, losses)


def ask_synthesizer(evaluation: Evaluation, chain: Chain, journal: Journal) -> Counter[str]:
    examinee = Examinee(chain, evaluation.gold)
    return ask(chain.synthesizer, examinee, list(evaluation.all_groups), journal, "synth eval: pairs and answers")


def ask_helper(evaluation: Evaluation, model: SynthesizerSettings, pairs: Journal, journal: Journal) -> Counter[str]:
    """Each text with pairs is joined with another one of its task: the next in an order drawn from (seed, id)."""
    groups = [decode(pairs.read(group.number), SynthGroup) for group in evaluation.all_groups]
    others: dict[TextKey, list[Pair]] = {}
    for task in evaluation.tasks:
        texts = [text for group in groups for text in group.texts if text.source == task.name and text.accepted_pairs]
        texts.sort(key=lambda text: uniform(evaluation.settings.seed, "other", task.name, text.raw_id))
        if len(texts) > 1:
            following = zip(texts, [*texts[1:], texts[0]], strict=True)
            others |= {(task.name, one.raw_id): other.accepted_pairs for one, other in following}
    helper = Helper(model, synthesizer_tokenizer(model), evaluation.gold, others)
    return ask(model, helper, groups, journal, "synth eval: losses of the helper")


def ask(
    model: SynthesizerSettings, asked: Answers[Any], groups: Sequence[Group | SynthGroup], journal: Journal, label: str
) -> Counter[str]:
    """Runs the groups that the journal lacks on one engine and stores them. Returns failed requests by reason."""
    failed: Counter[str] = Counter()
    missing = [group for group in groups if number_of(group) not in journal]
    if not missing:
        return failed
    total, left = (sum(len(group.texts) for group in some) for some in (groups, missing))
    with Progress(total, "texts", label, done=total - left) as progress:

        def put(item: Group | SynthGroup, group: SynthGroup) -> None:
            failed.update(group.meta[FAILED])
            if not group.meta[FAILED]:
                journal.append(number_of(item), encode(group))
            progress.advance(len(item.texts), **({"failed": failed.total()} if failed else {}))

        async def run_missing() -> None:
            engine = open_engine(model, synthesizer_tokenizer(model))
            try:
                await run_groups(engine, asked, iter(missing), put)
            finally:
                await engine.close()

        try:
            asyncio.run(run_missing())
        except EngineDied as error:
            cause = str(error).rstrip(".")
            raise Fault(f"{cause}; finished groups are stored, rerun the same command to resume") from error
    if not len(journal):
        raise Fault(f"all requests failed ({format_counts(failed)}); fix the cause and rerun the same command")
    return failed


def number_of(group: Group | SynthGroup) -> int:
    return group.number if isinstance(group, Group) else int(group.meta["number"])


# ---- existing pairs


def existing_pairs(settings: EvalSettings, groups: list[list[Group]]) -> FindPairs:
    """Finds the pairs of a text by its id: those of all its parts in `groups`, or those of the rules of `synth mine`.

    None for a text that is in no group. Raises UserError if that holds for all texts.
    """
    if settings.groups is None:
        rules = MineSettings(corpus=[CorpusSettings(path="-")], seed=settings.seed, output="-")
        return lambda text: mine_text(text, rules, Counter())
    found: dict[str, list[Pair]] = {}
    for group in read_groups(settings.groups):
        for part in group.texts:
            found.setdefault(part.raw_id, []).extend(part.pairs)
    if not any(text.id in found for chains in groups for group in chains for text in group.texts):
        raise UserError(
            f"groups {settings.groups}: no text has an id of the tasks; make them from the tasks' files with corpus "
            "{text: context, id: id}"
        )
    return lambda text: found.get(text.id)


def copy_pairs(evaluation: Evaluation, find: FindPairs, journal: Journal) -> None:
    """Stores the groups of texts that have existing pairs."""
    settings = evaluation.settings
    for group in evaluation.all_groups:
        texts = [
            GroupText(text.id, *full_span(text), text.text, text.source, pairs, number, 0, 0, 0, "stop")
            for number, text in enumerate(group.texts, start=1)
            if (pairs := find(text)) is not None
        ]
        if group.number not in journal:
            name, meta = Path(settings.groups or "rules").name, {"number": group.number, FAILED: {}}
            record = SynthGroup(group.id, texts, name, "", {"seed": settings.seed}, "", meta)
            journal.append(group.number, encode(record))


# ---- storing


def seal(evaluation: Evaluation, journal: Journal) -> Counter[str]:
    """Writes one shard per task from the journal, and removes the journals. Returns no failures."""
    output = evaluation.output
    for index, groups in enumerate(evaluation.groups):
        if index not in output.entries:
            output.seal(index, len(evaluation.groups), (journal.read(group.number) for group in groups))
    output.finish()
    return Counter()


def stored_groups(evaluation: Evaluation) -> Iterator[SynthGroup]:
    """All groups that are stored so far, without those of earlier steps that were stored again with losses."""
    output = evaluation.output
    if output.manifest.complete:
        shutil.rmtree(output.path / "spool", ignore_errors=True)  # left by a kill after sealing
        for _, entry in sorted(output.entries.items()):
            yield from (decode(record, SynthGroup) for record in read_shard(output.path / entry.name))
        return
    with closing(evaluation.journal("pairs")) as pairs, closing(evaluation.journal("losses")) as losses:
        for group in evaluation.all_groups:
            for journal in (losses, pairs):
                if group.number in journal:
                    yield decode(journal.read(group.number), SynthGroup)
                    break


# ---- what the synthesizer is asked


@dataclass(frozen=True)
class Examinee:
    """A synthesizer that is asked for the pairs of a group's texts and for the answers to their gold questions."""

    chain: Chain
    gold: dict[TextKey, list[Pair]]

    async def run(self, engine: Engine, group: Group) -> SynthGroup:
        chat = self.chain.synthesizer.prompt == "chat"  # gold questions are asked in the wire format
        texts = [] if chat else list(zip(group.texts, group.spans, strict=True))
        asked = (self.answer_text(engine, group.id, *one) for one in texts)
        written, answers = await asyncio.gather(self.chain.run(engine, group), asyncio.gather(*asked))
        failed = Counter[str](text.finish_reason for text in written.texts if text.finish_reason in FAILURES)
        failed.update(reason for found in answers for _, reason in found if reason is not None)
        found = {text.id: [answer for answer, _ in one] for (text, _), one in zip(texts, answers, strict=True)}
        written.meta |= {ANSWERS: found, FAILED: dict(failed)}
        return written

    async def answer_text(
        self, engine: Engine, group_id: str, text: Document, part: Span
    ) -> list[tuple[str, str | None]]:
        """(answer, None) of each gold question, or ("", reason) of a failed one. Empty for a text that has no room."""
        span = self.chain.fit(text.text, part)
        if span is None:
            return []
        gold = self.gold[text.source, text.id]
        ids = [f"{group_id}/{digest(text.id)[:8]}/{place}" for place in range(len(gold))]
        context = text.text[slice(*span)]
        return list(await asyncio.gather(*map(self.answer, [engine] * len(gold), [context] * len(gold), gold, ids)))

    async def answer(self, engine: Engine, context: str, pair: Pair, id: str) -> tuple[str, str | None]:
        settings, tokenizer = self.chain.synthesizer, self.chain.tokenizer
        cue = tokenizer.encode(f"{QUESTION_TAG} {pair.question} {ANSWER_TAG}", continuing=True)
        opened = Prompt(tokenizer, self.chain.examples).open(context, settings.max_prompt_tokens - len(cue))
        request = GenerationRequest(
            id,
            opened + cue,
            max_new_tokens=0,
            temperature=settings.temperature,
            seed=int(digest([self.chain.seed, "answer", id])[:8], 16),
        )
        limit = min(settings.max_new_tokens, settings.max_model_len - len(request.prompt_ids))
        ids: list[int] = []
        portion = FIRST_PORTION
        while (room := min(portion, limit - len(ids))) > 0:
            try:
                completion = await self.continue_answer(engine, request, ids, room)
            except RequestFailed as failure:
                self.chain.failures.add(f"answer {id}", failure)
                return "", failure.reason
            self.chain.failures.answered = True
            ids += completion.ids
            if completion.finish_reason == "stop" or not completion.ids or is_closed(tokenizer.decode(ids)):
                break
            portion *= 2
        return read_answer(tokenizer.decode(ids)), None

    async def continue_answer(
        self, engine: Engine, request: GenerationRequest, ids: Sequence[int], room: int
    ) -> Completion:
        """At most `room` further tokens of an answer that begins with `ids`."""
        further = replace(request, prompt_ids=[*request.prompt_ids, *ids], max_new_tokens=room)
        return await with_retries(
            lambda attempt: engine.generate(replace(further, id=f"{request.id}/{len(ids)}/{attempt}"))
        )


def is_closed(text: str) -> bool:
    return END_TAG in text or PAIR_SEPARATOR in text.lstrip()


def read_answer(text: str) -> str:
    """The final answer of a completion after `<ANS>`: up to `</END>` or a blank line, without reasoning."""
    answer = text.partition(END_TAG)[0].strip().partition(PAIR_SEPARATOR)[0]
    return answer.rpartition(ANSWER_CUE)[2].strip()
