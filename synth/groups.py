"""Reading the SynthGroups that `synth run`, `synth mine` and `synth verify` write.

Guaranteed: groups come in shard order, one at a time, whatever the directory's size; checksums are compared first; a
directory of other records is refused in one line.
"""

from collections.abc import Iterator
from pathlib import Path

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import SynthGroup, decode
from ipt_jax.corpus.shards import Shards

CONTAMINATED = "contaminated_texts"  # in a group's metadata: places of texts that a benchmark shares words with


def read_groups(path: str | Path, *, verify: bool = True) -> Iterator[SynthGroup]:
    """Iterates over the SynthGroups of a stage's output directory. `verify` reads every byte once before the first."""
    shards = Shards(path, verify=verify)
    for record in shards:
        yield decode_group(record, shards)


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
