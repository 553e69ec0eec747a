"""`synth collect`: writes the documents that tune a synthesizer from question-answering data sets (paper, section 2).

One shard holds one data set. At most `max_contexts` contexts are used, those with the most pairs, in an order drawn
from (seed, id). A document is a few-shot sequence of one-shot examples of one data set, as many as fit
`few_shot.max_tokens`. Pairs and the EOS after them are targets. The parser of `synth run` reads every pair back: a pair
that it would reject is never a target. Dropped contexts are counted by reason. Reasons of single pairs begin with
`pair_`, and unknown fields of a pair count as `ignored_field_NAME`. All rows are checked before the first write.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import file_digest
from ipt_jax.core.seeding import uniform
from ipt_jax.core.settings import Settings
from ipt_jax.core.stage import NewShard, Output, format_counts, make_shards
from ipt_jax.corpus.records import Document, Pair, Segment, encode
from ipt_jax.corpus.sources import JSONL, find_files, read_jsonl
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.format.parser import parse_completion, question_key, rejected
from synth.format.wire import context_block, example_segments, pair_text, pairs_text, shown, wire_pair

BATCH = 1000  # examples tokenized at once by the tokenizer's threads


class CollectInput(Settings):
    path: str
    """File, directory or glob. Each file is a data set."""
    adapter: Literal["generic"] = "generic"
    """Format of the rows."""
    name: str | None = None
    """Joins the files into one data set of this name."""


class FewShotSettings(Settings):
    """How examples are joined into few-shot documents."""

    tokenizer: str
    """Tokenizer of the model to be tuned."""
    max_tokens: int = Field(4096, ge=1)
    """Maximum tokens per document."""


class CollectSettings(Settings):
    """The recipe of `synth collect`."""

    inputs: list[CollectInput] = Field(min_length=1)
    """Question-answering data sets in JSON Lines (docs/reference/recipes.md)."""
    max_contexts: int = Field(10_000, ge=1)
    """Maximum contexts per data set. Contexts with the most pairs are kept."""
    exclude: list[str] = []
    """Names of data sets to skip."""
    few_shot: FewShotSettings | None = None
    """Join examples of one data set into few-shot documents. null: one example per document."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    output: str
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""


class DataSet(NamedTuple):
    name: str
    adapter: str
    paths: list[Path]


class Example(NamedTuple):
    id: str
    context: str
    pairs: list[Pair]


def run_collect(settings: CollectSettings) -> dict[str, Any]:
    """Writes one shard per data set and returns what `--json` prints."""
    data_sets = find_data_sets(settings)
    few_shot = settings.few_shot
    tokenizer = load_tokenizer(few_shot.tokenizer) if few_shot else None
    identity = {
        "inputs": [[one.name, one.adapter, *map(file_digest, one.paths)] for one in data_sets],
        "max_contexts": settings.max_contexts,
        "seed": settings.seed,
        "few_shot": few_shot and tokenizer and {"tokenizer": tokenizer.digest, "max_tokens": few_shot.max_tokens},
    }
    chosen = [choose(one, settings) for one in data_sets]
    with Output(settings.output, stage="collect", identity=identity, shard_name="documents", remake=True) as output:
        make_shards(
            partial(document_records, settings, tokenizer),
            [(output, chosen)],
            lambda choice: 1,
            unit="data sets",
            label="synth collect",
            workers=1,
        )
        manifest = output.finish()
    return {
        "documents": manifest.records,
        **{name: manifest.count(name) for name in ("contexts", "pairs")},
        "tokens": manifest.tokens if tokenizer else None,
        "dropped": manifest.dropped,
        "datasets": len(manifest.shards),
    }


def find_data_sets(settings: CollectSettings) -> list[DataSet]:
    """The data sets of `inputs` without those in `exclude`. Raises UserError for missing and duplicate ones."""
    found: list[DataSet] = []
    for source in settings.inputs:
        paths = find_files(source.path)
        for path in paths:
            if path.is_dir() or not path.name.removesuffix(".gz").removesuffix(".zst").endswith(JSONL):
                raise UserError(f"input {path}: not JSON Lines; write rows {{id, context, qa}} to a .jsonl file")
        groups = [(source.name, paths)] if source.name else [(path.name.split(".")[0], [path]) for path in paths]
        found += [DataSet(name, source.adapter, files) for name, files in groups]
    names = Counter(one.name for one in found)
    if doubled := [name for name, count in names.items() if count > 1]:
        raise UserError(f"inputs: duplicate data set {doubled[0]!r}; set a different `name` for one of them")
    if unknown := [name for name in settings.exclude if name not in names]:
        raise UserError(f"exclude: no data set {unknown[0]!r} among the inputs; they are {', '.join(sorted(names))}")
    kept = [one for one in found if one.name not in settings.exclude]
    if not kept:
        raise UserError("exclude: no data set is left; remove one from the list")
    return kept


class ChosenContexts(NamedTuple):
    """Positions of the rows of a data set that are used, and why others are not."""

    data_set: DataSet
    positions: set[int]
    dropped: Counter[str]


def choose(data_set: DataSet, settings: CollectSettings) -> ChosenContexts:
    """The `max_contexts` usable rows with the most pairs, ties by draw. Reads all rows and stores their positions."""
    dropped: Counter[str] = Counter()
    usable = 0

    def ranks() -> Iterator[tuple[int, float, int]]:
        nonlocal usable
        for position, example in read_examples(data_set, dropped):
            usable += 1
            yield -len(example.pairs), uniform(settings.seed, "tie", data_set.name, example.id), position

    best = heapq.nsmallest(settings.max_contexts, ranks())
    if not best:
        reasons = format_counts(dropped)
        raise UserError(f"data set {data_set.name!r}: no context has pairs (dropped: {reasons}); fix or exclude it")
    if usable > len(best):
        dropped["beyond_max_contexts"] = usable - len(best)
    return ChosenContexts(data_set, {position for _, _, position in best}, dropped)


