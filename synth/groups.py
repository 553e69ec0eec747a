"""Reading the SynthGroups that `synth run`, `synth mine` and `synth verify` write.

Guaranteed: groups come in shard order, one at a time, whatever the directory's size; checksums are compared first; a
directory of other records is refused in one line.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.corpus.records import Pair, SynthGroup, decode
from ipt_jax.corpus.shards import Shards

CONTAMINATED = "contaminated_texts"  # in a group's metadata: places of texts that a benchmark shares words with


def read_groups(path: str | Path, *, verify: bool = True) -> Iterator[SynthGroup]:
    """Iterates over the SynthGroups of a stage's output directory. `verify` reads every byte once before the first."""
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
    """One record of `shards`; UserError naming the directory and its stage when it is no group."""
    try:
        return decode(record, SynthGroup)
    except UserError as error:
        raise UserError(
            f"{shards.path}: stage {shards.manifest.stage!r} wrote no groups; give what synth run, mine or verify wrote"
        ) from error


def contaminated_places(group: SynthGroup) -> set[int]:
    """The texts that `synth decontaminate` marked: they make no document."""
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
