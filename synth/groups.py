"""Few-shot groups: forming them from texts, reading them from shards, counting their pairs.

Guaranteed: the texts of a group depend on the order of the texts and the settings alone. Groups are read in shard
order, one at a time, checksums first; a directory of other records is refused.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.corpus.records import Document, Pair, SynthGroup, decode
from ipt_jax.corpus.shards import Shards
from synth.format.truncate import Span

ID_LETTERS = 24  # 96 bits: enough for billions of groups
CONTAMINATED = "contaminated_texts"  # in a group's metadata: places of texts that overlap with a benchmark
AnyText = TypeVar("AnyText")


class Group(NamedTuple):
    """Group `number` of a run, from 0, before synthesis."""

    number: int
    id: str
    texts: list[Document]
    spans: list[Span]


def make_group(number: int, texts: list[Document], spans: list[Span] | None = None) -> Group:
    """The id follows from the ids of the texts, and from their spans if a text was split. Default: complete texts."""
    spans = spans or [full_span(text) for text in texts]
    keys = [text.id if span == full_span(text) else [text.id, *span] for text, span in zip(texts, spans, strict=True)]
    return Group(number, digest(keys)[:ID_LETTERS], texts, spans)


def full_span(text: Document) -> Span:
    return 0, len(text.text)


def group_key(text: Document, grouping: str) -> str:
    """Texts of one key may share a group: those of one source, or all."""
    return text.source if grouping == "source" else ""


def neighbours(texts: Iterable[AnyText], rounds: int, key: Callable[[AnyText], str]) -> Iterator[list[AnyText]]:
    """Runs of `rounds` texts of one key in the order in which they fill, then the short rest of each key."""
    waiting: dict[str, list[AnyText]] = {}
    for text in texts:
        place = key(text)
        waiting.setdefault(place, []).append(text)
        if len(waiting[place]) == rounds:
            yield waiting.pop(place)
    yield from waiting.values()


def read_groups(path: str | Path, *, verify: bool = True) -> Iterator[SynthGroup]:
    """Iterates over the SynthGroups of a stage's output. `verify`: compare all checksums before the first group."""
    shards = Shards(path, verify=verify)
    for record in shards:
        yield decode_group(record, shards)


def open_groups(path: str | Path) -> Shards:
    """The verified shards of a stage's output. Raises UserError if they hold no record."""
    shards = Shards(path)
    if not len(shards):
        raise UserError(f"groups {path}: holds no groups; run synth run on a corpus that is not empty")
    return shards


def groups_digest(shards: Shards) -> str:
    """SHA-256 over the contents of all shards."""
    return digest([entry.sha256 for entry in shards.manifest.shards])


def decode_group(record: bytes, shards: Shards) -> SynthGroup:
    """One record of `shards`. Raises UserError, naming the directory and its stage, if it is not a group."""
    try:
        return decode(record, SynthGroup)
    except UserError as error:
        raise UserError(
            f"{shards.path}: stage {shards.manifest.stage!r} wrote no groups; set it to the output of synth run, mine "
            "or verify"
        ) from error


def contaminated_places(group: SynthGroup) -> set[int]:
    """The texts that `synth decontaminate` marked. They are excluded from rendering."""
    return set(group.meta.get(CONTAMINATED, ()))


def count_verdicts(pairs: Iterable[Pair]) -> Counter[str]:
    """Counts of pairs in a shard's manifest: accepted ones as 'pairs', rejected ones as 'rejected.REASON'."""
    return Counter("pairs" if pair.accepted else f"rejected.{pair.reason}" for pair in pairs)


def rejection_counts(counts: Mapping[str, int]) -> Counter[str]:
    """The rejected pairs by reason, of counts that `count_verdicts` made."""
    return Counter(counts_under(counts, "rejected."))


def counts_under(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """({'a.x': 1, 'b': 2}, 'a.') -> {'x': 1}"""
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}
