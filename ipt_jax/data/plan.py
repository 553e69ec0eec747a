"""The plan of a run's data: how many tokens of what, in which order, in which row. Decided before training starts.

The row at (step, slot) is a pure function of the plan, so resuming needs the step alone and any number of hosts sees
the same global batches. The fingerprint covers the sources' contents, the amounts, the order and the packing. Holds 13
bytes a document occurrence in `concat`, about 40 in `best_fit`; documents themselves are read when a row is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console

from ipt_jax.corpus.records import KINDS
from ipt_jax.corpus.settings import UserError, digest
from ipt_jax.corpus.shards import Shards
from ipt_jax.data.converted import Excluded, unconverted
from ipt_jax.data.lengths import read_index, read_parents
from ipt_jax.data.mix import check_sources, solve_mix
from ipt_jax.data.order import interleave, order_key, shuffled
from ipt_jax.data.packing import BestFit, Concat, Packing, Piece
from ipt_jax.data.rows import Documents, PlannedTokens, RowArrays, read_planned
from ipt_jax.data.settings import DataSettings, SourceMix
from ipt_jax.data.table import plan_summary_table

PLAN_VERSION = 1  # raised when the same settings would give other rows


@dataclass(frozen=True)
class Source:
    """One source of the mix: its shards and the documents of it that take part. `converted`: the contents of the source
    whose parents were excluded."""

    settings: SourceMix
    shards: Shards
    documents: Documents
    excluded: Excluded = Excluded(0, 0, 0)
    converted: str | None = None

    @property
    def tokens(self) -> int:
        return int(self.documents.length.sum(dtype=np.int64))

    @property
    def kind(self) -> str:
        """The kinds of document that it holds, joined by `+`."""
        return "+".join(kind for kind in KINDS if self.shards.manifest.counts.get(kind))


def contents(shards: Shards) -> str:
    return digest([shard.sha256 for shard in shards.manifest.shards])


class Order:
    """The mixed order of all document occurrences: source, document of it, length (of a last one maybe cut)."""

    def __init__(self, sources: Sequence[Source], amounts: Sequence[int], seed: int):
        drawn = [draw_documents(source, amount, seed) for source, amount in zip(sources, amounts, strict=True)]
        self.source, place = interleave([lengths for _, lengths in drawn])
        self.document = np.empty(len(place), np.uint32)
        self.length = np.empty(len(place), np.uint32)
        self.counts = [len(documents) for documents, _ in drawn]
        for number, (documents, lengths) in enumerate(drawn):
            mine = self.source == number
            self.document[mine], self.length[mine] = documents[place[mine]], lengths[place[mine]]
        self.truncated = sum(
            int(source.documents.length[documents[-1]]) - int(lengths[-1])
            for source, (documents, lengths) in zip(sources, drawn, strict=True)
        )


def draw_documents(source: Source, amount: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents and lengths that make exactly `amount` tokens.

    Whole epochs, each in its own order, then the start of one more, its last document cut to the token.
    """
    lengths, total = source.documents.length, source.tokens
    epochs, rest = divmod(amount, total)
    places = np.arange(len(lengths))
    orders = [
        shuffled(places, len(lengths), order_key(seed, source.settings.name, epoch))
        for epoch in range(epochs + (rest > 0))
    ]
    if rest:
        ends = np.cumsum(lengths[orders[-1]], dtype=np.int64)
        orders[-1] = orders[-1][: int(np.searchsorted(ends, rest, side="left")) + 1]
    documents = np.concatenate(orders).astype(np.uint32)
    taken = lengths[documents].copy()
    if rest:
        taken[-1] -= int(ends[len(orders[-1]) - 1]) - rest
    return documents, taken


