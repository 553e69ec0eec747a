"""Which texts of a corpus are converted, and which of them share a few-shot group.

Guaranteed: whether a text is converted depends on (seed, id) alone; the groups depend on the corpus and the settings
alone; ids are unique. 'position' groups neighbours in corpus order, 'source' those of one source; a last group
may be short. Memory does not grow with the corpus but for eight bytes a text while it is surveyed.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ipt_jax.corpus.records import Document
from ipt_jax.corpus.settings import UserError, digest, uniform
from ipt_jax.corpus.sources import Dropped, read_source
from synth.config import RunSettings

ID_LETTERS = 24  # 96 bits: enough for billions of groups


class Group(NamedTuple):
    """The `number`-th group, from 0; its id follows from its texts' ids."""

    number: int
    id: str
    texts: list[Document]


@dataclass
class Survey:
    """What a first pass over the corpus found."""

    texts: int = 0
    groups: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def survey_corpus(settings: RunSettings) -> Survey:
    """Counts texts and groups, and reads every row once. Raises UserError on a bad row, a doubled id, or no text."""
    survey = Survey()
    sources: Counter[str] = Counter()
    marks = array("Q")
    for text in kept_texts(settings, survey.dropped):
        marks.append(mark(text.id))
        sources[text.source if settings.grouping == "source" else ""] += 1
    survey.texts = len(marks)
    survey.groups = sum(-(-count // settings.rounds) for count in sources.values())
    if not survey.texts:
        raise UserError(
            f"corpus {settings.corpus.path}: no text to convert (fraction {settings.corpus.fraction}, dropped "
            f"{dict(survey.dropped) or 'none'}); raise the fraction or give another corpus"
        )
    refuse_doubles(settings, marks)
    return survey


def kept_texts(settings: RunSettings, dropped: Counter[str] | None = None) -> Iterator[Document]:
    """The texts to convert, in corpus order; those that cannot be are counted in `dropped`."""
    for row in read_source(settings.corpus):
        if isinstance(row, Dropped):
            if dropped is not None:
                dropped[row.reason] += 1
        elif uniform(settings.seed, "fraction", row.id) < settings.corpus.fraction:
            yield row


def form_groups(settings: RunSettings) -> Iterator[Group]:
    """All groups in order. One waiting group a source is held in memory."""
    waiting: dict[str, list[Document]] = {}
    number = 0
    for text in kept_texts(settings):
        key = text.source if settings.grouping == "source" else ""
        waiting.setdefault(key, []).append(text)
        if len(waiting[key]) == settings.rounds:
            yield make_group(number, waiting.pop(key))
            number += 1
    for texts in waiting.values():
        yield make_group(number, texts)
        number += 1


def make_group(number: int, texts: list[Document]) -> Group:
    return Group(number, digest([text.id for text in texts])[:ID_LETTERS], texts)


def mark(text_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(text_id.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def refuse_doubles(settings: RunSettings, marks: "array[int]") -> None:
    """Raises UserError naming an id that stands twice: its pairs could not be told from the other's."""
    ordered = np.sort(np.frombuffer(marks, dtype=np.uint64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    seen: set[str] = set()
    for text in kept_texts(settings):
        if mark(text.id) in suspects:
            if text.id in seen:
                raise UserError(f"corpus {settings.corpus.path}: id {text.id!r} stands twice; make the ids unique")
            seen.add(text.id)
