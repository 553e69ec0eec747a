"""`synth verify`: groups get scores on their pairs, in new shards, one for each input shard.

Guaranteed: nothing is deleted and nothing but scores changes; each shard is whole or absent; a second run goes on, with
an engine from group to group. Without an engine the bytes are a pure function of groups and recipe.

The recipe of `synth verify`.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import writing
from ipt_jax.core.hashing import digest
from ipt_jax.core.progress import Progress
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.records import SynthGroup, decode, encode
from ipt_jax.corpus.shards import Manifest, Output, Shards, write_shard
from synth.config import ENGINE_SCORES, ScoreName, SynthesizerSettings
from synth.engine import Engine, EngineDied, open_engine, synthesizer_identity
from synth.format.wire import FORMAT
from synth.generate.journal import Journal
from synth.generate.scheduler import run_groups
from synth.groups import decode_group
from synth.verify.verifier import VERSION, Verifier, make_verifier, score_figures, tally_scores


class VerifySettings(Settings):
    """The recipe of `synth verify`."""

    groups: str
    """Output of `synth run`, `mine`, `decontaminate` or `verify`."""
    synthesizer: SynthesizerSettings | None = None
    """Model and engine. Required by open_closed and agreement, used by options if given."""
    scores: list[ScoreName] = Field(min_length=1)
    """Scores to compute (docs/verify.md)."""
    seed: int = 0
    """Random seed of the order in which options are shown."""
    output: str
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("scores")
    @classmethod
    def _can_be_given(cls, scores: list[ScoreName], info: ValidationInfo) -> list[ScoreName]:
        asked = sorted(ENGINE_SCORES.intersection(scores))
        if asked and info.data.get("synthesizer", ...) is None:
            raise ValueError(f"{', '.join(asked)} need an engine; give a synthesizer, or leave them out")
        return scores


FEW_GROUPS = 2_000  # fewer are scored sooner than worker processes start


@dataclass(frozen=True)
class Work:
    """What is scored, how, and where it goes."""

    settings: VerifySettings
    verifier: Verifier
    shards: Shards
    output: Output

    @property
    def missing(self) -> list[int]:
        return [shard for shard in range(len(self.shards.paths)) if not self.output.has(shard)]

    def records(self, shard: int) -> int:
        return self.shards.manifest.shards[shard].records


def run_verify(settings: VerifySettings) -> dict[str, Any]:
    """Runs the stage, or what is left of it; returns what `--json` prints. `seconds` are those of this call."""
    started = time.monotonic()
    shards = Shards(settings.groups)
    if not len(shards):
        raise UserError(f"groups {settings.groups}: holds no groups; run synth run on a corpus that is not empty")
    verifier = make_verifier(settings.scores, settings.synthesizer, settings.seed)
    identity = verify_identity(settings, shards, verifier)
    asked = verifier.asked
    with Output(settings.output, stage="verify", identity=identity, shard_name="groups", remake=not asked) as output:
        work = Work(settings, verifier, shards, output)
        if work.missing:
            fill(work)
        manifest = output.manifest if output.complete else output.finish()
    return {**summary(manifest, work), "seconds": round(time.monotonic() - started, 3)}


def verify_identity(settings: VerifySettings, shards: Shards, verifier: Verifier) -> dict[str, Any]:
    """What decides the scores: contents of groups and weights, never paths."""
    judge = verifier.judge
    return {
        "groups": digest([entry.sha256 for entry in shards.manifest.shards]),
        "scores": list(verifier.names),
        "version": VERSION,
        "synthesizer": judge and {**synthesizer_identity(judge.synthesizer, judge.tokenizer), "format": FORMAT},
        "seed": judge and settings.seed,
    }


def fill(work: Work) -> None:
    done = sum(work.records(shard) for shard in range(len(work.shards.paths)) if work.output.has(shard))
    with Progress(len(work.shards), "groups", "synth verify", done=done) as progress:
        if not work.verifier.asked:
            return read_shards(work, progress)
        judge = work.verifier.judge
        assert judge is not None
        engine = open_engine(judge.synthesizer, judge.tokenizer)
        try:
            stopped_by = asyncio.run(ask_shards(engine, work, progress))
        except EngineDied as error:
            raise Fault(f"{error}; what is scored is stored, run the same command again to go on") from error
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


class VerifyJob(NamedTuple):
    groups: str
    shard: int
    verifier: Verifier
    temporary: Path


def read_shards(work: Work, progress: Progress) -> None:
    """Scores that need no engine: a shard a process."""
    missing = work.missing
    jobs = [
        VerifyJob(work.settings.groups, shard, Verifier(work.verifier.names), work.output.temporary(shard))
        for shard in missing
    ]
    workers = 1 if len(work.shards) < FEW_GROUPS else None
    for index, (records, counts) in run_units(read_shard, jobs, workers=workers):
        work.output.seal_file(missing[index], len(work.shards.paths), records, counts=counts)
        progress.advance(records)


def read_shard(job: VerifyJob) -> tuple[int, dict[str, int]]:
    """Scores one input shard into the job's temporary file; runs in a worker process."""
    counts: Counter[str] = Counter()

    def records() -> Iterator[bytes]:
        shards = Shards(job.groups, verify=False)
        for record in shards.stream(job.shard):
            group = job.verifier.read(decode_group(record, shards))
            counts.update(tally(group))
            yield encode(group)

    with writing(job.temporary.parent):
        written = write_shard(job.temporary, records())
    return written, dict(sorted(counts.items()))