class Plan:
    """Rows 0 … rows - 1 of a mix, by index. Rows beyond are padding, masked: they fill the last batch."""

    def __init__(
        self, settings: DataSettings, sources: Sequence[Source], amounts: Sequence[int], *, rows_per_step: int
    ):
        self.settings, self.sources, self.amounts, self.rows_per_step = settings, sources, amounts, rows_per_step
        self._order = Order(sources, amounts, settings.seed)
        packing = Concat if settings.packing == "concat" else BestFit
        self._packing: Packing = packing(self._order.length, settings.seq_len)
        self.rows = self._packing.rows
        self.steps = -(-self.rows // rows_per_step)
        self.tokens = sum(amounts)
        identity = sources[0].shards.manifest.identity
        self.vocab_size: int = identity["vocab_size"]
        self.tokenizer_digest: str = identity["tokenizer"]
        self.tokenizer_dir = sources[0].shards.path / "tokenizer"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers, field by field, so that a refusal can name what changed."""
        sources = [
            {
                "name": source.settings.name,
                "contents": contents(source.shards),
                "converted": source.converted,
                "tokens": amount,
            }
            for source, amount in zip(self.sources, self.amounts, strict=True)
        ]
        settings = {name: getattr(self.settings, name) for name in ("seq_len", "packing", "seed")}
        return settings | {
            "version": PLAN_VERSION,
            "rows_per_step": self.rows_per_step,
            "tokenizer": self.tokenizer_digest,
            "sources": sources,
        }

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.identity)

    def summary(self) -> dict[str, Any]:
        """What `ipt plan --json` prints."""
        sources = [
            {
                "name": source.settings.name,
                "kind": source.kind,
                "documents": documents,
                "tokens": amount,
                "epochs": amount / source.tokens,
                "share": amount / self.tokens,
                "asked": source.settings.asked,
                "available_documents": len(source.documents.length),
                "available_tokens": source.tokens,
                "converted_documents": source.excluded.documents,
                "converted_tokens": source.excluded.tokens,
                "converted_elsewhere": source.excluded.unmatched,
            }
            for source, amount, documents in zip(self.sources, self.amounts, self._order.counts, strict=True)
        ]
        return {
            "sources": sources,
            "rows": self.rows,
            "seq_len": self.settings.seq_len,
            "tokens": self.tokens,
            "padding_fraction": 1 - self.tokens / (self.rows * self.settings.seq_len),
            "truncated_tokens": self._order.truncated,
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "packing": self.settings.packing,
            "fingerprint": self.fingerprint,
        }

    def pieces(self, row: int) -> Sequence[Piece]:
        """What row `row` is made of; nothing beyond the last row."""
        return self._packing.pieces(row) if row < self.rows else ()

    def row(self, row: int) -> dict[str, np.ndarray]:
        """Row `row`: each field's array [T]."""
        return {name: array[0] for name, array in self.batch([row]).items()}

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Several rows: each field's array [len(rows), T]. Reads each document once, each source in one batch."""
        made = RowArrays(len(rows), self.settings.seq_len)
        pieces = [self.pieces(row) for row in rows]
        documents = self._read({piece.document for row in pieces for piece in row})
        for slot, row in enumerate(pieces):
            made.fill(slot, [(piece, documents[piece.document]) for piece in row])
        return made.fields

    def _read(self, occurrences: set[int]) -> dict[int, PlannedTokens]:
        """The tokens of document occurrences, by place in the mixed order."""
        found: dict[int, PlannedTokens] = {}
        places = np.array(sorted(occurrences), np.int64)
        for number, source in enumerate(self.sources):
            mine = places[self._order.source[places] == number]
            if mine.size:
                order = self._order
                tokens = read_planned(source.shards, source.documents, order.document[mine], order.length[mine])
                found.update(zip(mine.tolist(), tokens, strict=True))
        return found


def build_plan(settings: DataSettings, *, rows_per_step: int) -> Plan:
    """The plan of `settings`. Checks the shards' checksums. Raises UserError for what is damaged or cannot be met."""
    check_sources(settings.sources)
    opened = {source.name: Shards(source.path, "tokenize") for source in settings.sources}
    _check_tokenizers(settings, opened)
    sources = [_open_source(source, settings, opened) for source in settings.sources]
    amounts = solve_mix(settings, [source.tokens for source in sources])
    return Plan(settings, sources, amounts, rows_per_step=rows_per_step)


def _check_tokenizers(settings: DataSettings, opened: dict[str, Shards]) -> None:
    first, *others = settings.sources
    for source in others:
        if opened[source.name].manifest.identity["tokenizer"] != opened[first.name].manifest.identity["tokenizer"]:
            raise UserError(
                f"sources {first.name!r} ({first.path}) and {source.name!r} ({source.path}) were tokenized with "
                "different tokenizers; run ipt tokenize for both with the same one"
            )


def _open_source(source: SourceMix, settings: DataSettings, opened: dict[str, Shards]) -> Source:
    shards = opened[source.name]
    indexes = read_index(shards.path, shards.manifest)
    if source.exclude_converted is None:
        return Source(source, shards, Documents(np.concatenate([index["tokens"] for index in indexes])))
    converted = opened[source.exclude_converted]
    parents = read_parents(converted.path, converted.manifest)
    documents, excluded = unconverted(source.name, shards.path, shards.manifest, indexes, parents)
    return Source(source, shards, documents, excluded, contents(converted))


def print_plan(plan: Plan) -> None:
    """The summary as a table."""
    Console().print(plan_summary_table(plan.summary()))
