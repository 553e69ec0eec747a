"""Finds the data sets of a recipe and reads their contexts with pairs through the adapters.

Guarantees: the parser of `synth run` reads every pair back: a pair that it would reject is not used. A row, context or
pair that is not used is counted by reason: reasons of single pairs begin with `pair_`, and unknown fields of a pair
count as `ignored_field_NAME`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from pydantic import field_validator

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.corpus.paths import file_name
from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.sources import InputFile, find_files, read_rows, row_word
from synth.collect.conversation import CONVERSATION
from synth.collect.extractive import EXTRACTIVE
from synth.collect.fields import Adapter, ContextPairs, Misfit, QuestionAnswer
from synth.collect.generic import COLLECTION, read_generic
from synth.collect.multiple_choice import MULTIPLE_CHOICE
from synth.format.parser import parse_completion, question_key, rejected
from synth.format.wire import pair_text, pairs_text, shown, wire_pair

GENERIC, RELEASED = "generic", "ft_collection"
ADAPTERS: dict[str, Adapter] = {**EXTRACTIVE, **MULTIPLE_CHOICE, **CONVERSATION, RELEASED: COLLECTION}
WITHOUT_CONTEXT = {"aqua_rat", "ecqa", RELEASED}
EVALUATED = ("pubmedqa", "convfinqa")  # data sets of the paper's collection that are also its benchmarks


def bare_name(name: str) -> str:
    """'COVID-QA' -> 'covidqa'"""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class CollectInput(Settings):
    path: PathText
    """File, directory, glob, URL, saved data set or `hf:NAME` of the hub (docs/reference/inputs.md)."""
    adapter: str = GENERIC
    """Schema of the rows: generic, ft_collection, or the name of a data set (docs/reference/collect.md)."""
    name: str | None = None
    """Name of the data set, which joins all files. null: the adapter's, for generic one data set per file."""
    split: str | None = None
    """Split of a data set, such as train. It also selects files by name."""
    subset: str | None = None
    """Subset (configuration) of a data set of the hub."""

    @field_validator("adapter")
    @classmethod
    def _known(cls, adapter: str) -> str:
        names = {bare_name(name): name for name in (GENERIC, *ADAPTERS)}
        if (found := names.get(bare_name(adapter))) is None:
            near = get_close_matches(bare_name(adapter), names, n=1)
            hint = f"did you mean {names[near[0]]!r}? " if near else ""
            raise ValueError(f"unknown adapter {adapter!r}; {hint}they are {', '.join(sorted(names.values()))}")
        return found


class DataSet(NamedTuple):
    """`member`: the only `rc_name` to read from files of the released collection."""

    name: str
    adapter: str
    files: list[InputFile]
    member: str | None = None


class Example(NamedTuple):
    """A context with its pairs. `starts`: characters where quoted answers begin; None if answers are not quotes."""

    id: str
    context: str
    pairs: list[Pair]
    starts: list[int | None] | None = None