class Placed(NamedTuple):
    """A group and its place in its shard."""

    place: int
    group: SynthGroup


class Asker(NamedTuple):
    """What drives an engine from group to group."""

    verifier: Verifier

    async def run(self, engine: Engine, placed: Placed) -> SynthGroup:
        return await self.verifier.run(engine, placed.group)


async def ask_shards(engine: Engine, work: Work, progress: Progress) -> signal.Signals | None:
    """Scores that need an engine: shard after shard, each by way of a spool. The signal that ended it, if one did."""
    try:
        for shard in work.missing:
            stopped_by = await ask_shard(engine, work, shard, progress)
            if stopped_by is not None:
                return stopped_by
        (work.output.path / "spool").rmdir()
        return None
    finally:
        await engine.close()


async def ask_shard(engine: Engine, work: Work, shard: int, progress: Progress) -> signal.Signals | None:
    journal = Journal(work.output.path / "spool" / f"{shard:05d}.spool")
    progress.advance(len(journal))

    def put(placed: Placed, group: SynthGroup) -> None:
        journal.append(placed.place, encode(group))
        progress.advance()

    groups = (decode_group(record, work.shards) for record in work.shards.stream(shard))
    missing = (Placed(place, group) for place, group in enumerate(groups) if place not in journal)
    try:
        stopped_by = await run_groups(engine, Asker(work.verifier), missing, put)
        if stopped_by is None:
            seal(work, shard, journal)
        return stopped_by
    finally:
        journal.close()


def seal(work: Work, shard: int, journal: Journal) -> None:
    places = range(work.records(shard))
    counts: Counter[str] = Counter()
    for place in places:
        counts.update(tally(decode(journal.read(place), SynthGroup)))
    records = (journal.read(place) for place in places)
    work.output.seal(shard, len(work.shards.paths), records, counts=dict(sorted(counts.items())))
    journal.path.unlink()


def tally(group: SynthGroup) -> Counter[str]:
    counts = tally_scores(group)
    counts["texts"] += len(group.texts)
    for text in group.texts:
        counts.update("pairs" if pair.accepted else "rejected" for pair in text.pairs)
    return counts


def summary(manifest: Manifest, work: Work) -> dict[str, Any]:
    """`rejected` pairs are kept as they were, without scores."""
    counts = manifest.counts
    figures = {name: counts.get(name, 0) for name in ("texts", "pairs", "rejected")}
    engine = work.verifier.judge.synthesizer.engine if work.verifier.judge else None
    return {"groups": manifest.records, **figures, **score_figures(counts), "engine": engine}