def read_examples(data_set: DataSet, dropped: Counter[str]) -> Iterator[tuple[int, Example]]:
    """(position, example) of every usable row. Other rows are counted in `dropped`."""
    position, ids = -1, set()
    for path in data_set.paths:
        for line, row in read_jsonl(path):
            position += 1
            example = _example(row, f"input {path}: line {line}", f"{path.name}:{line}", dropped)
            if isinstance(example, str):
                dropped[example] += 1
            elif example.id in ids:
                dropped["duplicate_id"] += 1
            else:
                ids.add(example.id)
                yield position, example


class QuestionAnswer(msgspec.Struct):
    """A pair of the generic adapter. Unknown fields are counted."""

    question: str
    answer: str
    options: list[str] | None = None
    rationale: str | None = None


class QaRow(msgspec.Struct):
    """A row of the generic adapter."""

    context: str
    qa: list[QuestionAnswer]
    id: Any = None


def _example(values: dict[str, Any], where: str, default_id: str, dropped: Counter[str]) -> Example | str:
    """The row as an example, or the reason to drop it."""
    try:
        row = msgspec.convert(values, QaRow)
    except msgspec.ValidationError as error:
        fields = "{id, context, qa: [{question, answer, options, rationale}]}"
        raise UserError(f"{where}: {error}; write rows {fields}") from error
    if not row.context.strip():
        return "empty_context"
    pairs: dict[tuple[str, ...], Pair] = {}
    for given, entry in zip(row.qa, values["qa"], strict=True):
        dropped.update(f"ignored_field_{name}" for name in entry.keys() - set(QuestionAnswer.__struct_fields__))
        options, rationale = [option.strip() for option in given.options or []], given.rationale
        pair = wire_pair(given.question.strip(), given.answer.strip(), options, rationale and rationale.strip())
        pair = read_back(pair)
        if not pair.accepted:
            dropped[f"pair_{pair.reason}"] += 1
        elif pairs.setdefault(question_key(pair), pair) is not pair:
            dropped["pair_duplicate_question"] += 1
    if not pairs:
        return "no_pairs"
    if any("\ud800" <= letter <= "\udfff" for letter in row.context + pairs_text(list(pairs.values()))):
        return "lone_surrogate"  # JSON may hold one, UTF-8 cannot
    return Example(str(default_id if row.id is None else row.id), row.context.strip(), list(pairs.values()))


def read_back(pair: Pair) -> Pair:
    """The pair as parsed from a synthesizer's output, rejected if parsing changes it.

    Text that a tokenizer may convert to a tag is rejected too: as a target it would teach to end a pair early.
    """
    parsed = parse_completion(pair_text(pair), finished=True)
    plain = shown(pair.question) == pair.question and shown(pair.answer) == pair.answer
    if len(parsed) == 1 and (not parsed[0].accepted or (parsed[0] == pair and plain)):
        return parsed[0]
    return rejected("nested_tag", pair.question, pair.answer)


def document_records(
    settings: CollectSettings, tokenizer: Tokenizer | None, choice: ChosenContexts, shard: NewShard
) -> Iterator[bytes]:
    name = choice.data_set.name
    examples = [one for position, one in read_examples(choice.data_set, Counter()) if position in choice.positions]
    examples.sort(key=lambda one: (uniform(settings.seed, "order", name, one.id), one.id))
    shard.dropped.update(choice.dropped)
    sequences = [[one] for one in examples]
    if tokenizer and settings.few_shot:
        sequences = _pack(examples, settings.few_shot.max_tokens, tokenizer, shard)
        if not sequences:
            limit = settings.few_shot.max_tokens
            raise UserError(f"data set {name!r}: no example fits few_shot.max_tokens = {limit}; increase it")
    for sequence in sequences:
        shard.counts["contexts"] += len(sequence)
        shard.counts["pairs"] += sum(len(one.pairs) for one in sequence)
        yield encode(make_document(name, sequence))


def _pack(examples: list[Example], max_tokens: int, tokenizer: Tokenizer, shard: NewShard) -> list[list[Example]]:
    """Joins examples in order, as many per sequence as fit. An example that is too long is dropped."""
    sequences: list[list[Example]] = []
    room = 0
    for example, size in zip(examples, _sizes(examples, tokenizer), strict=True):
        if size > max_tokens:
            shard.dropped["too_long"] += 1
            continue
        if size > room or not sequences:
            sequences.append([])
            room = max_tokens
        sequences[-1].append(example)
        room -= size
        shard.tokens += size
    return sequences


def _sizes(examples: list[Example], tokenizer: Tokenizer) -> Iterator[int]:
    """Tokens of each example with BOS and EOS, counted per segment as in `ipt tokenize`."""
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        contexts = tokenizer.encode_batch([context_block(one.context) for one in batch])
        answers = tokenizer.encode_batch([pairs_text(one.pairs) for one in batch], continuing=True)
        yield from (len(context) + len(answer) + 2 for context, answer in zip(contexts, answers, strict=True))


def make_document(name: str, sequence: list[Example]) -> Document:
    """One tuning document: its examples in order, each with its own BOS and EOS."""
    segments: list[Segment] = []
    for example in sequence:
        segments += example_segments(example.context, example.pairs)
    meta = {"dataset": name, "contexts": [example.id for example in sequence]}
    return Document(f"{name}/{sequence[0].id}", name, "task", segments, meta=meta)
