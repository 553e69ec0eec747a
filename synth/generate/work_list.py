"""The work list of a run: where the texts of each shard lie in the corpus, so that any shard starts without the rest.

A first pass over the corpus makes it, counts what is dropped and refuses an id that stands twice. It lies in the output
directory, written whole, with a checksum and the fingerprint of the run, whose corpus is named by contents: a run again
reads some hundred kilobytes instead of the corpus, and the check of ids is not repeated. Paths are not in it, so the
corpus may move. Memory does not grow with the corpus but for some 30 bytes a shard and 50 a unit of 8 MiB.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole
from ipt_jax.core.hashing import FileState, digest, file_state, refuse_change
from ipt_jax.core.progress import Progress
from ipt_jax.corpus.sources import Form, Unit, input_paths, plan_units
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.generate.duplicate_ids import DuplicateIds, id_hash
from synth.generate.grouping import Group, Shard, Text, cut_shards, group_shard, read_texts

UNIT_BYTES = 8 << 20  # what is read in vain, half of it on average, to start at a row in the middle of a unit


class ListedUnit(NamedTuple):
    """A unit of the corpus without its path: `input` is the number of its file."""

    input: int
    form: Form
    start: int
    stop: int
    rows_before: int
    size: int


class WorkList(msgspec.Struct):
    """What a pass over the corpus found; `dropped` are rows by reason, `names` those of its files.

    `states` are those of its files before this call read them; they are not kept.
    """

    fingerprint: str
    texts: int
    groups: int
    dropped: dict[str, int]
    names: list[str]
    units: list[ListedUnit]
    shards: list[Shard]
    checksum: str = ""
    states: list[FileState] = []

    def digest(self) -> str:
        """Digest of all that is kept but the checksum."""
        return digest(msgspec.to_builtins(msgspec.structs.replace(self, checksum="", states=[])))


def list_work(settings: RunSettings, tokenizer: Tokenizer, fingerprint: str) -> WorkList:
    """Reads every row of the corpus once. Raises UserError on a bad row, a doubled id, or no text."""
    states = corpus_states(settings)
    units = plan_units(settings.corpus, UNIT_BYTES)
    dropped: Counter[str] = Counter()
    with DuplicateIds() as marks:
        with Progress(len(units), "units", "synth run: work list") as progress:
            texts = read_texts(settings, tokenizer, units, dropped=dropped)
            shards = list(cut_shards(settings, marked(texts, marks, progress)))
            progress.advance(len(units) - progress.done)
        if not shards:
            raise UserError(
                f"corpus {settings.corpus.path}: no text to convert (fraction {settings.corpus.fraction}, dropped "
                f"{dict(dropped) or 'none'}); raise the fraction or give another corpus"
            )
        refuse_doubles(settings, tokenizer, units, marks.suspects())
    return WorkList(
        fingerprint,
        sum(shard.texts for shard in shards),
        sum(shard.groups for shard in shards),
        dict(sorted(dropped.items())),
        [Path(path).name for path in input_paths(settings.corpus)],
        listed(settings, units),
        shards,
        states=states,
    )


def marked(texts: Iterable[Text], marks: DuplicateIds, progress: Progress) -> Iterator[Text]:
    for text in texts:
        if text.place.unit > progress.done:
            progress.advance(text.place.unit - progress.done)
        if not text.place.part:
            marks.add(text.document.id)
        yield text


def refuse_doubles(settings: RunSettings, tokenizer: Tokenizer, units: list[Unit], suspects: set[bytes]) -> None:
    """Raises UserError naming an id that stands twice: its pairs could not be told from the other's."""
    seen: set[str] = set()
    for text in read_texts(settings, tokenizer, units) if suspects else ():
        name = text.document.id
        if text.place.part or id_hash(name) not in suspects:
            continue
        if name in seen:
            raise UserError(f"corpus {settings.corpus.path}: id {name!r} stands twice; make the ids unique")
        seen.add(name)


def listed(settings: RunSettings, units: list[Unit]) -> list[ListedUnit]:
    number = {path: place for place, path in enumerate(input_paths(settings.corpus))}
    return [ListedUnit(number[unit.path], *unit[1:]) for unit in units]


def corpus_states(settings: RunSettings) -> list[FileState]:
    """The states of the corpus' files, in reading order. To be taken before they are hashed."""
    return [file_state(path) for path in input_paths(settings.corpus)]


def refuse_changes(settings: RunSettings, states: list[FileState]) -> None:
    """Raises UserError unless the corpus is made of the same files in the same states."""
    paths = input_paths(settings.corpus)
    if len(paths) != len(states):
        raise UserError(f"corpus {settings.corpus.path}: files came or went while it was read; run again")
    for path, state in zip(paths, states, strict=True):
        refuse_change(path, state)


def form_groups(settings: RunSettings, tokenizer: Tokenizer, work: WorkList, shards: Iterable[int]) -> Iterator[Group]:
    """The groups of the shards, in order. Neighbouring shards are read in one go, others from their own places."""
    paths = input_paths(settings.corpus)
    if len(paths) != len(work.names):
        gone = sorted(set(work.names) - {Path(path).name for path in paths})
        raise UserError(
            f"corpus {settings.corpus.path}: {len(paths)} files, {len(work.names)} when the run began "
            f"({', '.join(gone[:3]) or 'none'} gone); put them back, and run again to go on"
        )
    units = [Unit(paths[unit.input], *unit[1:]) for unit in work.units]
    states = dict(zip(paths, work.states, strict=True))
    texts: Iterator[Text] = iter(())
    ahead = -1
    for shard in shards:
        entry = work.shards[shard]
        if shard != ahead:
            texts = unchanged(read_texts(settings, tokenizer, units, entry.start), units, entry.start.unit, states)
        yield from group_shard(settings, shard, islice(texts, entry.texts))
        ahead = shard + 1


def unchanged(texts: Iterator[Text], units: list[Unit], unit: int, states: dict[str, FileState]) -> Iterator[Text]:
    """The texts from `unit` on, as long as their files are in those states.

    A file is looked at again after each of its texts was read, and when its last one was: what is read of a changed
    file goes no further, and one that became shorter does not let the next one's texts into its place.
    """
    while True:
        last = len(units) - 1
        try:
            text = next(texts, None)
            last = text.place.unit if text else last
        finally:  # also where a changed file cannot be read any more
            for path in dict.fromkeys(one.path for one in units[unit : last + 1]):
                refuse_change(path, states[path])
        if text is None:
            return
        unit = last
        yield text


def save_work(path: Path, work: WorkList) -> None:
    work.checksum = work.digest()
    path.parent.mkdir(exist_ok=True)
    write_whole(path, msgspec.json.encode(msgspec.structs.replace(work, states=[])))


def load_work(path: Path, fingerprint: str) -> WorkList | None:
    """The work list at `path`; None where there is none, or one of another run, or one that is damaged."""
    try:
        work = msgspec.json.decode(path.read_bytes(), type=WorkList)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return work if work.fingerprint == fingerprint and work.checksum == work.digest() else None
