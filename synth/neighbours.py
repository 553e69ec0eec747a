"""Which texts of a stream share a few-shot group: neighbours, or neighbours of one source."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ipt_jax.corpus.records import Document

Text = TypeVar("Text")


def neighbours(texts: Iterable[Text], rounds: int, key: Callable[[Text], str]) -> Iterator[list[Text]]:
    """Runs of `rounds` texts of one key in the order in which they fill, then the short ones of what is left."""
    waiting: dict[str, list[Text]] = {}
    for text in texts:
        place = key(text)
        waiting.setdefault(place, []).append(text)
        if len(waiting[place]) == rounds:
            yield waiting.pop(place)
    yield from waiting.values()


def group_key(grouping: str) -> Callable[[Document], str]:
    """What texts of a group have in common: their source, or nothing."""
    return (lambda text: text.source) if grouping == "source" else (lambda text: "")
