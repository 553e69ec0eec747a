"""The plan of a run's data: the mixture, the order and the packing, decided before training starts.

Guarantees: the row at (step, slot) is a pure function of the plan, so resuming needs the step alone, and any number of
hosts sees the same global batches. The fingerprint covers the contents of the sources, the amounts, the order and the
packing. Memory grows with blocks of documents, not with documents: lengths and tokens are read when a row is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.stage import Manifest
from ipt_jax.corpus.records import KINDS
from ipt_jax.corpus.shards import Shards
from ipt_jax.data.batch import render
from ipt_jax.data.block_table import SourceDocuments, contents, open_documents
from ipt_jax.data.encode import token_dtype
from ipt_jax.data.mixture import DataSettings, SourceMix, check_sources, solve_mix
from ipt_jax.data.packing import CHUNK_ROWS, PIECE, BestFit, Concat
from ipt_jax.data.shuffle import MergedOrder, Stream
from ipt_jax.data.token_reader import FOUND, FoundDocuments, TokenReader
from ipt_jax.data.token_shards import open_token_shards

PLAN_VERSION = 3  # incremented when the same settings give other rows


@dataclass(frozen=True)
class Source:
    """One source of the mix: its directory and documents. `converted`: contents of the source whose parents are
    excluded."""

    settings: SourceMix
    path: Path
    manifest: Manifest
    documents: SourceDocuments
    converted: str | None = None

    @property
    def kind(self) -> str:
        """The kinds of document that it holds, joined by `+`."""
        return "+".join(kind for kind in KINDS if self.manifest.counts.get(kind))


class Plan:
    """Rows 0 to rows - 1 of a mix, by index. Later rows are masked padding, which fills the last batch."""

    def __init__(
        self, settings: DataSettings, sources: Sequence[Source], amounts: Sequence[int], *, rows_per_step: int
    ):
        self.settings, self.sources, self.amounts, self.rows_per_step = settings, sources, amounts, rows_per_step
        self._streams = [
            Stream(source.documents, amount, settings.seed, source.settings.name)
            for source, amount in zip(sources, amounts, strict=True)
        ]
        order = MergedOrder(self._streams, CHUNK_ROWS * settings.seq_len)
        self._packing = (Concat if settings.packing == "concat" else BestFit)(order, settings.seq_len)
        self.rows = self._packing.rows
        self.steps = -(-self.rows // rows_per_step)
        self.tokens = sum(amounts)
        identity = sources[0].manifest.identity
        self.vocab_size: int = identity["vocab_size"]
        self.tokenizer_digest: str = identity["tokenizer"]
        self.tokenizer_dir = sources[0].path / "tokenizer"
        self._dtype = token_dtype(self.vocab_size)
        self._readers = [
            TokenReader(source.path, source.manifest, source.documents, window=stream.window_blocks, dtype=self._dtype)
            for source, stream in zip(sources, self._streams, strict=True)
        ]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers, by field, so that an error can name the field that changed."""
        sources = [
            {
                "name": source.settings.name,
                "contents": contents(source.manifest),
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
        counted = [stream.count() for stream in self._streams]
        sources = [
            _source_summary(source, amount, documents, self.tokens)
            for source, amount, (documents, _) in zip(self.sources, self.amounts, counted, strict=True)
        ]
        return {
            "sources": sources,
            "rows": self.rows,
            "seq_len": self.settings.seq_len,
            "tokens": self.tokens,
            "padding_fraction": 1 - self.tokens / (self.rows * self.settings.seq_len),
            "truncated_tokens": sum(cut for _, cut in counted),
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "packing": self.settings.packing,
            "fingerprint": self.fingerprint,
        }

    def batch(self, rows: Sequence[int], *, by_block: bool = False) -> dict[str, np.ndarray]:
        """Each field's array [len(rows), T]. `by_block`: read and cache complete blocks, for a reader of all rows."""
        pieces = self.pieces(rows)
        return render(pieces, self._read(pieces, by_block), len(rows), self.settings.seq_len, self._dtype)

    def load_blocks(self, rows: Sequence[int]) -> None:
        """Reads the blocks that `batch(rows, by_block=True)` needs."""
        pieces = self.pieces(rows)
        for source, reader in enumerate(self._readers):
            reader.load_blocks(pieces["document"]["record"][pieces["source"] == source])

    def pieces(self, rows: Sequence[int]) -> np.ndarray:
        """The pieces (data.packing PIECE) of some rows. `row` is the index into `rows`."""
        found = []
        for slot, first, stop in _runs(rows, self.rows):
            found.append(self._packing.pieces(first, stop).copy())
            found[-1]["row"] += slot - first
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, PIECE), *found])

    def _read(self, pieces: np.ndarray, by_block: bool) -> FoundDocuments:
        """The document of each piece."""
        places, runs = np.empty(len(pieces), FOUND), [np.zeros((0, 2), np.uint32)]
        buffers: list[bytes] = []
        for source, reader in enumerate(self._readers):
            mine = np.flatnonzero(pieces["source"] == source)
            if not len(mine):
                continue
            found = reader.read(pieces["document"][mine], by_block=by_block)
            found.places["buffer"] += len(buffers)
            found.places["run"] += sum(map(len, runs))
            places[mine] = found.places
            buffers += found.buffers
            runs.append(found.runs)
        return FoundDocuments(places, buffers, np.concatenate(runs))


