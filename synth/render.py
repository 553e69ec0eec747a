"""`synth render`: groups of texts and pairs become augmented Documents, through templates, without the synthesizer.

Guaranteed: one Document a group, a pure function of (group, settings), whatever stands beside it; inputs are not
changed; no Document is empty. A group whose pairs are all gone leaves one raw Document a text. One output shard for
each input shard, written whole; a second run goes on. Documents carry no BOS or EOS: `ipt tokenize` adds them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field, field_validator

from ipt_jax.corpus.executor import run_units
from ipt_jax.corpus.progress import Progress
from ipt_jax.corpus.records import Document, Pair, Parent, Segment, SynthGroup, encode
from ipt_jax.corpus.settings import Settings, UserError, digest
from ipt_jax.corpus.shards import Manifest, Output, Shards, write_shard, writing
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.groups import decode_group, without_contaminated
from synth.keep import check_scores, keeps, read_keep
from synth.layout import Draws, Layout, draw_look, lay_out, load_templates
from synth.parse import gold_option, read_format
from synth.prompt import pair_format

LAYOUT_COUNT = "layout."
FEW_GROUPS = 10_000  # fewer are rendered sooner than worker processes start


class LayoutShares(Settings):
    """How often each layout is drawn; the shares need not sum to one. Those left out are never drawn."""

    text_first: float = Field(0.0, ge=0)
    questions_first: float = Field(0.0, ge=0)
    dialogue: float = Field(0.0, ge=0)
    numbered: float = Field(0.0, ge=0)

    @property
    def weights(self) -> dict[Layout, float]:
        return {
            "text_first": self.text_first,
            "questions_first": self.questions_first,
            "dialogue": self.dialogue,
            "numbered": self.numbered,
        }


class RenderSettings(Settings):
    """The recipe of `synth render`. `tokenizer` is for counting tokens only."""

    groups: str
    layouts: LayoutShares = LayoutShares(text_first=0.7, questions_first=0.1, dialogue=0.1, numbered=0.1)
    keep: str | None = None
    epoch: int = Field(0, ge=0)
    seed: int = 0
    tokenizer: str | None = None
    output: str

    @field_validator("layouts")
    @classmethod
    def _draws_something(cls, shares: LayoutShares) -> LayoutShares:
        if not sum(shares.weights.values()):
            raise ValueError("every share is 0; give at least one layout a share")
        return shares

    @field_validator("keep")
    @classmethod
    def _can_be_read(cls, expression: str | None) -> str | None:
        if expression is not None:
            read_keep(expression)
        return expression


@dataclass(frozen=True)
class ShardJob:
    settings: RenderSettings
    shard: int
    temporary: Path


@dataclass(frozen=True)
class ShardResult:
    records: int
    tokens: int
    counts: dict[str, int]
    dropped: dict[str, int]


def run_render(settings: RenderSettings) -> dict[str, Any]:
    """Renders every group of `settings.groups` and returns what `--json` prints."""
    shards = Shards(settings.groups)
    if not len(shards):
        raise UserError(f"{settings.groups}: holds no groups; run synth run on a corpus that is not empty")
    if settings.keep is not None:
        check_scores(settings.keep, (decode_group(record, shards) for record in shards))
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    total = len(shards.paths)
    meaning = identity(settings, shards, tokenizer)
    with Output(settings.output, stage="render", identity=meaning, shard_name="documents") as out:
        jobs = [ShardJob(settings, shard, out.temporary(shard)) for shard in range(total) if not out.has(shard)]
        done = sum(shards.manifest.shards[shard].records for shard in range(total) if out.has(shard))
        with Progress(len(shards), "groups", "synth render", done=done) as progress:
            for index, result in run_units(render_shard, jobs, workers=1 if len(shards) < FEW_GROUPS else None):
                shard = jobs[index].shard
                out.seal_file(
                    shard,
                    total,
                    result.records,
                    tokens=result.tokens,
                    counts=result.counts,
                    dropped=result.dropped,
                )
                progress.advance(shards.manifest.shards[shard].records)
        manifest = out.manifest if out.complete else out.finish()
    return summary(manifest, counted=tokenizer is not None)


def identity(settings: RenderSettings, shards: Shards, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the documents: contents of groups and templates, never paths."""
    return {
        "groups": digest([entry.sha256 for entry in shards.manifest.shards]),
        "templates": load_templates().digest,
        "layouts": settings.layouts.weights,
        "keep": settings.keep,
        "epoch": settings.epoch,
        "seed": settings.seed,
        "tokenizer": tokenizer.digest if tokenizer else None,
    }


