"""`synth render`: groups of texts and pairs become augmented Documents, through templates, without the synthesizer.

Guaranteed: one Document a group, or one a text where `one_shot` draws so; a pure function of (group, settings),
whatever stands beside it; inputs are not changed; no Document is empty. A group whose pairs are all gone leaves one raw
Document a text. `meta.spans` says where texts, questions, options, reasoning and answers stand (synth/pieces.py). One
output shard for each input shard, written whole; a second run goes on. Documents carry no BOS or EOS: `ipt tokenize`
adds them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.corpus.executor import run_units
from ipt_jax.corpus.progress import Progress
from ipt_jax.corpus.records import Document, Pair, Parent, Segment, SynthGroup, encode
from ipt_jax.corpus.settings import Settings, UserError, digest
from ipt_jax.corpus.shards import Manifest, Output, Shards, write_shard, writing
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.budget import count_tokens, fit_rows, pairs_of, raw_parts
from synth.groups import decode_group
from synth.keep import check_scores, keeps, read_keep
from synth.layout import Shot, has_example, lay_out
from synth.look import LAYOUTS, Draws, Layout, draw_look, load_templates
from synth.parse import read_format, reject

LAYOUT_COUNT = "layout."
FEW_GROUPS = 10_000  # fewer are rendered sooner than worker processes start


class LayoutShares(Settings):
    """How often each layout is drawn; the shares need not sum to one. Those left out are never drawn."""

    text_first: float = Field(0.0, ge=0)
    questions_first: float = Field(0.0, ge=0)
    dialogue: float = Field(0.0, ge=0)
    numbered: float = Field(0.0, ge=0)
    few_shot: float = Field(0.0, ge=0)

    @property
    def weights(self) -> dict[Layout, float]:
        return {
            "text_first": self.text_first,
            "questions_first": self.questions_first,
            "dialogue": self.dialogue,
            "numbered": self.numbered,
            "few_shot": self.few_shot,
        }


class RenderSettings(Settings):
    """The recipe of `synth render`. `one_shot` is the share of groups whose texts become a document each, instead of
    one few-shot document of all. `tokenizer` counts tokens: where `max_document_tokens` is the row of a model that is
    to be trained, it is that model's."""

    groups: str
    layouts: LayoutShares = LayoutShares(text_first=0.6, questions_first=0.1, dialogue=0.1, numbered=0.1, few_shot=0.1)
    one_shot: float = Field(0.0, ge=0, le=1)
    keep: str | None = None
    epoch: int = Field(0, ge=0)
    seed: int = 0
    tokenizer: str | None = None
    max_document_tokens: int | None = Field(None, ge=32)
    output: str

    @field_validator("layouts")
    @classmethod
    def _draws_something(cls, shares: LayoutShares) -> LayoutShares:
        if not sum(shares.weights.values()):
            raise ValueError("every share is 0; give at least one layout a share")
        return shares

    @field_validator("max_document_tokens")
    @classmethod
    def _can_be_counted(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("tokenizer") is None:
            raise ValueError("tokens need a tokenizer; set tokenizer to the pre-training model's")
        return limit

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
    return summary(manifest, settings)


def identity(settings: RenderSettings, shards: Shards, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the documents: contents of groups and templates, never paths."""
    return {
        "groups": digest([entry.sha256 for entry in shards.manifest.shards]),
        "templates": load_templates().digest,
        "layouts": settings.layouts.weights,
        "one_shot": settings.one_shot,
        "keep": settings.keep,
        "epoch": settings.epoch,
        "seed": settings.seed,
        "tokenizer": tokenizer.digest if tokenizer else None,
        "max_document_tokens": settings.max_document_tokens,
    }


def summary(manifest: Manifest, settings: RenderSettings) -> dict[str, Any]:
    counts = manifest.counts
    layouts = {name.removeprefix(LAYOUT_COUNT): n for name, n in counts.items() if name.startswith(LAYOUT_COUNT)}
    return {
        "documents": manifest.records,
        "tokens": manifest.tokens if settings.tokenizer else None,
        "layouts": layouts,
        "shares": shares(settings, layouts),
        "one_shot": {"asked": settings.one_shot, "got": share(counts.get("one_shot", 0), counts.get("with_pairs", 0))},
        "pairs": counts.get("pairs", 0),
        "no_pair_left": counts.get("no_pair_left", 0),
        "split_for_row": counts.get("split_for_row", 0),
        "dropped": manifest.dropped,
    }


def shares(settings: RenderSettings, drawn: dict[str, int]) -> dict[str, dict[str, float]]:
    """The share of each layout that was asked for, and what the augmented documents got."""
    weights = settings.layouts.weights
    asked = {name: round(weight / sum(weights.values()), 4) for name, weight in weights.items()}
    total = sum(drawn.values())
    return {
        name: {"asked": asked[name], "got": share(drawn.get(name, 0), total)}
        for name in LAYOUTS
        if asked[name] or name in drawn
    }


def share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


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
            for document in render_group(decode_group(record, shards), settings, counts, dropped, tokenizer):
                tokens += count_tokens(document, tokenizer)
                yield encode(document)

    with writing(job.temporary.parent):
        written = write_shard(job.temporary, records())
    return ShardResult(written, tokens, dict(counts), dict(dropped))


def render_group(
    group: SynthGroup,
    settings: RenderSettings,
    counts: Counter[str],
    dropped: Counter[str],
    tokenizer: Tokenizer | None = None,
) -> list[Document]:
    """The group's documents, none longer than `max_document_tokens`; what happened is counted."""
    kept = [kept_pairs(text.pairs, settings.keep, dropped) for text in group.texts]
    shots = [Shot(place, text, pairs) for place, (text, pairs) in enumerate(zip(group.texts, kept, strict=True))]
    counts["pairs"] += sum(len(shot.pairs) for shot in shots)
    if not any(shot.pairs for shot in shots):
        counts["no_pair_left"] += 1
        return raw_documents(group, shots, settings, dropped, tokenizer)
    counts["with_pairs"] += 1
    draws = Draws(settings.seed, group.id, settings.epoch)
    if not draws.chance("one shot", settings.one_shot):
        return row_documents(group, group.id, shots, settings, counts, dropped, tokenizer)
    counts["one_shot"] += 1
    documents = []
    for shot in (shot for shot in shots if shot.pairs):
        name = f"{group.id}.shot{shot.place}"
        documents += row_documents(group, name, [shot], settings, counts, dropped, tokenizer)
    return documents + raw_documents(group, [shot for shot in shots if not shot.pairs], settings, dropped, tokenizer)


def row_documents(
    group: SynthGroup,
    name: str,
    shots: Sequence[Shot],
    settings: RenderSettings,
    counts: Counter[str],
    dropped: Counter[str],
    tokenizer: Tokenizer | None,
) -> list[Document]:
    """`shots` as one augmented document, or as several where the row is too short for it."""

    def render(number: int, row: Sequence[Shot], counted: Counter[str]) -> Document:
        return augmented_document(group, f"{name}.part{number}" if number else name, row, settings, counted)

    def fits(number: int, row: Sequence[Shot]) -> bool:
        limit = settings.max_document_tokens
        return limit is None or not pairs_of(row) or count_tokens(render(number, row, Counter()), tokenizer) <= limit

    rows = fit_rows(shots, fits)
    if lost := pairs_of(shots) - sum(map(pairs_of, rows)):
        counts["pairs"] -= lost
        dropped["row_full"] += lost
    if len(rows) > 1:
        counts["split_for_row"] += 1
    documents = []
    for number, row in enumerate(rows):
        if pairs_of(row):
            documents.append(render(number, row, counts))
        else:
            documents += raw_documents(group, row, settings, dropped, tokenizer)
    return documents


def augmented_document(
    group: SynthGroup, name: str, shots: Sequence[Shot], settings: RenderSettings, counts: Counter[str]
) -> Document:
    """`shots` as one document, in a look drawn for `name`."""
    draws = Draws(settings.seed, name, settings.epoch)
    look = draw_look(draws, settings.layouts.weights, has_example=has_example(shots))
    counts[LAYOUT_COUNT + look.layout] += 1
    words, spans = lay_out(shots, look, draws)
    texts = [shot.text for shot in shots]
    return Document(
        id=name if settings.epoch == 0 else f"{name}.{settings.epoch}",
        source="+".join(dict.fromkeys(text.source for text in texts)),
        kind="augmented",
        segments=[Segment(text=words)],
        parents=[Parent(text.raw_id, text.start, text.end) for text in texts],
        meta={"layout": look.layout, "spans": spans, **provenance(group)},
    )


def raw_documents(
    group: SynthGroup,
    shots: Sequence[Shot],
    settings: RenderSettings,
    dropped: Counter[str],
    tokenizer: Tokenizer | None,
) -> list[Document]:
    """The texts as they were, cut at sentence ends where the row is too short; a blank one makes no document."""
    documents = []
    for place, text in ((shot.place, shot.text) for shot in shots):
        if not text.text.strip():
            dropped["blank_text"] += 1
            continue
        for number, ((start, end), words) in enumerate(raw_parts(text.text, tokenizer, settings.max_document_tokens)):
            documents.append(
                Document(
                    id=f"{group.id}.raw{place}" + f".part{number}" * bool(number),
                    source=text.source,
                    kind="raw",
                    segments=[Segment(text=words)],
                    parents=[Parent(text.raw_id, text.start + start, text.start + end)],
                    meta=provenance(group),
                )
            )
    return documents


def provenance(group: SynthGroup) -> dict[str, str]:
    return {"synthesizer": group.synthesizer, "fingerprint": group.fingerprint}


def kept_pairs(pairs: Sequence[Pair], keep: str | None, dropped: Counter[str]) -> list[tuple[int, Pair]]:
    """Accepted pairs that pass the filter, with their index; each other one is counted by its reason."""
    kept = []
    for index, pair in enumerate(map(whole_pair, pairs)):
        if pair.verdict == "rejected":
            dropped[pair.reason or "rejected"] += 1
        elif not keeps(keep, pair):
            dropped["keep"] += 1
        else:
            kept.append((index, pair))
    return kept


def whole_pair(pair: Pair) -> Pair:
    """The pair read again from its wire strings: other programs may leave its parts out, or write none that fit."""
    if pair.verdict == "rejected":
        return pair
    if not pair.answer.strip():
        return reject(pair, "empty_answer")
    return msgspec.structs.replace(read_format(pair.question, pair.answer), scores=pair.scores)