@dataclass
class RowTally:
    """What became of the rows of a data set."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    misfit: str = ""  # the first row or pair without an expected field, with its place


# ---- finding


def find_data_sets(inputs: list[CollectInput], exclude: list[str]) -> list[DataSet]:
    """The data sets of `inputs` without those in `exclude`. Raises UserError for missing and duplicate ones."""
    held_out = {name.casefold() for name in exclude}
    found: list[DataSet] = []
    unused = set(held_out)
    for source in inputs:
        files = input_files(source)
        if source.adapter == RELEASED and source.name is None:
            folders = {file: collection_folder(file) for file in files}
            unused -= {folder.casefold() for folder in folders.values()}
            found += released_sets([file for file in files if folders[file].casefold() not in held_out])
        elif source.adapter == GENERIC and source.name is None:
            found += [DataSet(name, GENERIC, members) for name, members in generic_sets(source, files)]
        else:
            found.append(DataSet(source.name or source.adapter, source.adapter, files))
    names = Counter(one.name for one in found)
    if duplicated := [name for name, count in names.items() if count > 1]:
        raise UserError(f"inputs: duplicate data set {duplicated[0]!r}; set a different `name` for one of them")
    unused -= {name.casefold() for name in names}
    if unknown := [name for name in exclude if name.casefold() in unused]:
        raise UserError(f"exclude: no data set {unknown[0]!r} among the inputs; they are {', '.join(sorted(names))}")
    kept = [one for one in found if one.name.casefold() not in held_out]
    if not kept:
        raise UserError("exclude: no data set is left; remove one from the list")
    return kept


def input_files(source: CollectInput) -> list[InputFile]:
    """The files of an input, of its split if one is set. Raises UserError for what has no rows of questions."""
    released = source.adapter == RELEASED
    files = find_files(source, one_set=not released and (source.adapter != GENERIC or source.name is not None))
    if odd := [file for file in files if file.form in ("shards", "tfds")]:
        raise UserError(f"input {odd[0].path}: not a data set with questions; set files of rows or a saved data set")
    shards = [file for file in files if folder_of(file) == "shard"] if released else []
    return shards or files  # beside the shards are indexes


def folder_of(file: InputFile) -> str:
    return PurePath(file.path).parent.name


def generic_sets(source: CollectInput, files: list[InputFile]) -> list[tuple[str, list[InputFile]]]:
    """A data set per file; the files of a hub or saved data set are one."""
    if all(file.form == "arrow" for file in files) and not source.path.endswith(".arrow"):
        return [(source.path.rstrip("/").rpartition("/")[2], files)]
    return [(file_name(file.path).split(".")[0], [file]) for file in files]


def released_sets(files: list[InputFile]) -> list[DataSet]:
    """The data sets of files of the released collection, by the `rc_name` of their rows. Reads all rows."""
    found: dict[str, dict[InputFile, None]] = {}
    for file in files:
        for _, row in read_rows(file):
            found.setdefault(member_name(row, file), {})[file] = None
    return [DataSet(name, RELEASED, list(members), name) for name, members in found.items()]


def member_name(row: dict[str, Any], file: InputFile) -> str:
    name = row.get("rc_name")
    return name.strip() if isinstance(name, str) and name.strip() else collection_folder(file)


def collection_folder(file: InputFile) -> str:
    """The folder of a data set: `race` of race/shard/0.jsonl; the file's name if it is in no `shard`."""
    return PurePath(file.path).parent.parent.name if folder_of(file) == "shard" else file_name(file.path).split(".")[0]


# ---- reading


def read_examples(data_set: DataSet, tally: RowTally) -> Iterator[Example]:
    """Usable contexts with pairs, in the order of the rows. Contexts that several rows share come once per row, with
    the same id and other pairs. What is not used is counted in `tally`."""
    ids: set[str] = set()
    asked: dict[str, set[int]] = {}  # per merged context, hashes of its questions
    grouped = data_set.adapter in ADAPTERS and ADAPTERS[data_set.adapter].group is not None
    for where, default_id, item in read_items(data_set, tally):
        context = item.context.strip()
        if not context and data_set.adapter not in WITHOUT_CONTEXT:
            tally.dropped["empty_context"] += 1
            continue
        identifier = context_id(item) if item.id is None else item.id or default_id
        if item.id is not None and identifier in ids:
            tally.dropped["duplicate_id"] += 1
            continue
        questions = asked.setdefault(identifier, set()) if item.id is None else set()
        pairs, starts = usable_pairs(item, questions, where, tally)
        if not pairs:
            if item.id is not None or (len(item.pairs) != 1 and not grouped):  # else the pair's reason is the row's
                tally.dropped["no_pairs"] += 1
        elif any("\ud800" <= letter <= "\udfff" for letter in context + identifier + pairs_text(pairs)):
            tally.dropped["lone_surrogate"] += 1  # JSON may hold one, UTF-8 cannot
        else:
            ids.update([identifier] if item.id is not None else [])
            yield Example(identifier, context, pairs, starts if item.quoted else None)


