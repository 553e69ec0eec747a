"""The work list of a run: where the texts of each shard begin in the corpus, so that any shard can start by itself.

Guaranteed: whether a text is converted depends on (seed, id) alone; the groups depend on the corpus and the settings
alone. A shard of `groups_per_shard` groups is a run of neighbouring texts, and a group never crosses its end.

One pass over the corpus makes the list, counts dropped rows and refuses duplicate ids. It is stored in the output
directory with a checksum and the run's fingerprint, so a resumed run does not read the corpus again. It holds no paths:
the corpus may move. Memory: 30 bytes per shard and 50 per unit of 8 MiB of corpus.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole
from ipt_jax.core.hashing import FileState, digest, file_state, hash64, refuse_change
from ipt_jax.core.progress import Progress
from ipt_jax.core.seeding import uniform
from ipt_jax.core.stage import format_counts
from ipt_jax.corpus.records import Document
from ipt_jax.corpus.row_reader import Dropped
from ipt_jax.corpus.sources import Form, Unit, input_paths, plan_units, read_unit
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.format.chat import text_tokens
from synth.format.prompt import context_tokens
from synth.format.truncate import Span, split_text, surely_fits
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
    """A unit of the corpus without its path: `input` is the number of its file."""

    input: int
    form: Form
    start: int
    stop: int
    rows_before: int
    size: int


class WorkList(msgspec.Struct):
    """`dropped`: rows by reason; `names`: of the corpus files; `states`: of these files, taken by this process."""

    fingerprint: str
    texts: int
    groups: int
    dropped: dict[str, int]
    names: list[str]
    units: list[ListedUnit]
    shards: list[Shard]
    checksum: str = ""
    states: list[FileState] = []  # not stored

    def digest(self) -> str:
        """Digest of the stored fields but the checksum."""
        return digest(msgspec.to_builtins(msgspec.structs.replace(self, checksum="", states=[])))


# ---- making the list


def list_work(settings: RunSettings, tokenizer: Tokenizer, fingerprint: str) -> WorkList:
    """Reads every row of the corpus. Raises UserError on a bad row, a duplicate id, or a corpus without texts."""
    states = corpus_states(settings)
    units = plan_units(settings.corpus, UNIT_BYTES)
    dropped: Counter[str] = Counter()
    with DuplicateIds() as ids:
        with Progress(len(units), "units", "synth run: work list") as progress:

            def listed() -> Iterator[Text]:
                for text in read_texts(settings, tokenizer, units, dropped=dropped):
                    if text.place.unit > progress.done:
                        progress.advance(text.place.unit - progress.done)
                    if not text.place.part:
                        ids.add(text.document.id)
                    yield text

            shards = list(cut_shards(settings, listed()))
            progress.advance(len(units) - progress.done)
        if not shards:
            raise UserError(
                f"corpus {settings.corpus.path}: no text to convert (fraction {settings.corpus.fraction}, dropped: "
                f"{format_counts(dropped)}); raise the fraction or use another corpus"
            )
        refuse_duplicates(settings, tokenizer, units, ids.suspects())
    paths = input_paths(settings.corpus)
    number = {path: place for place, path in enumerate(paths)}
    return WorkList(
        fingerprint,
        texts=sum(shard.texts for shard in shards),
        groups=sum(shard.groups for shard in shards),
        dropped=dict(sorted(dropped.items())),
        names=[Path(path).name for path in paths],
        units=[ListedUnit(number[unit.path], *unit[1:]) for unit in units],
        shards=shards,
        states=states,
    )


def read_texts(
    settings: RunSettings,
    tokenizer: Tokenizer,
    units: list[Unit],
    start: Place = BEGINNING,
    dropped: Counter[str] | None = None,
) -> Iterator[Text]:
    """The texts to convert from `start` on, in corpus order; unusable rows are counted in `dropped`."""
    for unit in range(start.unit, len(units)):
        first = start.row if unit == start.unit else 0
        rows = islice(read_unit(units[unit], settings.corpus), first, None)
        for row, found in enumerate(rows, start=first):
            if isinstance(found, Dropped):
                if dropped is not None:
                    dropped[found.reason] += 1
            elif uniform(settings.seed, "fraction", found.id) < settings.corpus.fraction:
                for part, span in enumerate(parts(settings, tokenizer, found)):
                    if (place := Place(unit, row, part)) >= start:
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


class DuplicateIds:
    """Finds hashes of ids that occur twice, in memory that does not grow with the corpus. A context manager.

    Each id adds eight bytes to one of 256 files in a temporary folder (320 MB for 40M ids); each file is sorted by
    itself (1.2 MB at 40M ids). Different ids share a hash with a probability of 4e-5 at 40M: the result are suspects.
    """

    def __init__(self, buffer_bytes: int = 32 << 10) -> None:
        self._buffers = [bytearray() for _ in range(256)]  # by a hash's first byte
        self._buffer_bytes = buffer_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="synth-ids-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def add(self, text_id: str) -> None:
        found = hash64(text_id)
        buffer = self._buffers[found[0]]
        buffer += found
        if len(buffer) >= self._buffer_bytes:
            with self._path(found[0]).open("ab") as file:
                file.write(buffer)
            buffer.clear()

    def _path(self, bucket: int) -> Path:
        return Path(self._folder.name) / str(bucket)

    def suspects(self) -> set[bytes]:
        twice: set[bytes] = set()
        for bucket, buffer in enumerate(self._buffers):
            written = self._path(bucket).read_bytes() if self._path(bucket).exists() else b""
            ordered = np.sort(np.frombuffer(written + buffer, ">u8"))
            twice.update(int(one).to_bytes(8) for one in ordered[1:][ordered[1:] == ordered[:-1]])
        return twice


def refuse_duplicates(settings: RunSettings, tokenizer: Tokenizer, units: list[Unit], suspects: set[bytes]) -> None:
    """Raises UserError naming a duplicate id: output records name their texts by id."""
    seen: set[str] = set()
    for text in read_texts(settings, tokenizer, units) if suspects else ():
        name = text.document.id
        if text.place.part or hash64(name) not in suspects:
            continue
        if name in seen:
            raise UserError(f"corpus {settings.corpus.path}: duplicate id {name!r}; make the ids unique")
        seen.add(name)


# ---- the list on disk


def save_work(path: Path, work: WorkList) -> None:
    work.checksum = work.digest()
    path.parent.mkdir(exist_ok=True)
    write_whole(path, msgspec.json.encode(msgspec.structs.replace(work, states=[])))


def load_work(path: Path, fingerprint: str) -> WorkList | None:
    """The work list at `path`; None if it is missing, damaged or of another run."""
    try:
        work = msgspec.json.decode(path.read_bytes(), type=WorkList)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return work if work.fingerprint == fingerprint and work.checksum == work.digest() else None


# ---- reading the texts of shards


def form_groups(settings: RunSettings, tokenizer: Tokenizer, work: WorkList, shards: Iterable[int]) -> Iterator[Group]:
    """The groups of the shards, in order. Consecutive shards are read in one pass, others from their own places."""
    paths = input_paths(settings.corpus)
    if len(paths) != len(work.names):
        missing = sorted(set(work.names) - {Path(path).name for path in paths})
        raise UserError(
            f"corpus {settings.corpus.path}: {len(paths)} files, {len(work.names)} at the start of the run "
            f"({', '.join(missing[:3]) or 'none'} missing); restore them and rerun to resume"
        )
    units = [Unit(paths[unit.input], *unit[1:]) for unit in work.units]
    states = dict(zip(paths, work.states, strict=True))
    texts: Iterator[Text] = iter(())
    following = -1
    for shard in shards:
        start, count, _ = work.shards[shard]
        if shard != following:
            texts = unchanged(read_texts(settings, tokenizer, units, start), units, start.unit, states)
        together = neighbours(
            islice(texts, count), settings.rounds, lambda text: group_key(text.document, settings.grouping)
        )
        for number, group in enumerate(together, start=shard * settings.groups_per_shard):
            yield make_group(number, [text.document for text in group], [text.span for text in group])
        following = shard + 1


def corpus_states(settings: RunSettings) -> list[FileState]:
    """The states of the corpus files, in reading order, to be taken before they are hashed."""
    return [file_state(path) for path in input_paths(settings.corpus)]


def refuse_changes(settings: RunSettings, states: list[FileState]) -> None:
    """Raises UserError unless the corpus consists of the same files in the same states."""
    paths = input_paths(settings.corpus)
    if len(paths) != len(states):
        raise UserError(f"corpus {settings.corpus.path}: files were added or removed during the reading; rerun")
    for path, state in zip(paths, states, strict=True):
        refuse_change(path, state)


def unchanged(texts: Iterator[Text], units: list[Unit], unit: int, states: dict[str, FileState]) -> Iterator[Text]:
    """The texts from `unit` on. Raises UserError when a file's state has changed.

    A file is checked after each of its texts was read, and after its last one: no text of a changed file is yielded,
    and texts of the next file do not take the places of those of a truncated one.
    """
    while True:
        last = len(units) - 1
        try:
            text = next(texts, None)
            last = text.place.unit if text else last
        finally:  # also where a changed file cannot be read
            for path in dict.fromkeys(one.path for one in units[unit : last + 1]):
                refuse_change(path, states[path])
        if text is None:
            return
        unit = last
        yield text
