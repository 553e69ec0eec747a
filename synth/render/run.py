"""`synth render`: writes augmented Documents of the texts and pairs of groups, through templates. Needs no engine.

Guarantees:
- One Document per group, or one per text if `one_shot` draws so. A group without pairs yields one raw Document per
  text.
- One output shard per input shard.
- Documents have no BOS or EOS: `ipt tokenize` adds them.
With `hub` the documents are also written as a data set for the hub (synth/render/hub_export.py).
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from ipt_jax.core.manifest import Manifest
from ipt_jax.core.stage import NewShard, Output, format_counts, make_shards
from ipt_jax.corpus.records import encode
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth.groups import counts_under, decode_group, groups_digest, open_groups
from synth.render.documents import LAYOUT_COUNT, RenderSettings, shard_documents
from synth.render.hub_export import FEW_GROUPS, export_hub, open_export
from synth.render.pair_filter import check_scores
from synth.render.templates import LAYOUTS, load_templates


def run_render(settings: RenderSettings) -> dict[str, Any]:
    """Renders every group of `settings.groups` and returns what `--json` prints."""
    shards = open_groups(settings.groups)
    if settings.keep is not None:
        check_scores(settings.keep, (decode_group(record, shards) for record in shards))
    identity = {
        "groups": groups_digest(shards),
        "templates": load_templates(settings.templates).digest,
        "layouts": settings.layouts.weights,
        "tokenizer": load_tokenizer(settings.tokenizer).digest if settings.tokenizer else None,
        **settings.model_dump(include={"one_shot", "detached", "keep", "epoch", "seed", "max_document_tokens"}),
    }
    with Output(settings.output, stage="render", identity=identity, shard_name="documents", remake=True) as output:
        export = open_export(settings.hub, output.manifest.fingerprint) if settings.hub else None
        make_shards(
            partial(document_records, settings),
            [(output, range(len(shards.paths)))],
            lambda shard: shards.manifest.shards[shard].records,
            unit="groups",
            label="synth render",
            workers=1 if len(shards) < FEW_GROUPS else None,
        )
        manifest = output.finish()
        if settings.hub and export:
            export_hub(settings, settings.hub, export, shards, manifest.fingerprint)
    if not manifest.count("pairs"):
        dropped = format_counts(manifest.dropped)
        print(f"synth render: no pair was kept (dropped: {dropped}); all documents are raw texts", file=sys.stderr)
    return summary(manifest, settings)


def document_records(settings: RenderSettings, index: int, shard: NewShard) -> Iterator[bytes]:
    """The documents of one shard of groups. Runs in a worker process."""
    for _, document, tokens in shard_documents(settings, index, shard.counts, shard.dropped):
        shard.tokens += tokens
        yield encode(document)


def summary(manifest: Manifest, settings: RenderSettings) -> dict[str, Any]:
    layouts = counts_under(manifest.counts, LAYOUT_COUNT)
    return {
        "documents": manifest.records,
        "tokens": manifest.tokens if settings.tokenizer else None,
        "layouts": layouts,
        "shares": shares(settings, layouts),
        "one_shot": {
            "asked": settings.one_shot,
            "got": share(manifest.count("one_shot"), manifest.count("with_pairs")),
        },
        **{name: manifest.count(name) for name in ("pairs", "detached", "no_pair_left", "split_for_row")},
        "dropped": manifest.dropped,
        "hub": settings.hub.output if settings.hub else None,
    }


def shares(settings: RenderSettings, drawn: dict[str, int]) -> dict[str, dict[str, float]]:
    """The requested share of each layout, and its share of the augmented documents."""
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
