"""`synth mine`: writes SynthGroups, as `synth run` does, with pairs that rules find in raw texts. Runs on CPUs.

Guarantees:
- Pairs are drawn from (seed, text id). Accepted pairs were read back by the strict parser. Rejected pairs are stored.
- The converted texts are those that `synth run` converts with the same seed and fraction.
- A unit of the corpus (64 MB of text, a compressed file, a shard) makes one shard. Groups do not cross shards.
- Memory does not grow with the corpus.
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from ipt_jax.core.hashing import digest
from ipt_jax.core.seeding import draw
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.core.stage import NewShard, Output, make_shards
from ipt_jax.corpus.duplicates import find_duplicates, read_once, report_duplicates
from ipt_jax.corpus.records import Document, GroupText, Pair, SynthGroup, encode
from ipt_jax.corpus.row_reader import Dropped
from ipt_jax.corpus.sources import Corpus, Unit
from synth.collect.data_sets import read_back
from synth.config import Corpora, CorpusSettings, is_converted
from synth.format.parser import question_key, reject
from synth.groups import ID_LETTERS, count_verdicts, counts_under, group_key, neighbours, rejection_counts
from synth.mine.patterns import FINDERS, Find, Pattern, ask, read, rules_digest

PER_PATTERN = 2  # finds of one rule in one text, of which the pairs are drawn


class MineSettings(Settings):
    """The recipe of `synth mine`."""

    corpus: Corpora = Field(min_length=1)
    """Raw texts to convert: a source, or a list of sources."""
    drop_duplicates: bool = False
    """Convert only the first of texts that are identical. false: convert all, and report how many are."""
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
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("patterns")
    @classmethod
    def _each_once(cls, patterns: list[Pattern]) -> list[Pattern]:
        if doubled := [name for name, count in Counter(patterns).items() if count > 1]:
            raise ValueError(f"duplicate pattern {doubled[0]}; remove one")
        return patterns


def run_mine(settings: MineSettings) -> dict[str, Any]:
    """Makes the missing shards and returns what `--json` prints. `seconds` are those of this call."""
    started = time.monotonic()
    corpus = Corpus(settings.corpus)
    identity = {
        "rules": rules_digest(),
        "corpus": corpus.identity(),
        **settings.model_dump(include={"drop_duplicates"}, exclude_defaults=True),
        **settings.model_dump(include={"patterns", "max_pairs", "rounds", "grouping", "seed"}),
    }
    output = Output(
        settings.output, stage="mine", identity=identity, shard_name="groups", remake=True, inputs=corpus.inputs()
    )
    with output:
        if not output.manifest.complete:
            corpus.restore(output.manifest)
            make_shards(
                partial(group_records, settings, output.manifest.fingerprint),
                [(output, mine_items(settings, corpus))],
                lambda item: item.unit.size / 2**20,
                unit="MB",
                label="synth mine",
                workers=settings.workers,
            )
        output.refuse_empty(f"corpus {corpus.name}: no text to convert", "raise the fraction or set another corpus")
        manifest = output.finish()
    return {
        **{name: manifest.count(name) for name in ("texts", "groups", "pairs", "texts_without_pairs")},
        "rejected": dict(rejection_counts(manifest.counts)),
        "patterns": counts_under(manifest.counts, "pattern."),
        "dropped": manifest.dropped,
        "seconds": round(time.monotonic() - started, 3),
    }


class MineItem(NamedTuple):
    """What one shard is made of."""

    unit: Unit
    source: CorpusSettings
    duplicates: list[int]


def mine_items(settings: MineSettings, corpus: Corpus) -> list[MineItem]:
    units = corpus.units()
    select = partial(is_converted, settings.seed)
    drop, workers = settings.drop_duplicates, settings.workers
    found = find_duplicates(corpus, units, drop=drop, count=True, select=select, workers=workers, label="synth mine")
    report_duplicates("synth mine", found, drop)
    sources = [settings.corpus[unit.file.source] for unit in units]
    return [
        MineItem(unit, one, found.texts.get(n, [])) for n, (unit, one) in enumerate(zip(units, sources, strict=True))
    ]


# ---- in a worker process


def group_records(settings: MineSettings, fingerprint: str, item: MineItem, shard: NewShard) -> Iterator[bytes]:
    texts = converted_texts(settings, item, shard)
    for group in neighbours(texts, settings.rounds, partial(group_key, grouping=settings.grouping)):
        shard.counts["groups"] += 1
        yield encode(mine_group(group, settings, fingerprint, shard.counts))


def converted_texts(settings: MineSettings, item: MineItem, shard: NewShard) -> Iterator[Document]:
    for row in read_once(item.unit, item.source, item.duplicates):
        if isinstance(row, Dropped):
            shard.dropped[row.reason] += 1
        elif is_converted(settings.seed, item.source, row):
            yield row


def mine_group(texts: list[Document], settings: MineSettings, fingerprint: str, counts: Counter[str]) -> SynthGroup:
    records = [
        GroupText(
            raw_id=text.id,
            start=0,
            end=len(text.text),
            text=text.text,
            source=text.source,
            pairs=mine_text(text, settings, counts),
            round=number,
            prompt_tokens=0,
            cached_prompt_tokens=0,
            completion_tokens=0,
            finish_reason="stop",
        )
        for number, text in enumerate(texts, start=1)
    ]
    name = digest([text.id for text in texts])[:ID_LETTERS]
    return SynthGroup(name, records, "mine", rules_digest(), {"seed": settings.seed}, fingerprint)


def mine_text(text: Document, settings: MineSettings, counts: Counter[str]) -> list[Pair]:
    """The pairs of a text, accepted and rejected. Adds them to `counts`."""
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
