"""`synth collect`: question-answering data sets become the documents that tune a synthesizer (paper, section 2).

One shard holds one data set. Of each, at most `max_contexts` contexts are kept, those with most pairs first, then put
in an order drawn from (seed, id). A document is a few-shot sequence: one-shot examples of ONE data set, as many as fit
`few_shot.max_tokens`; the loss stands on pairs and on the EOS after them. Every pair is read back with the parser of
`synth run` first: what that would refuse is never taught. What is left out is counted by reason; reasons of single
pairs begin with `pair_`; a pair's fields that nothing reads count as `ignored_field_NAME`. All rows are checked before
anything is written.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import file_digest
from ipt_jax.core.progress import Progress
from ipt_jax.core.seeding import uniform
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.records import Document, Pair, Segment, encode
from ipt_jax.corpus.shards import Manifest, Output
from ipt_jax.corpus.sources import JSONL, find_files, read_jsonl
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.format.parser import parse_completion, question_key, rejected
from synth.format.wire import context_block, example_segments, pair_text, pairs_text, shown, wire_pair

FIELDS = {"question", "answer", "options", "rationale"}
BATCH = 1000  # examples tokenized at once: the tokenizer's threads share them


class CollectInput(Settings):
    """One or more data sets: a file, a directory or a glob. Each file is a data set unless `name` joins them."""

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
    """Question-answering data sets in JSON Lines (docs/recipes.md)."""
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
    data_sets = find_data_sets(settings)
    few_shot = settings.few_shot
    tokenizer = load_tokenizer(few_shot.tokenizer) if few_shot else None
    identity = {
        "inputs": [[one.name, one.adapter, *map(file_digest, one.paths)] for one in data_sets],
        "max_contexts": settings.max_contexts,
        "seed": settings.seed,
        "few_shot": {"tokenizer": tokenizer.digest, "max_tokens": few_shot.max_tokens}
        if few_shot and tokenizer
        else None,
    }
    chosen = [choose(one, settings) for one in data_sets]
    with Output(settings.output, stage="collect", identity=identity, shard_name="documents", remake=True) as output:
        if not output.complete:
            with Progress(len(data_sets), "data sets", "synth collect") as progress:
                for index, one in enumerate(data_sets):
                    if not output.has(index):
                        _write(output, index, len(data_sets), one, chosen[index], settings, tokenizer)
                    progress.advance()
            output.finish()
        return _figures(output.manifest, counted=tokenizer is not None)


def find_data_sets(settings: CollectSettings) -> list[DataSet]:
    """The data sets behind `inputs`, those in `exclude` left out. Raises UserError for absent and doubled ones."""
    found: list[DataSet] = []
    for source in settings.inputs:
        paths = find_files(source.path)
        for path in paths:
            if path.is_dir() or not path.name.endswith(JSONL) and not _is_packed(path):
                raise UserError(f"input {path}: not JSON Lines; give rows {{id, context, qa}} in a .jsonl file")
        groups = [(source.name, paths)] if source.name else [(path.name.split(".")[0], [path]) for path in paths]
        found += [DataSet(name, source.adapter, files) for name, files in groups]
    names = Counter(one.name for one in found)
    if doubled := [name for name, count in names.items() if count > 1]:
        raise UserError(f"inputs: two data sets are called {doubled[0]!r}; tell them apart with `name`")
    if unknown := [name for name in settings.exclude if name not in names]:
        raise UserError(f"exclude: no data set {unknown[0]!r} among the inputs; they are {', '.join(sorted(names))}")
    kept = [one for one in found if one.name not in settings.exclude]
    if not kept:
        raise UserError("exclude: leaves no data set; take one out of the list")
    return kept


def _is_packed(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith(JSONL)


class ContextChoice(NamedTuple):
    """Positions of the kept rows within a data set, and why others were left out."""

    positions: set[int]
    dropped: Counter[str]


def choose(data_set: DataSet, settings: CollectSettings) -> ContextChoice:
    """The `max_contexts` usable rows with most pairs; ties go by draw. Reads everything, keeps positions alone."""
    dropped: Counter[str] = Counter()
    usable = 0

    def ranks() -> Iterator[tuple[int, float, int]]:
        nonlocal usable
        for position, example in read_examples(data_set, dropped):
            usable += 1
            yield -len(example.pairs), uniform(settings.seed, "tie", data_set.name, example.id), position

    best = heapq.nsmallest(settings.max_contexts, ranks())
    if not best:
        why = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "no rows"
        raise UserError(f"data set {data_set.name!r}: no context with pairs in it ({why}); mend or exclude it")
    if usable > len(best):
        dropped["beyond_max_contexts"] = usable - len(best)
    return ContextChoice({position for _, _, position in best}, dropped)


def read_examples(data_set: DataSet, dropped: Counter[str]) -> Iterator[tuple[int, Example]]:
    """(position, example) of every usable row; reasons for the others go into `dropped`."""
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


def _example(row: dict[str, Any], where: str, default_id: str, dropped: Counter[str]) -> Example | str:
    """The row as an example, or why it is none."""
    context, questions = row.get("context"), row.get("qa")
    if not isinstance(context, str) or not isinstance(questions, list):
        wrong = "qa, a list" if isinstance(context, str) else "context, a text"
        raise UserError(f"{where}: expected {wrong}; a row is {{id, context, qa: [{{question, answer}}]}}")
    if not context.strip():
        return "empty_context"
    pairs: dict[tuple[str, ...], Pair] = {}
    for entry in questions:
        pair = read_back(_pair(entry, where))
        dropped.update(f"ignored_field_{name}" for name in entry.keys() - FIELDS)
        if not pair.accepted:
            dropped[f"pair_{pair.reason}"] += 1
        elif pairs.setdefault(question_key(pair), pair) is not pair:
            dropped["pair_duplicate_question"] += 1
    if not pairs:
        return "no_pairs"
    if _has_lone_surrogate(context + pairs_text(list(pairs.values()))):
        return "lone_surrogate"
    row_id = row.get("id")
    return Example(str(default_id if row_id is None else row_id), context.strip(), list(pairs.values()))


def _pair(entry: Any, where: str) -> Pair:
    """One entry of the generic adapter's `qa` on the wire."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("question", "answer")):
        raise UserError(f"{where}: a pair needs question and answer, both texts, found {str(entry)[:80]!r}")
    options, rationale = entry.get("options"), entry.get("rationale")
    if options is not None and not (isinstance(options, list) and all(isinstance(one, str) for one in options)):
        raise UserError(f"{where}: options is {str(options)[:80]!r}, expected a list of texts")
    if rationale is not None and not isinstance(rationale, str):
        raise UserError(f"{where}: rationale is {str(rationale)[:80]!r}, expected a text")
    stripped = [option.strip() for option in options or []]
    return wire_pair(entry["question"].strip(), entry["answer"].strip(), stripped, rationale and rationale.strip())


