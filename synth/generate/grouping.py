"""Which texts of a corpus are converted, and which of them share a few-shot group.

Guaranteed: whether a text is converted depends on (seed, id) alone; the groups depend on the corpus and the settings
alone. A shard of `groups_per_shard` groups is a run of neighbouring texts, and no group reaches beyond it, so that any
shard can be made without the others. 'position' groups neighbours in corpus order, 'source' those of one source within
the shard; the last groups of a source, or of the corpus, may be short. With `long_texts: split` a long text becomes
several, each in a place of its own. Held in memory are the waiting groups of one shard.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from ipt_jax.core.hashing import digest
from ipt_jax.core.seeding import uniform
from ipt_jax.corpus.records import Document
from ipt_jax.corpus.row_reader import Dropped
from ipt_jax.corpus.sources import Unit, read_unit
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.format.truncate import Span, split_text, surely_fits

ID_LETTERS = 24  # 96 bits: enough for billions of groups


class Group(NamedTuple):
    """The `number`-th group, from 0; its id follows from its texts' ids, and from their spans where one was split."""

    number: int
    id: str
    texts: list[Document]
    spans: list[Span]


class Place(NamedTuple):
    """Where a text lies: a unit of the corpus, a row of the unit, a part of the row's text; all from 0."""

    unit: int
    row: int
    part: int


class Text(NamedTuple):
    place: Place
    document: Document
    span: Span

    def key(self, settings: RunSettings) -> str:
        """Texts of one key may share a group."""
        return group_key(self.document, settings.grouping)


BEGINNING = Place(0, 0, 0)
AnyText = TypeVar("AnyText")


def group_key(text: Document, grouping: str) -> str:
    """What the texts of a group have in common: their source, or nothing."""
    return text.source if grouping == "source" else ""


def read_texts(
    settings: RunSettings,
    tokenizer: Tokenizer,
    units: list[Unit],
    start: Place = BEGINNING,
    dropped: Counter[str] | None = None,
) -> Iterator[Text]:
    """The texts to convert from `start` on, in corpus order; rows that cannot be are counted in `dropped`."""
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
    """The spans of a text that get a place in a group each."""
    limit = settings.synthesizer.max_prompt_tokens
    if settings.long_texts == "cut" or surely_fits(text.text, tokenizer, limit):
        return [whole(text)]
    return split_text(text.text, tokenizer, limit)


class Shard(NamedTuple):
    """A run of neighbouring texts: where the first lies, and how many texts and groups there are."""

    start: Place
    texts: int
    groups: int


def cut_shards(settings: RunSettings, texts: Iterable[Text]) -> Iterator[Shard]:
    """The shards of a corpus: each has `groups_per_shard` groups, the last one what is left."""
    waiting: Counter[str] = Counter()  # texts of the open group of each key
    start, count, groups = BEGINNING, 0, 0
    for text in texts:
        key = text.key(settings)
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


def group_shard(settings: RunSettings, shard: int, texts: Iterable[Text]) -> Iterator[Group]:
    """The groups of one shard from its texts: full ones in the order in which they fill, then the short ones."""
    together = neighbours(texts, settings.rounds, lambda text: text.key(settings))
    for number, group in enumerate(together, start=shard * settings.groups_per_shard):
        yield group_texts(number, group)


def neighbours(texts: Iterable[AnyText], rounds: int, key: Callable[[AnyText], str]) -> Iterator[list[AnyText]]:
    """Runs of `rounds` texts of one key in the order in which they fill, then the short ones of what is left."""
    waiting: dict[str, list[AnyText]] = {}
    for text in texts:
        place = key(text)
        waiting.setdefault(place, []).append(text)
        if len(waiting[place]) == rounds:
            yield waiting.pop(place)
    yield from waiting.values()


def group_texts(number: int, texts: list[Text]) -> Group:
    return make_group(number, [text.document for text in texts], [text.span for text in texts])


def make_group(number: int, texts: list[Document], spans: list[Span] | None = None) -> Group:
    """`spans` are the whole texts unless given."""
    spans = spans or [whole(text) for text in texts]
    keys = [text.id if span == whole(text) else [text.id, *span] for text, span in zip(texts, spans, strict=True)]
    return Group(number, digest(keys)[:ID_LETTERS], texts, spans)


def whole(text: Document) -> Span:
    return 0, len(text.text)
