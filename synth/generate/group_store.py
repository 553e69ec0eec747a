"""Where finished groups go: a spool for each open shard, and from a full spool the sealed shard.

Guaranteed: what `put` has taken survives the death of this process; no group is held twice; a shard holds its groups in
corpus order. A run's figures are sums over its records, so that a resumed run's equal an undisturbed one's.

`synth run --retry-failed`: groups that hold a failed text are taken out of an output, and the run fills the gaps.

A shard with failures becomes a spool of its good groups, from which it is sealed anew when the others have been asked
again. Each step is whole or absent: the spool gets its name when it is complete and synced, only then the shard is
struck off the manifest. A kill before that leaves the shard as it was, one after it what any run goes on from. The disk
must hold the shards concerned once more, uncompressed.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import TEMPORARY, sync_directory, writing
from ipt_jax.core.stage import Output, damage
from ipt_jax.corpus.records import SynthGroup, decode, encode
from ipt_jax.corpus.shards import read_shard
from synth.engine import FAILURES
from synth.generate.journal import Journal
from synth.generate.work_list import WorkList
from synth.groups import count_verdicts
from synth.verify.verifier import tally_scores

DROPPED = "dropped."
DETAILS = ("texts_cut", "texts_split", "examples_dropped", "cache_lost_tokens", "recoded_tokens")  # of a group's meta


class GroupStore:
    """The groups of one output; `counts` are the sums over all that are held, sealed or not."""

    def __init__(self, output: Output, work_list: WorkList, groups_per_shard: int) -> None:
        self.output, self.work_list, self.groups_per_shard = output, work_list, groups_per_shard
        self.shards = -(-work_list.groups // groups_per_shard)
        self.counts: Counter[str] = Counter()
        self._open: dict[int, OpenShard] = {}
        for shard in range(self.shards):
            if output.has(shard):
                self.counts.update(output.entry(shard).counts)
        for path in sorted((output.path / "spool").glob("*.spool")):
            self.resume(int(path.stem))

    def resume(self, shard: int) -> None:
        """Takes over the spool that a run before, or a worker, left; seals it when it is full."""
        if self.output.has(shard):
            self.journal_path(shard).unlink()
            return
        self._open[shard] = OpenShard(self.journal_path(shard))
        self.counts.update(self._open[shard].counts)
        self._seal_if_full(shard)

    def release(self) -> None:
        """Lets go of all spools, so that workers can go on with them."""
        for shard in list(self._open):
            self.counts.subtract(self._open[shard].counts)
            self._open.pop(shard).journal.close()

    def journal_path(self, shard: int) -> Path:
        return journal_path(self.output, shard)

    def size(self, shard: int) -> int:
        return min(self.groups_per_shard, self.work_list.groups - shard * self.groups_per_shard)

    @property
    def open_shards(self) -> list[int]:
        return [shard for shard in range(self.shards) if not self.output.has(shard)]

    def __contains__(self, index: int) -> bool:
        shard, place = divmod(index, self.groups_per_shard)
        return self.output.has(shard) or (shard in self._open and place in self._open[shard].journal)

    def put(self, index: int, group: SynthGroup) -> None:
        shard, place = divmod(index, self.groups_per_shard)
        if shard not in self._open:
            self._open[shard] = OpenShard(self.journal_path(shard))
        self.counts.update(self._open[shard].append(place, group))
        self._seal_if_full(shard)

    def _seal_if_full(self, shard: int) -> None:
        held, size = self._open[shard], self.size(shard)
        if len(held.journal) < size:
            return
        counts = dict(sorted(held.counts.items()))
        dropped = {name.removeprefix(DROPPED): counts.pop(name) for name in list(counts) if name.startswith(DROPPED)}
        if shard == 0:  # what fell out before there were groups is booked once
            dropped = dict(Counter(dropped) + Counter(self.work_list.dropped))
        records = (held.journal.read(place) for place in range(size) if place not in held.empty)
        self.output.seal(shard, self.shards, records, counts=counts, dropped=dropped)
        self._open.pop(shard).journal.close()
        self.journal_path(shard).unlink()

    def close(self) -> None:
        for held in self._open.values():
            held.journal.close()

    def remove_journals(self) -> None:
        """Nothing is left in them once every shard is sealed."""
        assert not self.open_shards, self.open_shards
        if (self.output.path / "spool").is_dir():
            (self.output.path / "spool").rmdir()


def journal_path(output: Output, shard: int) -> Path:
    return output.path / "spool" / f"{shard:05d}.spool"


class OpenShard:
    """A spool, the sums over its groups, and the places of those none of whose texts fitted: counted, and no record."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.counts: Counter[str] = Counter()
        self.empty: set[int] = set()
        for place in self.journal:
            self._count(place, decode(self.journal.read(place), SynthGroup))

    def append(self, place: int, group: SynthGroup) -> Counter[str]:
        """The group's figures."""
        self.journal.append(place, encode(group))
        return self._count(place, group)

    def _count(self, place: int, group: SynthGroup) -> Counter[str]:
        figures = tally(group)
        self.counts.update(figures)
        if not group.texts:
            self.empty.add(place)
        return figures


def tally(group: SynthGroup) -> Counter[str]:
    """The figures of one group; those of its metadata that are drops come under 'dropped.'."""
    counts = Counter(groups=1 if group.texts else 0, texts=len(group.texts))
    for text in group.texts:
        counts["prompt_tokens"] += text.prompt_tokens
        counts["cached_prompt_tokens"] += text.cached_prompt_tokens
        counts["completion_tokens"] += text.completion_tokens
        counts[f"finished.{text.finish_reason}"] += 1
        counts["texts_without_pairs"] += not text.accepted_pairs
        counts.update(count_verdicts(text.pairs))
    counts.update({name: group.meta[name] for name in DETAILS})
    counts.update(tally_scores(group))
    counts[f"{DROPPED}no_room"] = group.meta["no_room"]
    return counts


def take_out_failed(output: Output, groups_per_shard: int) -> int:
    """Opens every shard with failed texts up again, without the groups that hold one; the number of these."""
    taken = 0
    for path in sorted((output.path / "spool").glob("*.spool")):
        if not output.has(int(path.stem)):  # else a kill came between sealing and unlinking; the next Store removes it
            journal = Journal(path)
            taken += keep_good(output, path, map(journal.read, journal), groups_per_shard)
            journal.close()
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
    taken = keep_good(output, journal_path(output, shard), read_shard(file), groups_per_shard)
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
    journal, taken = Journal(temporary), 0
    for record in records:
        group = decode(record, SynthGroup)
        if any(text.finish_reason in FAILURES for text in group.texts):
            taken += 1
        else:
            journal.append(group.meta["number"] % groups_per_shard, record)
    journal.sync()
    journal.close()
    with writing(path):
        os.replace(temporary, path)
        sync_directory(path.parent)
    return taken
