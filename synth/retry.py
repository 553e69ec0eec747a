"""`synth run --retry-failed`: groups that hold a failed text are taken out of an output, and the run fills the gaps.

A shard with failures becomes a spool of its good groups, from which it is sealed anew when the others have been asked
again. Each step is whole or absent: the spool gets its name when it is complete and synced, only then the shard is
struck off the manifest. A kill before that leaves the shard as it was, one after it what any run goes on from. The disk
must hold the shards concerned once more, uncompressed.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ipt_jax.corpus.records import SynthGroup, decode
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.shards import TEMPORARY, Output, damage, read_shard, sync_directory, writing
from synth.engine import FAILURES
from synth.spool import Spool
from synth.store import spool_path


def take_out_failed(output: Output, groups_per_shard: int) -> int:
    """Opens every shard with failed texts up again, without the groups that hold one; the number of these."""
    taken = 0
    for path in sorted((output.path / "spool").glob("*.spool")):
        if not output.has(int(path.stem)):  # else a kill came between sealing and unlinking; the next Store removes it
            spool = Spool(path)
            taken += keep_good(output, path, map(spool.read, spool), groups_per_shard)
            spool.close()
    for shard in output.held:
        if failed_texts(output.entry(shard).counts):
            taken += reopen(output, shard, groups_per_shard)
    return taken


def failed_texts(counts: dict[str, int]) -> dict[str, int]:
    """Of the counts of a shard or a run, the texts that failed, by reason."""
    return {reason: counts[f"finished.{reason}"] for reason in FAILURES if counts.get(f"finished.{reason}")}


def reopen(output: Output, shard: int, groups_per_shard: int) -> int:
    """Makes a sealed shard an open one; the number of groups that it lost."""
    if damaged := damage(output.path, output.entry(shard)):
        raise UserError(f"{damaged}; put the file back from a copy, or delete it and run again")
    file = output.path / output.entry(shard).name
    taken = keep_good(output, spool_path(output, shard), read_shard(file), groups_per_shard)
    output.drop(shard)
    with writing(file):
        file.unlink()
    return taken


def keep_good(output: Output, path: Path, records: Iterable[bytes], groups_per_shard: int) -> int:
    """Makes the spool `path`, whole or not at all, of those records that hold no failed text; the number of others."""
    temporary = output.path / f"{path.name}{TEMPORARY}"
    with writing(path):
        temporary.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
    spool, taken = Spool(temporary), 0
    for record in records:
        group = decode(record, SynthGroup)
        if any(text.finish_reason in FAILURES for text in group.texts):
            taken += 1
        else:
            spool.append(group.meta["number"] % groups_per_shard, record)
    spool.sync()
    spool.close()
    with writing(path):
        os.replace(temporary, path)
        sync_directory(path.parent)
    return taken
