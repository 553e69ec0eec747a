"""`synth mine`: raw texts and rules become SynthGroups, as `synth run` would write them, on CPUs.

Guaranteed: pairs are drawn from (seed, text id); each accepted one was read back by the strict parser, others are kept
and marked; the texts that are converted are those that `synth run` converts with the same seed and fraction. A unit of
the corpus (64 MB of text, a packed file, a shard) becomes a shard, and no group reaches beyond it. Shards are whole or
absent; a second run goes on. Memory does not grow with the corpus.
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import writing
from ipt_jax.core.hashing import digest
from ipt_jax.core.progress import Progress
from ipt_jax.core.seeding import draw, uniform
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.records import Document, GroupText, Pair, SynthGroup, encode
from ipt_jax.corpus.row_reader import Dropped
from ipt_jax.corpus.shards import Manifest, Output, write_shard
from ipt_jax.corpus.sources import Unit, plan_units, read_unit, source_identity
from synth.collect.run import read_back
from synth.config import CorpusSettings
from synth.format.parser import question_key, reject
from synth.generate.grouping import ID_LETTERS, group_key, neighbours
from synth.groups import count_verdicts, counts_under, rejection_counts
from synth.mine.patterns import FINDERS, Find, Pattern, ask, read, rules_digest

PER_PATTERN = 2  # finds of one rule in one text, of which the pairs are drawn


class MineSettings(Settings):
    """The recipe of `synth mine`."""

    corpus: CorpusSettings
    """Raw texts to convert: a source."""
    patterns: list[Pattern] = Field(default=list(get_args(Pattern)), min_length=1)
    """Rules that find pairs. At most two finds of a rule in one text are used."""
    max_pairs: int = Field(default=5, ge=1)
    """Maximum pairs per text, drawn from all finds."""
    rounds: int = Field(default=2, ge=1)
    """Texts per group."""
    grouping: Literal["position", "source"] = "position"
    """Which texts share a group. position: neighbours. source: texts of one source."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes. null: one per CPU core."""
    output: str
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("patterns")
    @classmethod
    def _each_once(cls, patterns: list[Pattern]) -> list[Pattern]:
        if doubled := [name for name, count in Counter(patterns).items() if count > 1]:
            raise ValueError(f"{doubled[0]} stands twice; name each pattern once")
        return patterns


class MineJob(NamedTuple):
    unit: Unit
    settings: MineSettings
    fingerprint: str
    temporary: Path


class MinedUnit(NamedTuple):
    records: int
    counts: dict[str, int]
    dropped: dict[str, int]


def run_mine(settings: MineSettings) -> dict[str, Any]:
    """Runs the stage, or what is left of it. `seconds` are those of this call."""
    started = time.monotonic()
    identity = {
        "rules": rules_digest(),
        "corpus": source_identity(settings.corpus),
        **settings.model_dump(include={"patterns", "max_pairs", "rounds", "grouping", "seed"}),
    }
    units = plan_units(settings.corpus)
    with Output(settings.output, stage="mine", identity=identity, shard_name="groups", remake=True) as output:
        todo = [index for index in range(len(units)) if not output.has(index)]
        jobs = [MineJob(units[i], settings, digest(identity), output.temporary(i).absolute()) for i in todo]
        total, left = sum(unit.size for unit in units), sum(job.unit.size for job in jobs)
        done = total - left
        with Progress(total >> 20, "MB", "synth mine", done=done >> 20) as progress:
            for place, made in run_units(mine_unit, jobs, workers=settings.workers):
                output.seal_file(todo[place], len(units), made.records, counts=made.counts, dropped=made.dropped)
                before, done = done, done + jobs[place].unit.size
                progress.advance((done >> 20) - (before >> 20))
        if not output.manifest.records:
            for index, entry in enumerate(output.manifest.shards):  # nothing stays that would refuse a mended recipe
                (output.path / entry.name).unlink()
                output.drop(index)
            raise UserError(
                f"corpus {settings.corpus.path}: no text to convert (dropped {output.manifest.dropped or 'none'}); "
                "raise the fraction or give another corpus"
            )
        manifest = output.manifest if output.complete else output.finish()
    return {**figures(manifest), "seconds": round(time.monotonic() - started, 3)}


def figures(manifest: Manifest) -> dict[str, Any]:
    return {
        **{name: manifest.counts.get(name, 0) for name in ("texts", "groups", "pairs", "texts_without_pairs")},
        "rejected": dict(rejection_counts(manifest.counts)),
        "patterns": counts_under(manifest.counts, "pattern."),
        "dropped": manifest.dropped,
    }


# ---- in a worker


def mine_unit(job: MineJob) -> MinedUnit:
    """Writes the shard of one unit under its temporary name."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()

    def records() -> Iterator[bytes]:
        key = partial(group_key, grouping=job.settings.grouping)
        for texts in neighbours(kept_texts(job, dropped), job.settings.rounds, key):
            counts["groups"] += 1
            yield encode(make_group(texts, job, counts))

    with writing(job.temporary.parent):
        written = write_shard(job.temporary, records())
    return MinedUnit(written, dict(sorted(counts.items())), dict(dropped))


def kept_texts(job: MineJob, dropped: Counter[str]) -> Iterator[Document]:
    for row in read_unit(job.unit, job.settings.corpus):
        if isinstance(row, Dropped):
            dropped[row.reason] += 1
        elif uniform(job.settings.seed, "fraction", row.id) < job.settings.corpus.fraction:
            yield row


def make_group(texts: list[Document], job: MineJob, counts: Counter[str]) -> SynthGroup:
    mined = [mine_text(text, job.settings, counts) for text in texts]
    records = [
        GroupText(
            raw_id=text.id,
            start=0,
            end=len(text.text),
            text=text.text,
            source=text.source,
            pairs=pairs,
            round=number,
            prompt_tokens=0,
            cached_prompt_tokens=0,
            completion_tokens=0,
            finish_reason="stop",
        )
        for number, (text, pairs) in enumerate(zip(texts, mined, strict=True), start=1)
    ]
    name = digest([text.id for text in texts])[:ID_LETTERS]
    return SynthGroup(name, records, "mine", rules_digest(), {"seed": job.settings.seed}, job.fingerprint)


def mine_text(text: Document, settings: MineSettings, counts: Counter[str]) -> list[Pair]:
    """The text's pairs, accepted and rejected; what became of them is counted."""
    parsed = read(text.text)
    found: list[tuple[Pattern, Find, Random]] = []
    for pattern in settings.patterns:
        rng = draw(settings.seed, "mine", pattern, text.id)
        found += [(pattern, find, rng) for find in islice(FINDERS[pattern](parsed, rng), PER_PATTERN)]
    chosen = draw(settings.seed, "mine", text.id).sample(found, min(settings.max_pairs, len(found)))
    seen: set[tuple[str, ...]] = set()
    pairs = []
    for pattern, find, rng in chosen:
        pair = read_back(ask(pattern, find, rng))
        key = question_key(pair)
        if pair.accepted and key in seen:
            pair = reject(pair, "duplicate_question")
        seen.add(key)
        counts[f"pattern.{pattern}"] += pair.accepted
        pairs.append(pair)
    counts.update(count_verdicts(pairs))
    counts["texts"] += 1
    counts["texts_without_pairs"] += not any(pair.accepted for pair in pairs)
    return pairs
