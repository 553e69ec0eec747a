"""The work list of a run: where the texts of each shard begin in the corpus, so that any shard can start by itself.

Guaranteed: whether a text is converted depends on (seed, id) alone; the groups depend on the corpus and the settings
alone. A shard of `groups_per_shard` groups is a run of neighbouring texts, and a group never crosses its end.

Two passes over the corpus make the list: one finds duplicates, one counts dropped rows and cuts shards. The list is
stored in the output directory with a checksum and the run's fingerprint, so a resumed run does not read the corpus
again. It holds no paths and no names: files may move, and they are matched by their contents. Memory: 30 bytes per
shard, 50 per unit of 8 MiB of corpus, and 8 per dropped duplicate.

With `synth run --extend` the list is of the texts that the output lacks, and its shards follow those of the output.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole
from ipt_jax.core.hashing import FileState, digest, hash64
from ipt_jax.core.progress import Progress
from ipt_jax.core.stage import Output, format_counts, sum_counts
from ipt_jax.corpus.duplicates import Rows, find_duplicates, read_once, report_duplicates
from ipt_jax.corpus.paths import is_remote, refuse_changed, state_of
from ipt_jax.corpus.records import Document, SynthGroup, decode
from ipt_jax.corpus.row_reader import Dropped
from ipt_jax.corpus.shards import read_shard
from ipt_jax.corpus.sources import Corpus, InputFile, Unit
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings, is_converted
from synth.format.chat import text_tokens
from synth.format.prompt import context_tokens
from synth.format.truncate import Span, split_text, surely_fits
from synth.generate.journal import read_journal
from synth.groups import Group, full_span, group_key, make_group, neighbours

UNIT_BYTES = 8 << 20  # half of it, on average, is read in vain to start at a row in the middle of a unit


class Place(NamedTuple):
    """The place of a text: a unit of the corpus, a row of the unit, a part of the row's text; all from 0."""

    unit: int
    row: int
    part: int


BEGINNING = Place(0, 0, 0)


class Text(NamedTuple):
    place: Place
    document: Document
    span: Span


class Shard(NamedTuple):
    """A run of neighbouring texts: the place of the first, the numbers of texts and groups."""

    start: Place
    texts: int
    groups: int


class ListedUnit(NamedTuple):
    """A unit of the corpus by the numbers of its files: `files` of them from `first` on."""

    first: int
    files: int
    start: int
    stop: int
    rows_before: int
    size: int


class WorkList(msgspec.Struct):
    """`texts` and `groups` to generate, in shards from number `first_shard` on. `dropped`: rows by reason.

    `duplicates`: rows with a text of an earlier one, by unit. Not stored: `files` and `states` of the corpus, and
    `earlier`, the texts that are not listed again.
    """

    fingerprint: str
    texts: int
    groups: int
    dropped: dict[str, int]
    units: list[ListedUnit]
    shards: list[Shard]
    first_shard: int = 0
    texts_before: int = 0
    duplicates: Rows = {}
    checksum: str = ""
    files: list[InputFile] = []
    states: dict[str, FileState] = {}
    earlier: Any = None  # Earlier

    def stored(self, checksum: str) -> "WorkList":
        return msgspec.structs.replace(self, checksum=checksum, files=[], states={}, earlier=None)

    def digest(self) -> str:
        """Digest of the stored fields but the checksum."""
        return digest(msgspec.to_builtins(self.stored("")))

    def read_units(self) -> list[Unit]:
        files = [tuple(self.files[unit.first : unit.first + unit.files]) for unit in self.units]
        return [Unit(of[0], *unit[2:], more=of[1:]) for of, unit in zip(files, self.units, strict=True)]


# ---- making the list