def _runs(rows: Sequence[int], end: int) -> Iterator[tuple[int, int, int]]:
    """(slot, first row, stop row) of each run of consecutive rows before `end`."""
    numbers = np.asarray(rows, np.int64)
    for run in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1):
        if len(run) and numbers[run[0]] < end:
            yield int(run[0]), int(numbers[run[0]]), min(int(numbers[run[-1]]) + 1, end)


def _source_summary(source: Source, amount: int, documents: int, total: int) -> dict[str, Any]:
    converted, converted_tokens, elsewhere = source.documents.table.remains.counts
    return {
        "name": source.settings.name,
        "kind": source.kind,
        "documents": documents,
        "tokens": amount,
        "epochs": amount / source.documents.tokens,
        "share": amount / total,
        "asked": source.settings.asked,
        "max_epochs": 1 if source.settings.asked == "the rest" else source.settings.max_epochs,
        "available_documents": source.documents.documents,
        "available_tokens": source.documents.tokens,
        "converted_documents": converted,
        "converted_tokens": converted_tokens,
        "converted_elsewhere": elsewhere,
    }


def build_plan(settings: DataSettings, *, rows_per_step: int) -> Plan:
    """The plan of `settings`. Raises UserError for damage and for an amount that cannot be met.

    Shards are checked by size, index files by checksum when their block table is made, each record when it is read.
    """
    check_sources(settings.sources)
    opened = {source.name: open_token_shards(source.path, verify=False) for source in settings.sources}
    _check_tokenizers(settings, opened)
    sources = [_open_source(source, opened) for source in settings.sources]
    amounts = solve_mix(settings, [source.documents.tokens for source in sources])
    return Plan(settings, sources, amounts, rows_per_step=rows_per_step)


def _check_tokenizers(settings: DataSettings, opened: dict[str, Shards]) -> None:
    first, *others = settings.sources
    for source in others:
        if opened[source.name].manifest.identity["tokenizer"] != opened[first.name].manifest.identity["tokenizer"]:
            raise UserError(
                f"sources {first.name!r} ({first.path}) and {source.name!r} ({source.path}) were tokenized with "
                "different tokenizers; run ipt tokenize for both with the same one"
            )


def _open_source(source: SourceMix, opened: dict[str, Shards]) -> Source:
    path, manifest = opened[source.name].path, opened[source.name].manifest
    other = opened[source.exclude_converted] if source.exclude_converted else None
    documents = open_documents(source.name, path, manifest, (other.path, other.manifest) if other else None)
    return Source(source, path, manifest, documents, contents(other.manifest) if other else None)


def print_plan(plan: Plan) -> None:
    Console().print(plan_summary_table(plan.summary()))


def plan_summary_table(summary: dict[str, Any]) -> Table:
    """`Plan.summary()` as a table."""
    table = Table(
        title="{tokens:,} tokens in {rows:,} rows of {seq_len:,} ({packing})".format(**summary),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # a plan of 100B tokens fits 80 columns
        pad_edge=False,
        caption=Text(_caption(summary)),
        caption_justify="left",
    )
    for heading in ("source", "kind", "asked"):
        table.add_column(heading, min_width=6, overflow="fold")
    for heading in ("documents", "tokens", "share", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in summary["sources"]:
        table.add_row(
            escape(source["name"]),
            source["kind"],
            source["asked"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['share']:.2%}",
            f"{source['epochs']:.4g}{_cap(source)}",
        )
    return table


def _cap(source: dict[str, Any]) -> str:
    """The maximum number of epochs, if the recipe states it or the source repeats without one."""
    if source["max_epochs"]:
        return f" of {source['max_epochs']:g}"
    return " (no cap)" if source["epochs"] > 1 and not source["asked"].startswith("epochs") else ""


def _caption(summary: dict[str, Any]) -> str:
    steps = "{steps:,} steps of {rows_per_step:,} rows, padding {padding_fraction:.3%}".format(**summary)
    cut = "{truncated_tokens:,} tokens cut from last documents, plan {fingerprint:.12}".format(**summary)
    excluded = (
        "{name}: {converted_tokens:,} tokens of {converted_documents:,} converted documents excluded; "
        "{converted_elsewhere:,} converted texts are of other sources"
    )
    lines = [excluded.format(**source) for source in summary["sources"] if source["converted_documents"]]
    return "\n".join([f"{steps}, {cut}", *lines])