def summary(manifest: Manifest, *, counted: bool) -> dict[str, Any]:
    counts = manifest.counts
    layouts = {name.removeprefix(LAYOUT_COUNT): n for name, n in counts.items() if name.startswith(LAYOUT_COUNT)}
    return {
        "documents": manifest.records,
        "tokens": manifest.tokens if counted else None,
        "layouts": layouts,
        "pairs": counts.get("pairs", 0),
        "no_pair_left": counts.get("no_pair_left", 0),
        "dropped": manifest.dropped,
    }


def render_shard(job: ShardJob) -> ShardResult:
    """Renders one input shard into the job's temporary file; runs in a worker process."""
    settings = job.settings
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    tokens = 0

    def records() -> Iterator[bytes]:
        nonlocal tokens
        shards = Shards(settings.groups, verify=False)
        for record in shards.stream(job.shard):
            group = without_contaminated(decode_group(record, shards), dropped)
            for document in render_group(group, settings, counts, dropped):
                tokens += count_tokens(document, tokenizer)
                yield encode(document)

    with writing(job.temporary.parent):
        written = write_shard(job.temporary, records())
    return ShardResult(written, tokens, dict(counts), dict(dropped))


def count_tokens(document: Document, tokenizer: Tokenizer | None) -> int:
    """Tokens of the document with the BOS and EOS that `ipt tokenize` will put around it."""
    if tokenizer is None:
        return 0
    return len(tokenizer.encode(document.text)) + (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None)


def render_group(
    group: SynthGroup, settings: RenderSettings, counts: Counter[str], dropped: Counter[str]
) -> list[Document]:
    """The group's Document, or one raw Document a text when no pair is left; what happened is counted."""
    kept = [kept_pairs(text.pairs, settings.keep, dropped) for text in group.texts]
    counts["pairs"] += sum(map(len, kept))
    if not any(kept):
        counts["no_pair_left"] += 1
        return raw_documents(group, dropped)
    draws = Draws(settings.seed, group.id, settings.epoch)
    look = draw_look(draws, settings.layouts.weights)
    counts[LAYOUT_COUNT + look.layout] += 1
    parts = [
        lay_out(text.text, pairs, look, draws.orders(place, pairs))
        for place, (text, pairs) in enumerate(zip(group.texts, kept, strict=True))
    ]
    document = Document(
        id=group.id if settings.epoch == 0 else f"{group.id}.{settings.epoch}",
        source="+".join(dict.fromkeys(text.source for text in group.texts)),
        kind="augmented",
        segments=[Segment(text=look.separator.join(part for part in parts if part))],
        parents=[Parent(text.raw_id, text.start, text.end) for text in group.texts],
        meta={"layout": look.layout, "synthesizer": group.synthesizer, "fingerprint": group.fingerprint},
    )
    return [document]


def kept_pairs(pairs: list[Pair], keep: str | None, dropped: Counter[str]) -> list[Pair]:
    """Accepted pairs that pass the filter; each other one is counted by its reason."""
    kept = []
    for pair in map(whole_pair, pairs):
        if pair.verdict == "rejected":
            dropped[pair.reason or "rejected"] += 1
        elif not keeps(keep, pair):
            dropped["keep"] += 1
        else:
            kept.append(pair)
    return kept


def whole_pair(pair: Pair) -> Pair:
    """The pair, its parts read again from the wire strings where another program left them out."""
    whole = pair.format == pair_format(bool(pair.options), pair.rationale is not None)
    if pair.verdict == "rejected" or (whole and (not pair.options or gold_option(pair) is not None)):
        return pair
    return msgspec.structs.replace(read_format(pair.question, pair.answer), scores=pair.scores)


def raw_documents(group: SynthGroup, dropped: Counter[str]) -> list[Document]:
    """The texts as they were; a blank one makes no document."""
    documents = []
    for place, text in enumerate(group.texts):
        if not text.text.strip():
            dropped["blank_text"] += 1
            continue
        parent = Parent(text.raw_id, text.start, text.end)
        documents.append(
            Document(
                id=f"{group.id}.raw{place}",
                source=text.source,
                kind="raw",
                segments=[Segment(text=text.text)],
                parents=[parent],
                meta={"synthesizer": group.synthesizer, "fingerprint": group.fingerprint},
            )
        )
    return documents
