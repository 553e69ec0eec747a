"""The groups of an output: a journal for each open shard, sealed to a shard when it is full.

Guaranteed: a group that `put` has stored survives the death of this process; no group is stored twice; a shard holds
its groups in corpus order. The figures of a run are sums over its records, so they do not depend on interruptions.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import TEMPORARY, sync_directory, writing
from ipt_jax.core.progress import Progress
from ipt_jax.core.stage import Output, damage
from ipt_jax.corpus.records import SynthGroup, decode, encode
from ipt_jax.corpus.shards import read_shard
from synth.engine.base import FAILURES
from synth.format.reply import REMOVED
from synth.generate.acceptance import Acceptance
from synth.generate.journal import Journal
from synth.generate.work_list import WorkList
from synth.groups import count_verdicts, counts_under, rejection_counts
from synth.verify.verifier import tally_scores

DROPPED = "dropped."
DETAILS = ("texts_cut", "texts_split", "examples_dropped", "cache_lost_tokens", "recoded_tokens")  # of a group's meta
# In a group's meta only where they are not 0.
RARE_DETAILS = ("text_prompts", "drafts", "accepted_draft_tokens", *(f"chat_{name}" for name in REMOVED))
NAMED_REASONS = 3  # of rejection, in the progress line
REFRESH_SECONDS = 0.5


class GroupStore:
    """The groups of one output; `counts` are the sums over all stored groups, sealed or not."""

    def __init__(
        self, output: Output, work_list: WorkList, groups_per_shard: int, acceptance: Acceptance | None = None
    ) -> None:
        self.output, self.work_list, self.groups_per_shard = output, work_list, groups_per_shard
        self.acceptance = acceptance
        self.counts: Counter[str] = Counter()
        self._open: dict[int, OpenShard] = {}
        for entry in output.entries.values():
            self.counts.update(entry.counts)
        for path in journals(output):
            self.resume(int(path.stem))

    def resume(self, shard: int) -> None:
        """Opens the journal of an earlier run or a worker, and seals it if it is full."""
        if shard in self.output.entries:  # a kill came between sealing and unlinking
            self.journal_path(shard).unlink()
            return
        self._open[shard] = OpenShard(self.journal_path(shard), self.acceptance)
        self.counts.update(self._open[shard].counts)
        self._seal_if_full(shard)

    def release(self) -> None:
        """Closes all journals, so that workers can open them."""
        for shard in list(self._open):
            self.counts.subtract(self._open[shard].counts)
            self._open.pop(shard).close()

    def journal_path(self, shard: int) -> Path:
        return journal_path(self.output, shard)

    @property
    def open_shards(self) -> list[int]:
        listed = range(self.work_list.first_shard, self.shards)
        return [shard for shard in listed if shard not in self.output.entries]

    @property
    def texts(self) -> int:
        """Texts of the finished output."""
        return self.work_list.texts_before + self.work_list.texts

    @property
    def shards(self) -> int:
        """Shards of the finished output."""
        return self.work_list.first_shard + len(self.work_list.shards)

    def __contains__(self, index: int) -> bool:
        shard, place = divmod(index, self.groups_per_shard)
        return shard in self.output.entries or (shard in self._open and place in self._open[shard])

    def put(self, index: int, group: SynthGroup) -> None:
        shard, place = divmod(index, self.groups_per_shard)
        if shard not in self._open:
            self._open[shard] = OpenShard(self.journal_path(shard), self.acceptance)
        self.counts.update(self._open[shard].put(place, group))
        self._seal_if_full(shard)

    def _seal_if_full(self, shard: int) -> None:
        held = self._open[shard]
        if len(held) < self.work_list.shards[shard - self.work_list.first_shard].groups:
            return
        # Rows that were dropped before groups were formed are counted once.
        rows = self.work_list.dropped if shard == self.work_list.first_shard else {}
        seal(self.output, shard, self.shards, self._open[shard], rows)
        self._open.pop(shard).close()
        self.journal_path(shard).unlink()

    def close(self) -> None:
        for held in self._open.values():
            held.close()

    def remove_journals(self) -> None:
        """Removes their folder, which is empty once every shard is sealed."""
        assert not self.open_shards, self.open_shards
        if (self.output.path / "spool").is_dir():
            (self.output.path / "spool").rmdir()


def seal(output: Output, shard: int, shards: int, held: "OpenShard", rows: dict[str, int]) -> None:
    """Makes a shard of a journal. `rows`: further drops to count in the shard."""
    dropped = dict(Counter(counts_under(held.counts, DROPPED)) + Counter(rows))
    counts = {name: count for name, count in held.counts.items() if not name.startswith(DROPPED)}
    records = (held.read(place) for place in sorted(held) if place not in held.empty)
    output.seal(shard, shards, records, counts=counts, dropped=dropped)


def journals(output: Output) -> list[Path]:
    return sorted((output.path / "spool").glob("*.spool"))


def journal_path(output: Output, shard: int) -> Path:
    return output.path / "spool" / f"{shard:05d}.spool"


class OpenShard(Journal):
    """A journal with the sums over its groups. `empty`: places of groups without texts, counted but not stored."""

    def __init__(self, path: Path, acceptance: Acceptance | None) -> None:
        super().__init__(path)
        self.acceptance = acceptance
        self.counts: Counter[str] = Counter()
        self.empty: set[int] = set()
        for place in self:
            self._count(place, decode(self.read(place), SynthGroup))

    def put(self, place: int, group: SynthGroup) -> Counter[str]:
        """Stores the group; returns its figures."""
        self.append(place, encode(group))
        return self._count(place, group)

    def _count(self, place: int, group: SynthGroup) -> Counter[str]:
        figures = tally(group)
        self.counts.update(figures)
        if self.acceptance:
            self.acceptance.see(group)
        if not group.texts:
            self.empty.add(place)
        return figures


def tally(group: SynthGroup) -> Counter[str]:
    """The figures of one group. Drops of its metadata are named 'dropped.REASON'."""
    counts = Counter(groups=1 if group.texts else 0, texts=len(group.texts))
    for text in group.texts:
        counts["prompt_tokens"] += text.prompt_tokens
        counts["cached_prompt_tokens"] += text.cached_prompt_tokens
        counts["completion_tokens"] += text.completion_tokens
        counts[f"finished.{text.finish_reason}"] += 1
        counts["texts_without_pairs"] += not text.accepted_pairs
        counts.update(count_verdicts(text.pairs))
    counts.update({name: group.meta[name] for name in DETAILS})
    counts.update({name: group.meta[name] for name in RARE_DETAILS if name in group.meta})
    counts.update(tally_scores(group))
    counts[f"{DROPPED}no_room"] = group.meta["no_room"]
    return counts


def failed_texts(counts: Mapping[str, int]) -> dict[str, int]:
    """Of the counts of a shard or a run, the failed texts by reason."""
    return {reason: counts[f"finished.{reason}"] for reason in FAILURES if counts.get(f"finished.{reason}")}


# ---- progress


@contextmanager
def show_progress(store: GroupStore, **fixed: object) -> Iterator[Callable[[], None]]:
    """Shows the figures of all stored groups and the speed of this call. Yields the function that refreshes them."""
    began, tokens, shown = time.monotonic(), store.counts["completion_tokens"], 0.0
    with Progress(store.texts, "texts", "synth run", done=store.counts["texts"]) as progress:

        def refresh(least_seconds: float = REFRESH_SECONDS) -> None:
            nonlocal shown
            if (now := time.monotonic()) - shown >= least_seconds:
                shown = now
                speed = round((store.counts["completion_tokens"] - tokens) / max(now - began, 1e-9))
                new = store.counts["texts"] - progress.done
                progress.advance(new, **figures(store.counts), new_tokens_per_second=speed, **fixed)
                if store.acceptance:
                    store.acceptance.check(store.counts)

        try:
            yield refresh
        finally:
            refresh(0)


def figures(counts: Counter[str]) -> dict[str, object]:
    """Rejected pairs as shares of all pairs, cached tokens as a share of all prompt tokens."""
    rejected = rejection_counts(counts)
    pairs = counts["pairs"] + rejected.total()
    reasons = ", ".join(f"{name} {count / pairs:.0%}" for name, count in rejected.most_common(NAMED_REASONS))
    return {
        "pairs": counts["pairs"],
        "pairs_per_text": f"{counts['pairs'] / max(1, counts['texts']):.2f}",
        "rejected": reasons or "none",
        "cached": f"{counts['cached_prompt_tokens'] / max(1, counts['prompt_tokens']):.0%}",
    }


# ---- `synth run --extend`


def first_new_shard(output: Output) -> int:
    """The first shard of the last extension; 0 for an output that was not extended."""
    extensions = output.manifest.extensions
    return extensions[-1].first_shard if extensions is not msgspec.UNSET else 0


def next_shard(output: Output) -> int:
    """The number after all shards, sealed or open."""
    return max([-1, *output.entries, *(int(path.stem) for path in journals(output))]) + 1


def journals_before(output: Output, shard: int) -> list[Path]:
    """The journals of shards before a number that are not sealed."""
    return [path for path in journals(output) if int(path.stem) < shard and int(path.stem) not in output.entries]


def seal_journals(output: Output) -> None:
    """Seals all journals with the groups that they hold."""
    for path in journals_before(output, total := next_shard(output)):
        with closing(OpenShard(path, None)) as held:
            if any(place not in held.empty for place in held):
                seal(output, int(path.stem), total, held, {})
        path.unlink()


# ---- `synth run --retry-failed`


def remove_failed(output: Output, groups_per_shard: int) -> int:
    """Reopens every shard with failed texts, without the groups that hold one; returns the number of these groups.

    A shard is turned into a journal of its good groups, and sealed after the others were retried. Each step is atomic:
    a journal gets its name when it is complete and synced, and the shard is removed from the manifest after that. A
    kill leaves the shard, or a journal that any run resumes. The disk must hold these shards once more, uncompressed.
    """
    removed = 0
    for path in journals(output):
        if int(path.stem) not in output.entries:  # else a kill came between sealing and unlinking
            with closing(Journal(path)) as journal:
                removed += keep_good(output, path, map(journal.read, journal), groups_per_shard)
    for shard, entry in sorted(output.entries.items()):
        if not failed_texts(entry.counts):
            continue
        if damaged := damage(output.path, entry):
            raise UserError(f"{damaged}; restore the file from a copy, or delete it and rerun")
        file = output.path / entry.name
        removed += keep_good(output, journal_path(output, shard), read_shard(file), groups_per_shard)
        output.drop(shard)
        with writing(file):
            file.unlink()
    return removed


def keep_good(output: Output, path: Path, records: Iterable[bytes], groups_per_shard: int) -> int:
    """Writes the journal `path`, atomically, of the records without failed texts; returns the number of the others."""
    temporary = output.path / f"{path.name}{TEMPORARY}"
    with writing(path):
        temporary.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
    journal, removed = Journal(temporary), 0
    for record in records:
        group = decode(record, SynthGroup)
        if any(text.finish_reason in FAILURES for text in group.texts):
            removed += 1
        else:
            journal.append(group.meta["number"] % groups_per_shard, record)
    journal.sync()
    journal.close()
    with writing(path):
        os.replace(temporary, path)
        sync_directory(path.parent)
    return removed
