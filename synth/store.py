"""Where finished groups go: a spool for each open shard, and from a full spool the sealed shard.

Guaranteed: what `put` has taken survives the death of this process; no group is held twice; a shard holds its groups in
corpus order. A run's figures are sums over its records, so that a resumed run's equal an undisturbed one's.
"""

from collections import Counter
from pathlib import Path

from ipt_jax.corpus.records import SynthGroup, decode, encode
from ipt_jax.corpus.shards import Output
from synth.spool import Spool
from synth.verify.verifier import tally_scores
from synth.worklist import WorkList

DROPPED = "dropped."
DETAILS = ("texts_cut", "texts_split", "examples_dropped", "cache_lost_tokens", "recoded_tokens")  # of a group's meta


class Store:
    """The groups of one output; `counts` are the sums over all that are held, sealed or not."""

    def __init__(self, output: Output, survey: WorkList, groups_per_shard: int) -> None:
        self.output, self.survey, self.groups_per_shard = output, survey, groups_per_shard
        self.shards = -(-survey.groups // groups_per_shard)
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
            self.spool_path(shard).unlink()
            return
        self._open[shard] = OpenShard(self.spool_path(shard))
        self.counts.update(self._open[shard].counts)
        self._seal_if_full(shard)

    def release(self) -> None:
        """Lets go of all spools, so that workers can go on with them."""
        for shard in list(self._open):
            self.counts.subtract(self._open[shard].counts)
            self._open.pop(shard).spool.close()

    def spool_path(self, shard: int) -> Path:
        return spool_path(self.output, shard)

    def size(self, shard: int) -> int:
        return min(self.groups_per_shard, self.survey.groups - shard * self.groups_per_shard)

    @property
    def open_shards(self) -> list[int]:
        return [shard for shard in range(self.shards) if not self.output.has(shard)]

    def __contains__(self, index: int) -> bool:
        shard, place = divmod(index, self.groups_per_shard)
        return self.output.has(shard) or (shard in self._open and place in self._open[shard].spool)

    def put(self, index: int, group: SynthGroup) -> None:
        shard, place = divmod(index, self.groups_per_shard)
        if shard not in self._open:
            self._open[shard] = OpenShard(self.spool_path(shard))
        self.counts.update(self._open[shard].append(place, group))
        self._seal_if_full(shard)

    def _seal_if_full(self, shard: int) -> None:
        held, size = self._open[shard], self.size(shard)
        if len(held.spool) < size:
            return
        counts = dict(sorted(held.counts.items()))
        dropped = {name.removeprefix(DROPPED): counts.pop(name) for name in list(counts) if name.startswith(DROPPED)}
        if shard == 0:  # what fell out before there were groups is booked once
            dropped = dict(Counter(dropped) + Counter(self.survey.dropped))
        records = (held.spool.read(place) for place in range(size) if place not in held.empty)
        self.output.seal(shard, self.shards, records, counts=counts, dropped=dropped)
        self._open.pop(shard).spool.close()
        self.spool_path(shard).unlink()

    def close(self) -> None:
        for held in self._open.values():
            held.spool.close()

    def remove_spools(self) -> None:
        """Nothing is left in them once every shard is sealed."""
        assert not self.open_shards, self.open_shards
        if (self.output.path / "spool").is_dir():
            (self.output.path / "spool").rmdir()


def spool_path(output: Output, shard: int) -> Path:
    return output.path / "spool" / f"{shard:05d}.spool"


class OpenShard:
    """A spool, the sums over its groups, and the places of those none of whose texts fitted: counted, and no record."""

    def __init__(self, path: Path) -> None:
        self.spool = Spool(path)
        self.counts: Counter[str] = Counter()
        self.empty: set[int] = set()
        for place in self.spool:
            self._count(place, decode(self.spool.read(place), SynthGroup))

    def append(self, place: int, group: SynthGroup) -> Counter[str]:
        """The group's figures."""
        self.spool.append(place, encode(group))
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
        counts["texts_without_pairs"] += not any(pair.verdict == "accepted" for pair in text.pairs)
        for pair in text.pairs:
            counts["pairs" if pair.verdict == "accepted" else f"rejected.{pair.reason}"] += 1
    counts.update({name: group.meta[name] for name in DETAILS})
    counts.update(tally_scores(group))
    counts[f"{DROPPED}no_room"] = group.meta["no_room"]
    return counts