class Earlier:
    """The spans of texts that an output holds in its shards and `open` journals before `first_shard`, 32 bytes each."""

    def __init__(self, output: Output, first_shard: int, journals: list[Path]) -> None:
        self.first_shard, self.name, self.open = first_shard, str(output.path), bool(journals)
        entries = [entry for number, entry in sorted(output.entries.items()) if number < first_shard]
        self.dropped = Counter(sum_counts(entry.dropped for entry in entries))
        del self.dropped["no_room"]  # of texts, not of rows
        kind = np.dtype([("key", ">u8"), ("end", ">u8"), ("text", ">u8")])
        spans = [*map(spans_of, (read_shard(output.path / entry.name) for entry in entries))]
        spans += [spans_of(read_journal(path)) for path in journals]
        self._spans = np.frombuffer(b"".join(spans), kind)
        self._spans = self._spans[np.argsort(self._spans["key"])]
        self._keys = self._spans["key"].astype(np.uint64)
        self._seen = np.zeros(len(self._keys), bool)

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, document: Document, start: int) -> bool:
        """Whether the output has the span that begins at `start`. Raises UserError if its text has changed."""
        key = np.frombuffer(span_key(document.id, start), ">u8").astype(np.uint64)[0]
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return False
        _, end, text = self._spans[place].tolist()
        if int.from_bytes(hash64(document.text[start:end])) != text:
            raise UserError(
                f"output {self.name}: text {document.id!r} has changed since it was converted, and --extend only adds; "
                "restore it, or set another output"
            )
        self._seen[place] = True
        return True

    def refuse_missing(self) -> None:
        if missing := int((~self._seen).sum()):
            raise UserError(
                f"output {self.name}: {missing:,} of its {len(self):,} texts are not in the corpus any more, and "
                "--extend only adds; restore the files, or set another output"
            )


def spans_of(records: Iterator[bytes]) -> bytes:
    texts = (text for record in records for text in decode(record, SynthGroup).texts)
    return b"".join(span_key(one.raw_id, one.start) + one.end.to_bytes(8) + hash64(one.text) for one in texts)


def span_key(text_id: str, start: int) -> bytes:
    return hash64(f"{start} {text_id}")


def list_work(
    settings: RunSettings, tokenizer: Tokenizer, fingerprint: str, corpus: Corpus, earlier: Earlier | None = None
) -> WorkList:
    """Reads every row of the corpus. Raises UserError on a bad row, a duplicate id, or a corpus without texts.

    `earlier`: the texts that are not listed again.
    """
    states = corpus_states(corpus)
    units = corpus.units(UNIT_BYTES)
    select = partial(is_converted, settings.seed)
    drop = settings.drop_duplicates
    found = find_duplicates(corpus, units, drop=drop, count=True, select=select, label="synth run")
    report_duplicates("synth run", found, drop)
    dropped: Counter[str] = Counter()
    with Progress(len(units), "units", "synth run: work list") as progress:

        def listed() -> Iterator[Text]:
            for text in read_texts(settings, tokenizer, units, BEGINNING, dropped, found.texts, earlier):
                if text.place.unit > progress.done:
                    progress.advance(text.place.unit - progress.done)
                yield text

        shards = list(cut_shards(settings, listed()))
        progress.advance(len(units) - progress.done)
    if earlier is not None:
        earlier.refuse_missing()
        dropped -= earlier.dropped
    elif not shards:
        raise UserError(
            f"corpus {corpus.name}: no text to convert (fraction {settings.corpus[0].fraction}, dropped: "
            f"{format_counts(dropped)}); raise the fraction or use another corpus"
        )
    number = {file: place for place, file in enumerate(corpus.files)}
    return WorkList(
        fingerprint,
        texts=sum(shard.texts for shard in shards),
        groups=sum(shard.groups for shard in shards),
        dropped=dict(sorted(dropped.items())),
        units=[ListedUnit(number[unit.file], len(unit.files), *unit[1:5]) for unit in units],
        shards=shards,
        first_shard=earlier.first_shard if earlier else 0,
        texts_before=len(earlier) if earlier else 0,
        duplicates=found.texts,
        files=corpus.files,
        states=states,
        earlier=earlier,
    )


def read_texts(
    settings: RunSettings,
    tokenizer: Tokenizer,
    units: list[Unit],
    start: Place = BEGINNING,
    dropped: Counter[str] | None = None,
    duplicates: Rows | None = None,
    earlier: Earlier | None = None,
) -> Iterator[Text]:
    """The texts to convert from `start` on, in corpus order; unusable rows are counted in `dropped`."""
    for unit in range(start.unit, len(units)):
        first = start.row if unit == start.unit else 0
        source = settings.corpus[units[unit].file.source]
        rows = islice(read_once(units[unit], source, (duplicates or {}).get(unit, ())), first, None)
        for row, found in enumerate(rows, start=first):
            if isinstance(found, Dropped):
                if dropped is not None:
                    dropped[found.reason] += 1
            elif is_converted(settings.seed, source, found):
                for part, span in enumerate(parts(settings, tokenizer, found)):
                    place = Place(unit, row, part)
                    if place >= start and not (earlier and earlier.holds(found, span[0])):
                        yield Text(place, found, span)