def merge_examples(examples: Iterable[Example]) -> list[Example]:
    """One example per id, with all its pairs."""
    found: dict[str, Example] = {}
    for one in examples:
        if found.setdefault(one.id, one) is not one:
            found[one.id].pairs.extend(one.pairs)
            (found[one.id].starts or []).extend(one.starts or [])
    return list(found.values())


def context_id(item: ContextPairs) -> str:
    """Of the contents, so that it does not change when a file is moved or split."""
    pairs = [] if item.context.strip() else [one[:3] for one in item.pairs if isinstance(one, QuestionAnswer)]
    return digest([item.context.strip(), pairs])[:16]


def read_items(data_set: DataSet, tally: RowTally) -> Iterator[tuple[str, str, ContextPairs]]:
    """(place, default id, what the adapter reads) of every row that fits the adapter."""
    reader = ADAPTERS.get(data_set.adapter) or Adapter(partial(read_generic, ignored=tally.dropped))
    groups: dict[Any, list[tuple[str, str, dict[str, Any]]]] = {}
    for file in data_set.files:
        for number, row in read_rows(file):
            if data_set.member is not None and member_name(row, file) != data_set.member:
                continue
            tally.rows += 1
            where, default_id = f"input {file.path}: {row_word(file)} {number}", f"{file.name}:{number}"
            try:
                if reader.group is None:
                    if not (items := reader.read(row)):
                        raise Misfit("no_pairs")
                    yield from ((where, default_id, item) for item in items)
                else:
                    groups.setdefault(reader.group(row), []).append((where, default_id, row))
            except Misfit as misfit:
                count_misfit(misfit, misfit.reason, where, row, tally)
    for rows in groups.values():
        where, default_id, first = rows[0]
        try:
            yield from ((where, default_id, item) for item in reader.read([row for *_, row in rows]))
        except Misfit as misfit:
            count_misfit(misfit, misfit.reason, where, first, tally, len(rows))


def count_misfit(
    misfit: Misfit, reason: str, where: str, row: dict[str, Any] | None, tally: RowTally, count: int = 1
) -> None:
    tally.dropped[reason] += count
    if misfit.expected and not tally.misfit:
        found = "" if row is None else f", found {', '.join(sorted(map(str, row))) or 'none'}"
        tally.misfit = f"{where}: {misfit.reason.replace('_', ' ')}; expected {misfit.expected}{found}"


def usable_pairs(
    item: ContextPairs, questions: set[int], where: str, tally: RowTally
) -> tuple[list[Pair], list[int | None]]:
    """The pairs that the parser reads back, each question once, and where their answers begin."""
    pairs: list[Pair] = []
    starts: list[int | None] = []
    for given in item.pairs:
        if isinstance(given, Misfit):
            count_misfit(given, f"pair_{given.reason}", where, None, tally)
            continue
        pair = read_back(wire_pair(given.question, given.answer, given.options, given.rationale))
        key = hash(question_key(pair))
        if not pair.accepted:
            tally.dropped[f"pair_{pair.reason}"] += 1
        elif key in questions:
            tally.dropped["pair_duplicate_question"] += 1
        else:
            questions.add(key)
            pairs.append(pair)
            starts.append(given.start)
    return pairs, starts


def read_back(pair: Pair) -> Pair:
    """The pair as parsed from a synthesizer's output, rejected if parsing changes its text.

    Options and a chain of thought that are written in question and answer are read as such. Text that a tokenizer may
    convert to a tag is rejected too: as a target it would teach to end a pair early.
    """
    parsed = parse_completion(pair_text(pair), finished=True)
    plain = shown(pair.question) == pair.question and shown(pair.answer) == pair.answer
    same = [(one.question, one.answer) for one in parsed] == [(pair.question, pair.answer)]
    if len(parsed) == 1 and (not parsed[0].accepted or (same and plain)):
        return parsed[0]
    return rejected("nested_tag", pair.question, pair.answer)
