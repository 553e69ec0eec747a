"""`synth verify`: adds scores to the pairs of groups, in new shards, one per input shard.

Guarantees: nothing but scores changes. With an engine, finished groups survive a kill. Without one, the bytes are a
pure function of groups and recipe.
"""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.errors import Fault
from ipt_jax.core.progress import Progress
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.core.stage import NewShard, Output, make_shards
from ipt_jax.corpus.records import SynthGroup, decode, encode
from ipt_jax.corpus.shards import Shards
from synth.config import ENGINE_SCORES, ScoreName, SynthesizerSettings
from synth.engine import open_engine, synthesizer_identity
from synth.engine.base import Engine, EngineDied
from synth.format.wire import FORMAT
from synth.generate.journal import Journal
from synth.generate.scheduler import run_groups
from synth.groups import decode_group, groups_digest, open_groups
from synth.verify.verifier import VERSION, Verifier, make_verifier, score_figures, tally_scores

FEW_GROUPS = 2_000  # scored before worker processes would start


class VerifySettings(Settings):
    """The recipe of `synth verify`."""

    groups: PathText
    """Output of `synth run`, `mine`, `decontaminate` or `verify`."""
    synthesizer: SynthesizerSettings | None = None
    """Model and engine. Required by open_closed and agreement, used by options if given."""
    scores: list[ScoreName] = Field(min_length=1)
    """Scores to compute (docs/reference/verify.md)."""
    seed: int = 0
    """Random seed of the order in which options are shown."""
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("scores")
    @classmethod
    def _can_be_given(cls, scores: list[ScoreName], info: ValidationInfo) -> list[ScoreName]:
        asked = sorted(ENGINE_SCORES.intersection(scores))
        if asked and info.data.get("synthesizer", ...) is None:
            raise ValueError(f"{', '.join(asked)} need an engine; set synthesizer, or remove them")
        return scores


def run_verify(settings: VerifySettings) -> dict[str, Any]:
    """Scores the groups of the missing shards and returns what `--json` prints. `seconds` are those of this call."""
    started = time.monotonic()
    shards = open_groups(settings.groups)
    verifier = make_verifier(settings.scores, settings.synthesizer, settings.seed)
    judge = verifier.judge
    identity = {
        "groups": groups_digest(shards),
        "scores": list(verifier.names),
        "version": VERSION,
        "synthesizer": judge and {**synthesizer_identity(judge.synthesizer, judge.tokenizer), "format": FORMAT},
        "seed": judge and settings.seed,
    }
    remake = not verifier.asked
    with Output(settings.output, stage="verify", identity=identity, shard_name="groups", remake=remake) as output:
        if remake:
            make_shards(
                partial(scored_records, settings.groups, Verifier(verifier.names)),
                [(output, range(len(shards.paths)))],
                lambda shard: shards.manifest.shards[shard].records,
                unit="groups",
                label="synth verify",
                workers=1 if len(shards) < FEW_GROUPS else None,
            )
        else:
            if len(output.entries) < len(shards.paths):
                score_with_engine(verifier, shards, output)
            remove_journals(output)
        manifest = output.finish()
    return {
        "groups": manifest.records,
        **{name: manifest.count(name) for name in ("texts", "pairs", "rejected")},
        **score_figures(manifest.counts),
        "engine": judge and judge.synthesizer.engine,
        "seconds": round(time.monotonic() - started, 3),
    }


def tally(group: SynthGroup) -> Counter[str]:
    """`rejected` pairs are stored without scores."""
    counts = tally_scores(group)
    counts["texts"] += len(group.texts)
    for text in group.texts:
        counts.update("pairs" if pair.accepted else "rejected" for pair in text.pairs)
    return counts


def scored_records(groups: str, verifier: Verifier, index: int, shard: NewShard) -> Iterator[bytes]:
    """The groups of one shard with scores that need no engine. Runs in a worker process."""
    shards = Shards(groups, verify=False)
    for record in shards.stream(index):
        group = verifier.read(decode_group(record, shards))
        shard.counts.update(tally(group))
        yield encode(group)


# ---- with an engine


class PlacedGroup(NamedTuple):
    """A group and its place in its shard."""

    place: int
    group: SynthGroup


class PlacedVerifier(NamedTuple):
    """Scores groups with an engine, for `run_groups`."""

    verifier: Verifier

    async def run(self, engine: Engine, placed: PlacedGroup) -> SynthGroup:
        return await self.verifier.run(engine, placed.group)


def score_with_engine(verifier: Verifier, shards: Shards, output: Output) -> None:
    """Scores shard after shard. SIGINT and SIGTERM stop it after the groups in flight are stored."""
    assert verifier.judge is not None
    done = sum(entry.records for entry in output.entries.values())
    with Progress(len(shards), "groups", "synth verify", done=done) as progress:
        engine = open_engine(verifier.judge.synthesizer, verifier.judge.tokenizer)
        try:
            asyncio.run(ask_shards(engine, verifier, shards, output, progress))
        except EngineDied as error:
            raise Fault(f"{error}; finished groups are stored, rerun the same command to resume") from error


async def ask_shards(engine: Engine, verifier: Verifier, shards: Shards, output: Output, progress: Progress) -> None:
    """Fills the journal of each missing shard and seals it."""
    try:
        for shard in range(len(shards.paths)):
            if shard not in output.entries:
                with closing(Journal(output.path / "spool" / f"{shard:05d}.spool")) as journal:
                    await fill_journal(journal, engine, verifier, shards, shard, progress)
                    seal(output, shard, shards, journal)
    finally:
        await engine.close()


async def fill_journal(
    journal: Journal, engine: Engine, verifier: Verifier, shards: Shards, shard: int, progress: Progress
) -> None:
    progress.advance(len(journal))

    def put(placed: PlacedGroup, group: SynthGroup) -> None:
        journal.append(placed.place, encode(group))
        progress.advance()

    groups = (PlacedGroup(place, decode_group(record, shards)) for place, record in enumerate(shards.stream(shard)))
    missing = (placed for placed in groups if placed.place not in journal)
    await run_groups(engine, PlacedVerifier(verifier), missing, put)


def seal(output: Output, shard: int, shards: Shards, journal: Journal) -> None:
    places = range(shards.manifest.shards[shard].records)
    counts: Counter[str] = Counter()
    for place in places:
        counts.update(tally(decode(journal.read(place), SynthGroup)))
    output.seal(shard, len(shards.paths), (journal.read(place) for place in places), counts=counts)
    journal.path.unlink()


def remove_journals(output: Output) -> None:
    """Removes their folder. It holds a journal if a kill came between sealing a shard and removing its journal."""
    if (output.path / "spool").is_dir():
        shutil.rmtree(output.path / "spool")