def parts(settings: RunSettings, tokenizer: Tokenizer, text: Document) -> list[Span]:
    """The spans of a text that are converted separately."""
    limit = settings.synthesizer.max_prompt_tokens
    if settings.long_texts == "cut":
        return [full_span(text)]
    count = text_tokens(settings.synthesizer, tokenizer)
    if count is context_tokens and surely_fits(text.text, tokenizer, limit):
        return [full_span(text)]
    return split_text(text.text, tokenizer, limit, count)


def cut_shards(settings: RunSettings, texts: Iterable[Text]) -> Iterator[Shard]:
    """The shards of a corpus, of `groups_per_shard` groups each, the last one smaller."""
    waiting: Counter[str] = Counter()  # texts of the open group of each key
    start, count, groups = BEGINNING, 0, 0
    for text in texts:
        key = group_key(text.document, settings.grouping)
        if not waiting[key]:
            if groups == settings.groups_per_shard:
                yield Shard(start, count, groups)
                count, groups = 0, 0
                waiting.clear()
            groups += 1
        if not count:
            start = text.place
        waiting[key] = (waiting[key] + 1) % settings.rounds
        count += 1
    if count:
        yield Shard(start, count, groups)


# ---- the list on disk


def save_work(path: Path, work: WorkList) -> None:
    work.checksum = work.digest()
    path.parent.mkdir(exist_ok=True)
    write_whole(path, msgspec.json.encode(work.stored(work.checksum)))


def load_work(path: Path, fingerprint: str, first_shard: int = 0) -> WorkList | None:
    """The work list at `path`; None if it is missing, damaged or of another run or extension."""
    try:
        work = msgspec.json.decode(path.read_bytes(), type=WorkList)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    ours = (work.fingerprint, work.first_shard, work.checksum) == (fingerprint, first_shard, work.digest())
    return work if ours else None


# ---- reading the texts of shards


def form_groups(settings: RunSettings, tokenizer: Tokenizer, work: WorkList, shards: Iterable[int]) -> Iterator[Group]:
    """The groups of the shards, in order. Consecutive shards are read in one pass, others from their own places."""
    units = work.read_units()
    texts: Iterator[Text] = iter(())
    following = -1
    for shard in shards:
        start, count, _ = work.shards[shard - work.first_shard]
        if shard != following:
            read = read_texts(settings, tokenizer, units, start, None, work.duplicates, work.earlier)
            texts = unchanged(read, units, start, work.states)
        together = neighbours(
            islice(texts, count), settings.rounds, lambda text: group_key(text.document, settings.grouping)
        )
        for number, group in enumerate(together, start=shard * settings.groups_per_shard):
            yield make_group(number, [text.document for text in group], [text.span for text in group])
        following = shard + 1


def corpus_states(corpus: Corpus) -> dict[str, FileState]:
    """The states of the corpus files, by path, to be taken before they are hashed."""
    return {file.path: state_of(file.path) for file in corpus.files}


def refuse_changes(states: dict[str, FileState]) -> None:
    """Raises UserError unless the files are in the same states."""
    for path, state in states.items():
        refuse_changed(path, state)


def unchanged(texts: Iterator[Text], units: list[Unit], at: Place, states: dict[str, FileState]) -> Iterator[Text]:
    """The texts from a place on. Raises UserError when a file's state has changed.

    A file is checked after each of its texts was read (a remote one after the last), and after its last one: no text of
    a changed file is yielded, and texts of the next file do not take the places of those of a truncated one.
    """
    while True:
        to = Place(len(units), 0, 0)
        try:
            text = next(texts, None)
            to = text.place if text else to
        finally:  # also where a changed file cannot be read
            for path in files_between(units, at, to):
                if not is_remote(path) or to.unit > at.unit:
                    refuse_changed(path, states[path])
        if text is None:
            return
        at = to
        yield text


def files_between(units: list[Unit], start: Place, stop: Place) -> list[str]:
    """The files of the rows from one place to another, both included. A row of a text unit is a file."""
    found: dict[str, None] = {}
    for number in range(start.unit, min(stop.unit, len(units) - 1) + 1):
        files = units[number].files
        first = start.row if number == start.unit and len(files) > 1 else 0
        last = stop.row if number == stop.unit and len(files) > 1 else len(files) - 1
        found |= dict.fromkeys(file.path for file in files[first : last + 1])
    return list(found)
