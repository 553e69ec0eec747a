"""`synth collect`: writes the documents that tune a synthesizer from question-answering data sets (paper, section 2).

One shard holds one data set. At most `max_contexts` contexts are used, those with the most pairs, in an order drawn
from (seed, id). A document is a few-shot sequence of one-shot examples of one data set, as many as fit
`few_shot.max_tokens`. Pairs and the EOS after them are targets. A context that is too long is cut into passages where
answers are quotes of it. Dropped contexts and pairs are counted by reason. All rows are read before the first write.
"""

import heapq
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.errors import UserError
from ipt_jax.core.progress import Progress
from ipt_jax.core.seeding import uniform
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.core.stage import NewShard, Output, format_counts, make_shards
from ipt_jax.corpus.paths import contents_digest
from ipt_jax.corpus.records import Document, GroupText, Segment, SynthGroup, encode
from ipt_jax.corpus.row_reader import OneOrMore
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.collect.data_sets import (
    EVALUATED,
    CollectInput,
    DataSet,
    Example,
    RowTally,
    bare_name,
    find_data_sets,
    merge_examples,
    read_examples,
)
from synth.format.truncate import split_text
from synth.format.wire import context_block, example_segments, final_answer, pairs_text

BATCH = 1000  # examples tokenized at once by the tokenizer's threads


class FewShotSettings(Settings):
    """How examples are joined into few-shot documents."""

    tokenizer: PathText
    """Tokenizer of the model to be tuned."""
    max_tokens: int = Field(4096, ge=1)
    """Maximum tokens per document."""