def read_back(pair: Pair) -> Pair:
    """The pair as a synthesizer's output would be parsed; rejected where it would not survive as it is.

    What a tokenizer might turn into a tag is refused here too: in tuning data it would teach to end a pair early.
    """
    parsed = parse_completion(pair_text(pair), finished=True)
    plain = shown(pair.question) == pair.question and shown(pair.answer) == pair.answer
    if len(parsed) == 1 and (not parsed[0].accepted or (parsed[0] == pair and plain)):
        return parsed[0]
    return rejected("nested_tag", pair.question, pair.answer)


def _has_lone_surrogate(text: str) -> bool:
    """JSON may spell lone surrogates, which no UTF-8 can hold."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _write(
    output: Output,
    index: int,
    total: int,
    data_set: DataSet,
    choice: ContextChoice,
    settings: CollectSettings,
    tokenizer: Tokenizer | None,
) -> None:
    """Seals the shard of one data set."""
    examples = [one for position, one in read_examples(data_set, Counter()) if position in choice.positions]
    examples.sort(key=lambda one: (uniform(settings.seed, "order", data_set.name, one.id), one.id))
    dropped, tokens = choice.dropped, 0
    sequences = [[one] for one in examples]
    if tokenizer and settings.few_shot:
        sequences, tokens = _pack(examples, settings.few_shot.max_tokens, tokenizer, dropped)
        if not sequences:
            limit = settings.few_shot.max_tokens
            raise UserError(f"data set {data_set.name!r}: no example fits few_shot.max_tokens = {limit}; raise it")
    counts = {
        "pairs": sum(len(one.pairs) for sequence in sequences for one in sequence),
        "contexts": sum(map(len, sequences)),
    }
    records = (encode(make_document(data_set.name, sequence)) for sequence in sequences)
    output.seal(index, total, records, tokens=tokens, counts=counts, dropped=dict(dropped))


def _pack(
    examples: list[Example], max_tokens: int, tokenizer: Tokenizer, dropped: Counter[str]
) -> tuple[list[list[Example]], int]:
    """Examples in order, as many a sequence as fit, and the tokens of all; one too long by itself is dropped."""
    sequences: list[list[Example]] = []
    room, total = 0, 0
    for example, size in zip(examples, _sizes(examples, tokenizer), strict=True):
        if size > max_tokens:
            dropped["too_long"] += 1
            continue
        if size > room or not sequences:
            sequences.append([])
            room = max_tokens
        sequences[-1].append(example)
        room -= size
        total += size
    return sequences, total


def _sizes(examples: list[Example], tokenizer: Tokenizer) -> Iterator[int]:
    """Tokens of each example, BOS and EOS included, counted segment by segment as `ipt tokenize` does."""
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        contexts = tokenizer.encode_batch([context_block(one.context) for one in batch])
        answers = tokenizer.encode_batch([pairs_text(one.pairs) for one in batch], continuing=True)
        yield from (len(context) + len(answer) + 2 for context, answer in zip(contexts, answers, strict=True))


def make_document(name: str, sequence: list[Example]) -> Document:
    """One tuning document: its examples one after the other, each in its own BOS and EOS."""
    segments: list[Segment] = []
    for example in sequence:
        segments += example_segments(example.context, example.pairs)
    meta = {"dataset": name, "contexts": [example.id for example in sequence]}
    return Document(f"{name}/{sequence[0].id}", name, "task", segments, meta=meta)


def _figures(manifest: Manifest, *, counted: bool) -> dict[str, Any]:
    return {
        "documents": manifest.records,
        "contexts": manifest.counts.get("contexts", 0),
        "pairs": manifest.counts.get("pairs", 0),
        "tokens": manifest.tokens if counted else None,
        "dropped": manifest.dropped,
        "datasets": len(manifest.shards),
    }
