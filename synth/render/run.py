"""`synth render`: groups of texts and pairs become augmented Documents, through templates, without the synthesizer.

Guaranteed: one Document a group, or one a text where `one_shot` draws so; a group whose pairs are all gone leaves one
raw Document a text. One output shard for each input shard, written whole; a second run goes on. Documents carry no BOS
or EOS: `ipt tokenize` adds them. With `hub` the same documents also become a data set for the hub
(synth/render/hub_export.py).
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import writing
from ipt_jax.core.hashing import digest
from ipt_jax.core.progress import Progress
from ipt_jax.corpus.records import encode
from ipt_jax.corpus.shards import Manifest, Output, Shards, write_shard
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.groups import decode_group
from synth.render.documents import LAYOUT_COUNT, RenderSettings, shard_documents
from synth.render.hub_export import export_hub, open_export
from synth.render.pair_filter import check_scores
from synth.render.templates import LAYOUTS, load_templates

FEW_GROUPS = 10_000  # fewer are rendered sooner than worker processes start


@dataclass(frozen=True)
class RenderJob:
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
    with Output(settings.output, stage="render", identity=meaning, shard_name="documents", remake=True) as out:
        export = open_export(settings.hub, out.manifest.fingerprint) if settings.hub else None
        jobs = [RenderJob(settings, shard, out.temporary(shard)) for shard in range(total) if not out.has(shard)]
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
        if settings.hub and export:
            export_hub(settings, settings.hub, export, shards, manifest.fingerprint)
    if not manifest.counts.get("pairs"):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.dropped.items()) or "none was there"
        print(f"synth render: no pair passed ({reasons}); every text stands alone", file=sys.stderr)
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
        "hub": settings.hub.output if settings.hub else None,
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


def render_shard(job: RenderJob) -> ShardResult:
    """Renders one input shard into the job's temporary file; runs in a worker process."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    tokens = 0

    def records() -> Iterator[bytes]:
        nonlocal tokens
        for _, document, length in shard_documents(job.settings, job.shard, counts, dropped):
            tokens += length
            yield encode(document)

    with writing(job.temporary.parent):
        written = write_shard(job.temporary, records())
    return ShardResult(written, tokens, dict(counts), dict(dropped))