class CollectSettings(Settings):
    """The recipe of `synth collect`."""

    inputs: Annotated[list[CollectInput], OneOrMore] = Field(min_length=1)
    """Question-answering data sets (docs/reference/collect.md)."""
    max_contexts: int = Field(10_000, ge=1)
    """Maximum contexts per data set. Contexts with the most pairs are kept."""
    exclude: list[str] = []
    """Names of data sets that are held out: none of their rows is used."""
    few_shot: FewShotSettings | None = None
    """Join examples of one data set into few-shot documents. null: one example per document."""
    write: Literal["tuning", "groups"] = "tuning"
    """tuning: documents that tune a synthesizer. groups: one group per context, for `synth render` to pre-train on."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("write")
    @classmethod
    def _one_context_per_group(cls, write: str, info: ValidationInfo) -> str:
        if write == "groups" and info.data.get("few_shot") is not None:
            raise ValueError("groups hold one context each; remove few_shot")
        return write


def run_collect(settings: CollectSettings) -> dict[str, Any]:
    """Writes one shard per data set and returns what `--json` prints."""
    data_sets = find_data_sets(settings.inputs, settings.exclude)
    warn_of_overlap(data_sets)
    few_shot = settings.few_shot
    tokenizer = load_tokenizer(few_shot.tokenizer) if few_shot else None
    identity = {
        "inputs": [[one.name, one.adapter, *(contents_digest(file.path) for file in one.files)] for one in data_sets],
        "max_contexts": settings.max_contexts,
        "seed": settings.seed,
        "write": settings.write,
        "few_shot": few_shot and tokenizer and {"tokenizer": tokenizer.digest, "max_tokens": few_shot.max_tokens},
    }
    with Progress(None, "rows", "synth collect: read") as progress:
        chosen = [choose(one, settings, progress) for one in data_sets]
    shard_name = "groups" if settings.write == "groups" else "documents"
    with Output(settings.output, stage="collect", identity=identity, shard_name=shard_name, remake=True) as output:
        make_shards(
            partial(document_records, settings, tokenizer, output.manifest.fingerprint),
            [(output, chosen)],
            lambda choice: 1,
            unit="data sets",
            label="synth collect",
            workers=1,
        )
        manifest = output.finish()
    return {
        shard_name: manifest.records,
        **{name: manifest.count(name) for name in ("contexts", "pairs")},
        "tokens": manifest.tokens if tokenizer else None,
        "dropped": manifest.dropped,
        "datasets": len(manifest.shards),
    }


def warn_of_overlap(data_sets: list[DataSet]) -> None:
    """Prints the data sets that are also evaluation tasks of the paper."""
    names = [one.name for one in data_sets if any(task in bare_name(one.name + one.adapter) for task in EVALUATED)]
    if names:
        print(
            f"overlap with evaluation tasks: {', '.join(names)}; a synthesizer tuned on them has seen the task formats "
            "of these benchmarks; add them to `exclude` to hold them out",
            file=sys.stderr,
        )


class ChosenContexts(NamedTuple):
    """Ids of the contexts of a data set that are used, and why others are not."""

    data_set: DataSet
    ids: set[str]
    dropped: Counter[str]


def choose(data_set: DataSet, settings: CollectSettings, progress: Progress) -> ChosenContexts:
    """The `max_contexts` usable contexts with the most pairs, ties by draw. Reads all rows and stores their ids."""
    tally, sizes, shown = RowTally(), Counter[str](), 0
    for example in read_examples(data_set, tally):
        sizes[example.id] += len(example.pairs)
        if tally.rows - shown >= BATCH:
            progress.advance(tally.rows - shown)
            shown = tally.rows
    progress.advance(tally.rows - shown)
    best = most_pairs(sizes, data_set.name, settings)
    misfit = f"; {tally.misfit}" if tally.misfit else ""
    if not best:
        raise UserError(
            f"data set {data_set.name!r}: no context has pairs (dropped: {format_counts(tally.dropped)}){misfit}; "
            "set the adapter of its schema, fix or exclude it"
        )
    if tally.misfit:
        print(f"data set {data_set.name!r}: dropped: {format_counts(tally.dropped)}{misfit}", file=sys.stderr)
    if len(sizes) > len(best):
        tally.dropped["beyond_max_contexts"] = len(sizes) - len(best)
    return ChosenContexts(data_set, set(best), tally.dropped)


def most_pairs(sizes: dict[str, int], name: str, settings: CollectSettings) -> list[str]:
    """The `max_contexts` ids with the most pairs, ties by a draw from (seed, id)."""
    ranks = ((-pairs, uniform(settings.seed, "tie", name, one), one) for one, pairs in sizes.items())
    return [one for *_, one in heapq.nsmallest(settings.max_contexts, ranks)]


def document_records(
    settings: CollectSettings, tokenizer: Tokenizer | None, fingerprint: str, choice: ChosenContexts, shard: NewShard
) -> Iterator[bytes]:
    name, few_shot = choice.data_set.name, settings.few_shot
    examples = merge_examples(one for one in read_examples(choice.data_set, RowTally()) if one.id in choice.ids)
    shard.dropped.update(choice.dropped)
    sizes = [0] * len(examples)
    if tokenizer and few_shot:
        examples, sizes = fit_examples(examples, few_shot.max_tokens, tokenizer, shard)
        if not examples:
            limit = few_shot.max_tokens
            raise UserError(f"data set {name!r}: no example fits few_shot.max_tokens = {limit}; increase it")
        if len(examples) > settings.max_contexts:  # passages of long contexts
            best = set(most_pairs({one.id: len(one.pairs) for one in examples}, name, settings))
            shard.dropped["beyond_max_contexts"] += len(examples) - len(best)
            sizes = [size for one, size in zip(examples, sizes, strict=True) if one.id in best]
            examples = [one for one in examples if one.id in best]
        shard.tokens = sum(sizes)
    order = sorted(zip(examples, sizes, strict=True), key=lambda one: draw_order(settings.seed, name, one[0].id))
    for sequence in fill_sequences(order, few_shot.max_tokens if few_shot else 0):
        shard.counts["contexts"] += len(sequence)
        shard.counts["pairs"] += sum(len(one.pairs) for one in sequence)
        if settings.write == "groups":
            yield encode(make_group(name, sequence[0], fingerprint))
        else:
            yield encode(make_document(name, sequence))


def draw_order(seed: int, name: str, identifier: str) -> tuple[float, str]:
    return uniform(seed, "order", name, identifier), identifier


# ---- few-shot sequences


def fill_sequences(examples: Iterable[tuple[Example, int]], max_tokens: int) -> Iterator[list[Example]]:
    """Joins examples in order, as many per sequence as fit in `max_tokens`. 0: one example per sequence."""
    sequence: list[Example] = []
    room = 0
    for example, size in examples:
        if sequence and (size > room or not max_tokens):
            yield sequence
            sequence = []
        room = (room if sequence else max_tokens) - size
        sequence.append(example)
    if sequence:
        yield sequence


def fit_examples(
    examples: list[Example], max_tokens: int, tokenizer: Tokenizer, shard: NewShard
) -> tuple[list[Example], list[int]]:
    """Examples of at most `max_tokens`, and their sizes. Long contexts with quoted answers are cut, others dropped."""
    fitting: list[Example] = []
    sizes: list[int] = []
    long: list[Example] = []
    for example, size in zip(examples, token_sizes(examples, tokenizer), strict=True):
        if size <= max_tokens:
            fitting.append(example)
            sizes.append(size)
        elif example.starts is not None:
            long += cut_passages(example, max_tokens // 2, tokenizer, shard.dropped)
        else:
            shard.dropped["too_long"] += 1
    for example, size in zip(long, token_sizes(long, tokenizer), strict=True):
        if size <= max_tokens:
            fitting.append(example)
            sizes.append(size)
        else:
            shard.dropped["too_long"] += 1
    return fitting, sizes


def cut_passages(example: Example, max_tokens: int, tokenizer: Tokenizer, dropped: Counter[str]) -> list[Example]:
    """Passages of a long context, each with the pairs whose answers it quotes. Other pairs are counted."""
    context = example.context
    spans = split_text(context, tokenizer, max_tokens)
    passages = [Example(f"{example.id}#{place}", context[slice(*span)].strip(), []) for place, span in enumerate(spans)]
    for pair, start in zip(example.pairs, example.starts or [], strict=True):
        answer = final_answer(pair)
        if start is None or not context.startswith(answer, start):
            found = context.find(answer)
            start = found if found >= 0 else start
        place = -1 if start is None else bisect_right(spans, start, key=lambda span: span[0]) - 1
        if start is not None and start + len(answer) <= spans[place][1]:
            passages[place].pairs.append(pair)
        else:
            dropped["pair_answer_outside_passages"] += 1
    found_pairs = [one for one in passages if one.pairs]
    if not found_pairs:
        dropped["too_long"] += 1
    return found_pairs


def token_sizes(examples: list[Example], tokenizer: Tokenizer) -> Iterator[int]:
    """Tokens of each example with BOS and EOS, counted per segment as in `ipt tokenize`."""
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        texts = [(context_block(one.context) if one.context else "", pairs_text(one.pairs)) for one in batch]
        first = tokenizer.encode_batch([context or pairs for context, pairs in texts])
        later = tokenizer.encode_batch([pairs if context else "" for context, pairs in texts], continuing=True)
        yield from (len(begin) + len(rest) + 2 for begin, rest in zip(first, later, strict=True))


def make_document(name: str, sequence: list[Example]) -> Document:
    """One tuning document: its examples in order, each with its own BOS and EOS."""
    segments: list[Segment] = []
    for example in sequence:
        segments += example_segments(example.context, example.pairs)
    meta = {"dataset": name, "contexts": [example.id for example in sequence]}
    return Document(f"{name}/{sequence[0].id}", name, "task", segments, meta=meta)


def make_group(name: str, example: Example, fingerprint: str) -> SynthGroup:
    """A group of one context with its pairs."""
    text = GroupText(
        raw_id=example.id,
        start=0,
        end=len(example.context),
        text=example.context,
        source=name,
        pairs=example.pairs,
        round=1,
        prompt_tokens=0,
        cached_prompt_tokens=0,
        completion_tokens=0,
        finish_reason="stop",
    )
    return SynthGroup(f"{name}/{example.id}", [text], "collect", "none", {}, fingerprint)
